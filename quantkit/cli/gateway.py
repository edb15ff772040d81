"""`quantkit gateway`: a LiteLLM configuration with one stable name over pinned revisions."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

import quantkit
from quantkit.cli.console import Reply, show_progress
from quantkit.cli.options import JsonOption, QuietOption
from quantkit.errors import InputError

if TYPE_CHECKING:
    from quantkit.routing import Route

EXAMPLE = (
    "Example: quantkit gateway my-model --quantized OWNER/MODEL-awq4=http://gpu-1:8000/v1 "
    "--baseline OWNER/MODEL=http://gpu-2:8000/v1 > litellm.yaml"
)


def gateway(
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="The name that clients ask for.")],
    quantized: Annotated[
        list[str],
        typer.Option(
            "--quantized",
            metavar="ARTIFACT=URL",
            help="A published or local artifact and its server; may be repeated.",
        ),
    ],
    baseline: Annotated[
        str,
        typer.Option("--baseline", metavar="MODEL=URL", help="The 16-bit original and its server."),
    ],
    api_key_variable: Annotated[
        str | None,
        typer.Option(
            "--api-key-variable",
            metavar="NAME",
            help="Variable of the proxy's environment with the servers' key.",
        ),
    ] = None,
    unproven: Annotated[
        bool, typer.Option("--unproven", help="Accept artifacts without a PASS.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Print a LiteLLM configuration: quantized artifacts first, the 16-bit original as fallback.

    Every route is pinned to a commit, or to the hash of its files, and only artifacts with a PASS
    are taken.
    """
    with show_progress(quiet) as progress:
        found = quantkit.gateway(
            alias,
            quantized=[read_route(pair, "--quantized") for pair in quantized],
            baseline=read_route(baseline, "--baseline"),
            api_key_variable=api_key_variable,
            unproven=unproven,
            progress=progress,
        )
    document = {
        "alias": alias,
        "config": found.config,
        "pinned": [asdict(each) for each in found.pinned],
    }
    return Reply(document, [found.text.rstrip("\n")])


def read_route(pair: str, option: str) -> Route:
    """Read MODEL=URL; the URL begins at the last `=` that `http` follows.

    Raises:
        InputError: it is something else.
    """
    from quantkit.routing import Route

    model, found, address = pair.rpartition("=http")
    if not found or not model:
        raise InputError(f"{option} wants MODEL=http://HOST:PORT/v1")
    return Route(model, f"http{address}")
