"""Publishing as the last stage of a job, whose recipe says where to."""

from __future__ import annotations

import shlex
from dataclasses import replace

from quantkit.errors import HubError, PublishError
from quantkit.publishing.client import open_hub, quiet_client
from quantkit.publishing.contents import look
from quantkit.publishing.preparing import check_repository, check_tag
from quantkit.publishing.request import Request, check_request
from quantkit.publishing.rights import check_right_to_write
from quantkit.publishing.run import publish
from quantkit.recipe import PublishSpec
from quantkit.records import Event, Progress, Result


def check_publishing(spec: PublishSpec | None, tell: Progress) -> None:
    """Refuse, before hours of work, what could not be published after them.

    Raises:
        PublishError: there is no token that may write there, or the repository does not fit.
        HubError: the Hub cannot be asked.
    """
    if spec is None:
        return
    request = _make_request(spec)
    check_request(request)
    hub = open_hub()
    with quiet_client(lambda words: tell(Event("prepare", 0, 1, words))):
        check_right_to_write(hub, spec.repo, pull_request=spec.pull_request)
        contents = look(hub, spec.repo, request.branch)
    check_repository(request, contents)
    check_tag(request, contents, changes=True)


def publish_result(spec: PublishSpec | None, result: Result, tell: Progress) -> Result:
    """Publish the output of a job that passed; of another verdict nothing goes anywhere.

    Raises:
        PublishError, HubError: as `publish`; the output is whole, and the message says how to go
            on.
    """
    if spec is None:
        return result
    if result.verdict != "PASS":
        note = f"nothing was published to {spec.repo}: the verdict is {result.verdict}, not PASS"
        report = replace(result.report, notes=(*result.report.notes, note))
        return replace(result, report=report)
    try:
        publication = publish(
            result.output,
            repo=spec.repo,
            revision=spec.revision,
            tag=spec.tag,
            private=spec.private,
            pull_request=spec.pull_request,
            progress=tell,
        )
    except (PublishError, HubError) as error:
        command = shlex.join(_list_command(spec, str(result.output)))
        failed = type(error)(
            f"{result.output} is finished and has passed, and is not published: {error}; go on "
            f"with `{command}`"
        )
    else:
        return replace(result, publication=publication)
    raise failed


def _make_request(spec: PublishSpec) -> Request:
    return Request(
        spec.repo,
        revision=spec.revision,
        tag=spec.tag,
        private=spec.private,
        pull_request=spec.pull_request,
    )


def _list_command(spec: PublishSpec, output: str) -> list[str]:
    """The words that do the same by hand."""
    command = ["quantkit", "publish", output, "--repo", spec.repo]
    for option, value in (("--revision", spec.revision), ("--tag", spec.tag)):
        if value is not None:
            command += [option, value]
    if spec.private is not None:
        command.append("--private" if spec.private else "--public")
    return [*command, *(["--pull-request"] if spec.pull_request else [])]
