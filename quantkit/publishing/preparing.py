"""What a publication would change, settled before anything is sent: the same for a dry run."""

from __future__ import annotations

from dataclasses import replace

from quantkit.errors import HubError, PublishError
from quantkit.publishing.checking import CARD, CheckedOutput
from quantkit.publishing.client import Hub
from quantkit.publishing.contents import Contents, find_base, find_deletions, look
from quantkit.publishing.layout import compose
from quantkit.publishing.promoting import find_alias
from quantkit.publishing.request import Request
from quantkit.records import Publication


def describe(checked: CheckedOutput, request: Request, hub: Hub) -> Publication:
    """Return what a run would do. A Hub that cannot be asked is no reason to say nothing.

    Raises:
        PublishError: the repository holds something else, or does not fit what was asked for.
    """
    try:
        contents = look(hub, request.repo, request.branch)
    except (PublishError, HubError) as error:
        plan = prepare(checked, request, hub, Contents())
        note = f"what {request.repo} holds, and what would be removed, is not known: {error}"
        return replace(plan, notes=(*plan.notes, note), private=None)
    plan = prepare(checked, request, hub, contents)
    if contents.exists:
        return plan
    made = "private" if request.private is not False else "public"
    note = f"{request.repo} is not there, or the token may not see it: it would be made, {made}"
    return replace(plan, notes=(*plan.notes, note))


def prepare(checked: CheckedOutput, request: Request, hub: Hub, contents: Contents) -> Publication:
    """Return what goes and what is removed, as the record of a dry run.

    Raises:
        PublishError: the repository holds something else, or does not fit what was asked for.
    """
    check_repository(request, contents)
    files, serve = compose(checked, request.place, contents, hub.token)
    deleted = find_deletions(
        contents,
        [file.path for file in files],
        request.variant or "",
        find_base(checked.evidence),
        replace=request.replace,
        where=request.repo,
    )
    changes = bool(deleted) or not all(file.present for file in files)
    check_tag(request, contents, changes=changes)
    notes = list(checked.notes)
    if contents.private is False and request.private is None:
        notes.append(f"{request.repo} is public: everybody can see this")
    if CARD in contents.files and not contents.earlier:
        notes.append(f"the {CARD} that is there is replaced; the history keeps it")
    if not changes:
        notes.append(f"{request.repo} has all of it already: there is nothing to send")
    return Publication(
        repo=request.repo,
        revision=request.branch,
        files=files,
        deleted=deleted,
        url=hub.page(request.repo, request.revision),
        serve=serve,
        private=contents.private if contents.exists else request.private is not False,
        tag=request.tag,
        alias=request.alias,
        notes=tuple(notes),
        dry_run=True,
    )


def check_repository(request: Request, contents: Contents) -> None:
    """Refuse a repository that others may see otherwise than asked for, or names taken in it.

    Raises:
        PublishError: one of them.
    """
    if contents.private is not None and request.private not in (None, contents.private):
        now, asked = ("private", "public") if contents.private else ("public", "private")
        raise PublishError(
            f"{request.repo} is {now}, and --{asked} was asked for: change that in its settings "
            f"first"
        )
    if request.revision is not None and request.revision in contents.tags:
        raise PublishError(
            f"--revision {request.revision} is a tag of {request.repo}: commits go to branches"
        )
    if request.pull_request and contents.exists and request.branch not in contents.branches:
        raise PublishError(
            f"--revision {request.revision} is no branch of {request.repo}: a pull request is for "
            f"one that exists"
        )
    if request.tag is not None and request.tag in contents.branches:
        raise PublishError(f"--tag {request.tag} is a branch of {request.repo}: choose another")
    if request.alias is not None:
        find_alias(request.alias, contents)


def check_tag(request: Request, contents: Contents, *, changes: bool) -> None:
    """Refuse a tag that names another commit; an earlier run may have made it of this one.

    Args:
        changes: whether there will be another commit than the head.

    Raises:
        PublishError: it does.
    """
    there = contents.tags.get(request.tag or "")
    if there is not None and (changes or there != contents.head):
        raise PublishError(
            f"--tag {request.tag}: {request.repo} has this tag already, at {there[:12]}; a tag "
            f"stays where it is: choose another, or let --alias name what moves"
        )
