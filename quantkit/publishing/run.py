"""Publishing as one call."""

from __future__ import annotations

import os
from pathlib import Path

from quantkit.publishing.checking import check_output
from quantkit.publishing.client import open_hub, quiet_client, say_nothing
from quantkit.publishing.contents import look
from quantkit.publishing.preparing import describe, prepare
from quantkit.publishing.request import Request, check_request
from quantkit.publishing.rights import check_right_to_write
from quantkit.publishing.sending import send
from quantkit.records import Event, Progress, Publication


def publish(
    output: str | os.PathLike[str],
    *,
    repo: str,
    revision: str | None = None,
    tag: str | None = None,
    alias: str | None = None,
    private: bool | None = None,
    pull_request: bool = False,
    variant: str | None = None,
    replace: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Publication:
    """Put an output of `quantize` that passed on the Hub, in one commit.

    Every file is hashed again, and none goes that the evidence does not name. The token is the one
    of the environment (HF_TOKEN) or of the Hub's client.

    Args:
        output: folder that `quantize` wrote, with the verdict PASS.
        repo: `owner/name`; it is made where it does not exist.
        revision: branch to commit to, made from the main one where it does not exist; by default
            the main one.
        tag: name for this commit for good.
        alias: name that moves to this commit, as `promote` moves it.
        private: whether only those of its owner see the repository. By default one that exists
            stays as it is, and a new one is private.
        pull_request: propose the commit instead of making it.
        variant: folder of the repository for this artifact, beside others of the same model.
        replace: remove files of the repository that quantkit did not publish.
        dry_run: send nothing; say what would go.
        progress: called after each step.

    Raises:
        PublishError: the output has not passed or has changed, the repository holds something else,
            or the Hub refuses.
        HubError: the Hub cannot be reached or is busy; the same call goes on.
    """
    tell = progress or say_nothing
    request = Request(repo, revision, tag, alias, private, pull_request, variant, replace)
    check_request(request)
    checked = check_output(Path(output), tell)
    hub = open_hub()
    with quiet_client(lambda words: tell(Event("publish", 0, 1, words))):
        if dry_run:
            return describe(checked, request, hub)
        check_right_to_write(hub, repo, pull_request=pull_request)
        contents = look(hub, repo, request.branch)
        return send(prepare(checked, request, hub, contents), request, hub, contents, tell)
