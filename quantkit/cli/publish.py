"""`quantkit publish`: what passed goes to the Hub, and a moving name to what passed."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

import quantkit
from quantkit.cli.console import Reply, show_progress
from quantkit.cli.layout import Line
from quantkit.cli.options import JsonOption, QuietOption, given
from quantkit.cli.published import list_publication_lines, publication_document, say_move
from quantkit.errors import InputError
from quantkit.records import Promotion

EXAMPLE = "Example: quantkit publish artifacts/model-awq4 --repo OWNER/NAME --dry-run"


def publish(
    output: Annotated[
        str | None,
        typer.Argument(metavar="OUTPUT", help="Output of `quantkit quantize` that passed."),
    ] = None,
    repo: Annotated[
        str | None, typer.Option("--repo", metavar="OWNER/NAME", help="Repository on the Hub.")
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="BRANCH", help="Branch to commit to; made if absent."),
    ] = None,
    tag: Annotated[
        str | None,
        typer.Option("--tag", metavar="TAG", help="Names this commit for good."),
    ] = None,
    alias: Annotated[
        str | None,
        typer.Option("--alias", metavar="NAME", help="Tag or branch that moves to this commit."),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar="REVISION",
            help="Without OUTPUT: revision that --alias moves to, by default main.",
        ),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Who sees the repository; a new one is private, one that exists stays as it is.",
        ),
    ] = None,
    pull_request: Annotated[
        bool | None,
        typer.Option("--pull-request", help="Propose the commit instead of making it."),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            "--variant",
            metavar="NAME",
            help="Folder for this artifact, beside others of the model.",
        ),
    ] = None,
    replace: Annotated[
        bool | None,
        typer.Option("--replace", help="Remove files that quantkit did not publish there."),
    ] = None,
    dry_run: Annotated[
        bool | None, typer.Option("--dry-run", help="Send nothing; show exactly what would go.")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Put an output that passed on the Hugging Face Hub, in one commit; or move a name to one.

    The token is the one of HF_TOKEN, or of `hf auth login`; HF_ENDPOINT names another Hub.
    """
    if repo is None:
        raise InputError("name the repository: --repo OWNER/NAME")
    with show_progress(quiet) as progress:
        if output is None:
            asked = {
                "--revision": revision,
                "--tag": tag,
                "--private/--public": private,
                "--pull-request": pull_request,
                "--variant": variant,
                "--replace": replace,
            }
            _refuse_without_output(alias, asked)
            return _promotion_reply(
                quantkit.promote(
                    repo,
                    alias=str(alias),
                    **given(at=at, dry_run=dry_run, progress=progress),
                )
            )
        if at is not None:
            raise InputError("--at goes without OUTPUT: the alias moves to what is published")
        found = quantkit.publish(
            output,
            repo=repo,
            **given(
                revision=revision,
                tag=tag,
                alias=alias,
                private=private,
                pull_request=pull_request,
                variant=variant,
                replace=replace,
                dry_run=dry_run,
                progress=progress,
            ),
        )
    return Reply(publication_document(found), list_publication_lines(found))


def _refuse_without_output(alias: str | None, asked: dict[str, Any]) -> None:
    """Without an output there is a name to move, and nothing else.

    Raises:
        InputError: no name is given, or an option that is about an output.
    """
    found = [option for option, value in asked.items() if value is not None]
    if alias is None:
        raise InputError("name the OUTPUT to publish, or the --alias to move")
    if found:
        raise InputError(f"{found[0]} goes with an OUTPUT: --alias NAME --at REVISION moves a name")


def _promotion_reply(found: Promotion) -> Reply:
    document = {
        "repo": found.repo,
        "alias": found.alias,
        "kind": found.kind,
        "before": found.before,
        "after": found.after,
        "url": found.url,
        "serve": found.serve,
        "dry_run": found.dry_run,
    }
    lines: list[Line] = [
        f"alias    {found.alias} ({found.kind} of {found.repo})"
        f"{say_move(found.before, found.after)}"
    ]
    if found.dry_run:
        return Reply(document, [*lines, "nothing was moved: this was a dry run"])
    if found.before not in (None, found.after):
        back = ["quantkit", "publish", "--repo", found.repo, "--alias", found.alias, "--at"]
        lines.append(f"back     {shlex.join([*back, str(found.before)])}")
    return Reply(document, [*lines, f"url      {found.url}", f"serve    {found.serve}"])
