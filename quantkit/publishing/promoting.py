"""A name that moves: `stable` is what a server asks for, whatever revision passed last.

The Hub has no request that moves a tag: it is removed and made again, and for the moment between
the two it is not there. A branch keeps its history: it gets one commit that makes its files those
of the revision, at once and without a moment in between.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from quantkit.errors import HubError, PublishError
from quantkit.publishing.checking import CODE, WEIGHTS, check_agreement, check_verdicts
from quantkit.publishing.client import (
    Hub,
    ask,
    check_repo_name,
    open_hub,
    quiet_client,
    say_nothing,
)
from quantkit.publishing.contents import (
    Contents,
    Earlier,
    RemoteFile,
    fetch_file,
    list_files,
    look,
)
from quantkit.publishing.layout import list_variants
from quantkit.publishing.request import MAIN, check_alias, check_ref
from quantkit.publishing.rights import check_right_to_write
from quantkit.records import Event, Progress, Promotion
from quantkit.report.usage import Place, serve_command

_MOST_SMALL_BYTES = 100 * 1024**2
"""The Hub keeps larger files as large ones, whose hashes it tells."""


def promote(
    repo: str,
    *,
    alias: str,
    at: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Promotion:
    """Let `alias` name a revision of a repository that carries a PASS; going back is the same.

    The evidence of the revision is read, and its hashes are compared with the files there.

    Args:
        repo: `owner/name`.
        alias: a tag or a branch; a new one becomes a tag.
        at: branch, tag or commit; by default the main branch.
        dry_run: check, and move nothing.
        progress: called after each step.

    Raises:
        PublishError: the revision is not there, or has not passed, or is not what passed.
        HubError: the Hub cannot be reached or is busy; the same call goes on.
    """
    tell = progress or say_nothing
    check_repo_name(repo)
    check_alias(alias)
    check_ref("--at", at)
    hub = open_hub()
    with quiet_client(lambda words: tell(Event("promote", 0, 2, words))):
        if not dry_run:
            check_right_to_write(hub, repo)
        tell(Event("promote", 0, 2, "reading the evidence of the revision"))
        contents = look(hub, repo, at or MAIN, or_main=False)
        check_revision(hub, repo, contents, at or MAIN)
        after = str(contents.head)
        tell(Event("promote", 1, 2, f"moving {alias}"))
        kind, before = find_alias(alias, contents)
        if not dry_run:
            move_alias(hub, repo, alias, after, contents)
        tell(Event("promote", 2, 2))
    first = contents.earlier[0]
    place = Place(repo, on_hub=True, folder=first.folder, revision=alias)
    variant = list_variants(first.report, place)[0]
    return Promotion(
        repo=repo,
        alias=alias,
        kind=kind,
        before=before,
        after=after,
        format=variant.artifact.format,
        folder=variant.place.folder,
        url=hub.page(repo, alias),
        serve=serve_command(variant.artifact, variant.place),
        dry_run=dry_run,
    )


def check_revision(hub: Hub, repo: str, contents: Contents, name: str) -> None:
    """Refuse a revision that does not hold exactly what has passed.

    Args:
        contents: of the revision.
        name: what the user calls it.

    Raises:
        PublishError: it does not.
        HubError: the Hub cannot be asked.
    """
    where = f"{name} of {repo}"
    if not contents.exists:
        raise PublishError(f"{repo} is not there, or the token may not see it")
    if not contents.earlier:
        raise PublishError(f"{where} has no quantkit.json: nothing says that it has passed")
    owned: set[str] = set()
    for each in contents.earlier:
        inside = f"{where}, in {each.folder}" if each.folder else where
        check_agreement(each.evidence, each.document, inside)
        check_verdicts(each.report, inside)
        owned |= each.owned
        _check_hashes(hub, repo, contents, each, inside)
    strangers = sorted(
        path for path in set(contents.files) - owned if Path(path).suffix.lower() in WEIGHTS | CODE
    )
    if strangers:
        raise PublishError(
            f"{where} has {strangers[0]}, which nobody has judged and a runtime might load: remove "
            f"it there, or publish again with --replace"
        )


def _check_hashes(hub: Hub, repo: str, contents: Contents, each: Earlier, where: str) -> None:
    """Compare recorded hashes with the Hub's of large files, and with the bytes of small ones."""
    commit = str(contents.head)
    with tempfile.TemporaryDirectory() as scratch:
        for path, recorded in sorted(each.hashes.items()):
            file = contents.files.get(path)
            if file is None:
                raise PublishError(f"{where} lacks {path}, which was judged")
            actual = file.sha256 or _hash(hub, repo, commit, file, Path(scratch))
            if actual != recorded:
                raise PublishError(
                    f"{where}: {path} is not the file that was judged, its sha256 differs from the "
                    f"one in quantkit.json"
                )


def _hash(hub: Hub, repo: str, commit: str, file: RemoteFile, folder: Path) -> str | None:
    if file.size_bytes > _MOST_SMALL_BYTES:
        return None
    place = fetch_file(hub, repo, commit, file, folder)
    return hashlib.sha256(place.read_bytes()).hexdigest()


def find_alias(alias: str, contents: Contents) -> tuple[str, str | None]:
    """Return whether an alias is a tag or a branch, and the commit that it names; a new one: None.

    Raises:
        PublishError: a tag and a branch have this name.
    """
    tag, branch = contents.tags.get(alias), contents.branches.get(alias)
    if tag is not None and branch is not None:
        raise PublishError(f"--alias {alias} is a tag and a branch: remove one of the two")
    return ("tag", tag) if branch is None else ("branch", branch)


def move_alias(hub: Hub, repo: str, alias: str, after: str, contents: Contents) -> str | None:
    """Let an alias name a commit that has passed; return the one that it has named before.

    Raises:
        PublishError, HubError: as `ask`; the message says where the alias is.
    """
    kind, before = find_alias(alias, contents)
    if before == after:
        return before
    if kind == "branch":
        _bring_branch(hub, repo, alias, str(before), after)
        return before
    if before is not None:
        what = f"move {alias}, which is still at {before[:12]}"
        ask(hub, what, repo, lambda: hub.api.delete_tag(repo, tag=alias))
    try:
        what = f"set {alias} to {after[:12]}"
        ask(hub, what, repo, lambda: hub.api.create_tag(repo, tag=alias, revision=after))
    except (PublishError, HubError) as error:
        lost = f"; {alias} was at {before[:12]} and is not there now" if before else ""
        failed = type(error)(
            f"{error}{lost}: set it with `quantkit publish --repo {repo} --alias {alias} --at "
            f"{after}`"
        )
    else:
        return before
    raise failed


def _bring_branch(hub: Hub, repo: str, branch: str, before: str, after: str) -> None:
    """Make the files of a branch those of a commit, in one commit on top of its own."""
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    there, wanted = list_files(hub, repo, before), list_files(hub, repo, after)
    copies = [
        CommitOperationCopy(path, path, src_revision=after)
        for path, file in wanted.items()
        if not _is_same(there.get(path), file)
    ]
    removals = [CommitOperationDelete(path) for path in set(there) - set(wanted)]
    if not copies and not removals:
        return
    ask(
        hub,
        f"move {branch}",
        repo,
        lambda: hub.api.create_commit(
            repo,
            [*removals, *copies],
            commit_message=f"Bring {branch} to {after[:12]}",
            revision=branch,
            parent_commit=before,
        ),
    )


def _is_same(there: RemoteFile | None, wanted: RemoteFile) -> bool:
    return there is not None and (there.blob, there.sha256) == (wanted.blob, wanted.sha256)
