"""`quantkit estimate`: what a model takes to serve, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

import quantkit
from quantkit.cli.console import Reply
from quantkit.cli.layout import Line, Sentence, make_table
from quantkit.cli.options import JsonOption, QuietOption, given
from quantkit.errors import InputError
from quantkit.report.rounding import format_bytes

if TYPE_CHECKING:
    from quantkit.estimating.records import Estimate, GpuEstimate

EXAMPLE = "Example: quantkit estimate meta-llama/Llama-3.1-8B-Instruct --context 8192"

_LABEL = "A planning approximation: nothing was run, and a runtime takes memory of its own."


def estimate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Hub id, id@revision, folder, or a size as 7B."),
    ],
    context: Annotated[
        int | None,
        typer.Option("--context", metavar="TOKENS", help="Of each sequence; 8192 by default."),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option("--concurrency", metavar="N", help="Sequences at once; 8 by default."),
    ] = None,
    gpus: Annotated[
        list[str] | None,
        typer.Option("--gpu", metavar="NAME", help="Only this GPU; may be repeated."),
    ] = None,
    prices: Annotated[
        list[str] | None,
        typer.Option(
            "--price", metavar="GPU=DOLLARS", help="Your price of an hour; may be repeated."
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Estimate memory and cost of serving a model: weights, KV cache, GPUs, dollars a month.

    Only the config is read, from the Hub where it is not a folder. The figures are a planning
    approximation.
    """
    found = quantkit.estimate(
        model,
        **given(
            context=context,
            concurrency=concurrency,
            gpus=gpus,
            prices=None if prices is None else read_prices(prices),
        ),
    )
    return Reply({"approximation": True, **asdict(found)}, list(_lines(found)))


def read_prices(pairs: list[str]) -> dict[str, float]:
    """Read `GPU=DOLLARS` pairs.

    Raises:
        InputError: one is something else.
    """
    found = {}
    for pair in pairs:
        name, equals, price = pair.partition("=")
        try:
            found[name] = float(price.removeprefix("$"))
        except ValueError:
            equals = ""
        if not equals:
            raise InputError(f"--price {pair!r}: write the GPU and dollars an hour, as H100=2.50")
    return found


def _lines(found: Estimate) -> Iterator[Line]:
    yield f"{found.model}: {found.parameters / 1e9:.2f} billion weights"
    yield Sentence("", _LABEL)
    yield ""
    yield make_table(
        [
            ("weights", "size", "bits per weight"),
            *(
                (row.name, format_bytes(row.size_bytes), f"{row.bits_per_weight:.2f}")
                for row in found.weights
            ),
        ]
    )
    if found.caches:
        yield ""
        yield make_table(
            [
                ("context", "sequences", "KV cache, 16 bit", "KV cache, FP8"),
                *(
                    (
                        f"{row.context:,}",
                        str(row.sequences),
                        format_bytes(row.bytes_16bit),
                        format_bytes(row.bytes_fp8),
                    )
                    for row in found.caches
                ),
            ]
        )
    yield ""
    yield Sentence("", _gpu_title(found))
    yield make_table(_gpu_rows(found), has_titles=True)
    yield Sentence("Prices: ", f"{found.prices}; yours with `--price GPU=DOLLARS`.")
    of_rows = dict.fromkeys(row.note for row in found.weights if row.note)
    for note in (*found.notes, *of_rows):
        yield Sentence("note: ", note)


def _gpu_title(found: Estimate) -> str:
    if found.context is None:
        return "GPUs that hold the weights, and dollars for a month of them:"
    return (
        f"GPUs that hold weights and a 16-bit cache of {found.concurrency} x "
        f"{found.context:,} tokens, and dollars for a month of them:"
    )


def _gpu_rows(found: Estimate) -> list[list[str]]:
    """One row a GPU, one column a format."""
    formats = list(dict.fromkeys(row.weights for row in found.gpus))
    rows: dict[str, list[str]] = {}
    for row in found.gpus:
        rows.setdefault(row.gpu, [row.gpu]).append(_gpu_cell(row))
    return [["GPU", *(name.split()[0] for name in formats)], *rows.values()]


def _gpu_cell(row: GpuEstimate) -> str:
    if row.count is None:
        return "more than 8"
    price = "no price" if row.monthly_price is None else f"${row.monthly_price:,.0f}"
    return f"{row.count} ({price})"
