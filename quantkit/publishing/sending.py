"""A settled publication -> one commit.

Large files go first, one after the other, and nobody sees them until the commit names them. The Hub
keeps what has arrived whole: a run that was cut off is started again, and sends what is missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from quantkit.errors import HubError, PublishError
from quantkit.publishing.checking import CARD
from quantkit.publishing.client import Hub, ask
from quantkit.publishing.contents import Contents, list_files, look
from quantkit.publishing.layout import is_same
from quantkit.publishing.promoting import move_alias
from quantkit.publishing.request import MAIN, Request
from quantkit.records import Event, Progress, Publication, PublishedFile
from quantkit.report.rounding import format_bytes

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_IN_MEMORY_BYTES = 10 * 1024**2
"""Up to this size the bytes that were hashed are the bytes that are sent."""
_DESCRIPTION = (
    "The gate's verdict is PASS: report/ has the figures, quantkit.json the hashes of the files."
)


def send(
    plan: Publication, request: Request, hub: Hub, contents: Contents, tell: Progress
) -> Publication:
    """Make the repository and the branch, send the files, commit, and name the commit.

    Raises:
        PublishError, HubError: as `ask`; before the commit nothing is visible but an empty
            repository or a branch that equals the main one.
    """
    _validate_card(plan, hub)
    if not contents.exists:
        _create_repository(request, hub)
        contents = look(hub, request.repo, MAIN)
    if request.branch not in (MAIN, *contents.branches):
        what = f"make the branch {request.branch}"
        ask(
            hub,
            what,
            request.repo,
            lambda: hub.api.create_branch(
                request.repo, branch=request.branch, revision=contents.head
            ),
        )
    commit, pull_request = _commit(plan, request, hub, contents, tell)
    _check_arrival(plan, hub, commit)
    done = replace(
        plan,
        dry_run=False,
        commit=commit,
        pull_request=pull_request,
        private=contents.private,
        url=pull_request or hub.page(request.repo, request.tag or request.revision),
    )
    return _name_commit(done, request, hub, contents, commit)


def _validate_card(plan: Publication, hub: Hub) -> None:
    """Let the Hub look at the card before gigabytes are sent in vain."""
    from huggingface_hub import ModelCard

    (card,) = (file for file in plan.files if file.path == CARD)
    text = (card.content or b"").decode()
    ask(hub, "have the model card accepted", plan.repo, lambda: ModelCard(text).validate())


def _create_repository(request: Request, hub: Hub) -> None:
    private = request.private is not False
    ask(
        hub,
        f"make {request.repo}",
        request.repo,
        lambda: hub.api.create_repo(request.repo, private=private, exist_ok=True),
    )


def _commit(
    plan: Publication, request: Request, hub: Hub, contents: Contents, tell: Progress
) -> tuple[str, str | None]:
    """Send what is not there, and make one commit of it; return it and its pull request."""
    from huggingface_hub import CommitOperationDelete

    new = [file for file in plan.files if not file.present]
    if not new and not plan.deleted:
        return str(contents.head), None
    additions = _send_large_files(new, request, hub, tell)
    additions += [_make_addition(file) for file in new if not file.large]
    removals = [CommitOperationDelete(path) for path in plan.deleted]
    info = ask(
        hub,
        f"commit to {request.repo}",
        request.repo,
        lambda: hub.api.create_commit(
            request.repo,
            [*removals, *additions],
            commit_message=_title(request),
            commit_description=_DESCRIPTION,
            revision=request.branch,
            create_pr=request.pull_request,
            parent_commit=contents.head,
        ),
    )
    tell(Event("publish", len(new), len(new), "committed"))
    return info.oid, info.pr_url


def _send_large_files(
    files: Sequence[PublishedFile], request: Request, hub: Hub, tell: Progress
) -> list[CommitOperationAdd]:
    """Send large files one after the other, so that each that has arrived is done with."""
    additions = []
    large = [file for file in files if file.large]
    for number, file in enumerate(large):
        tell(Event("publish", number, len(files), f"{file.path}, {format_bytes(file.size_bytes)}"))
        addition = _make_addition(file)
        ask(
            hub,
            f"send {file.path}",
            request.repo,
            lambda addition=addition: hub.api.preupload_lfs_files(  # type: ignore[misc]
                request.repo,
                [addition],
                revision=request.branch,
                create_pr=request.pull_request,
                free_memory=False,
            ),
        )
        if addition.upload_info.sha256.hex() != file.sha256:
            raise _changed(file)
        additions.append(addition)
    tell(Event("publish", len(large), len(files), "the small files and the commit"))
    return additions


def _make_addition(file: PublishedFile) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    if file.source is None:
        return CommitOperationAdd(file.path, file.content or b"")
    try:
        if file.size_bytes > _IN_MEMORY_BYTES:
            return CommitOperationAdd(file.path, str(file.source))
        content = file.source.read_bytes()
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise _changed(file) from None
        raise PublishError(
            f"cannot read {file.source}: {error.strerror or error}; nothing was committed"
        ) from error
    except ValueError:
        raise _changed(file) from None
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise _changed(file)
    return CommitOperationAdd(file.path, content)


def _changed(file: PublishedFile) -> PublishError:
    return PublishError(
        f"{file.source} was changed while it was published; nothing was committed: quantize again, "
        f"or publish another output"
    )


def _title(request: Request) -> str:
    return f"Publish {request.variant or 'a quantized model'} with quantkit"


def _check_arrival(plan: Publication, hub: Hub, commit: str) -> None:
    """See whether the commit has what it should: the Hub's answer alone is no proof.

    Raises:
        HubError: it does not.
    """
    files = list_files(hub, plan.repo, commit)
    wrong = [file.path for file in plan.files if not is_same(file, files.get(file.path))]
    wrong += [path for path in plan.deleted if path in files]
    if wrong:
        raise HubError(
            f"commit {commit[:12]} of {plan.repo} has not what was sent: {', '.join(wrong[:5])}; "
            f"do not use it, and run the same command again"
        )


def _name_commit(
    done: Publication, request: Request, hub: Hub, contents: Contents, commit: str
) -> Publication:
    """Give the commit its tag, and move the alias to it.

    Raises:
        PublishError, HubError: a name is not set. The message says that the commit is there.
    """
    try:
        if request.tag is not None and contents.tags.get(request.tag) != commit:
            _set_tag(hub, request.repo, request.tag, commit)
        if request.alias is None:
            return done
        before = move_alias(hub, request.repo, request.alias, commit, contents)
    except (PublishError, HubError) as error:
        failed = type(error)(
            f"{request.repo} has the files, in commit {commit[:12]}, but not all of its names: "
            f"{error}"
        )
    else:
        return replace(done, moved_from=before)
    raise failed


def _set_tag(hub: Hub, repo: str, tag: str, commit: str) -> None:
    what = f"set the tag {tag}"
    ask(hub, what, repo, lambda: hub.api.create_tag(repo, tag=tag, revision=commit))
