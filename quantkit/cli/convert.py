"""`quantkit convert`: a quantized checkpoint into another format."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import quantkit
from quantkit.cli.console import Reply, make_table, show_progress
from quantkit.cli.options import JsonOption, OverwriteOption, QuietOption, given
from quantkit.inputs import check_convert_inputs
from quantkit.report.rounding import format_bytes

if TYPE_CHECKING:
    from quantkit.conversion import Conversion

EXAMPLE = "Example: quantkit convert MODEL-GPTQ --to compressed-tensors --output artifacts/model"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A GPTQ, AWQ, FP8 or compressed-tensors model: Hub id or folder."
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="compressed-tensors: the same codes; safetensors: the weights they stand for.",
        ),
    ],
    output: Annotated[str, typer.Option("--output", metavar="FOLDER", help="Folder to make.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="Of weights in safetensors: float32 (exact), float16, bfloat16.",
        ),
    ] = None,
    overwrite: OverwriteOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Write a quantized model in another format; its codes are not rounded again."""
    # What the files alone can refuse is answered before torch is loaded, which takes seconds.
    check_convert_inputs(source, to, Path(output), dtype, overwrite=bool(overwrite))
    with show_progress(quiet) as progress:
        made = quantkit.convert(
            source,
            to=to,
            output=output,
            **given(dtype=dtype, overwrite=overwrite, progress=progress),
        )
    return Reply(_document(made), _lines(made))


def _document(made: Conversion) -> dict[str, Any]:
    artifact = {**asdict(made.artifact), "folder": str(made.artifact.folder)}
    return {**asdict(made), "artifact": artifact}


def _lines(made: Conversion) -> list[Any]:
    artifact = made.artifact
    rows = (
        ("from", f"{made.source} ({made.source_format})"),
        ("to", f"{artifact.folder} ({artifact.format})"),
        ("layers", str(made.layers)),
        ("size", format_bytes(artifact.tensor_bytes)),
        ("bits per weight", f"{artifact.bits_per_weight:.2f}"),
    )
    return [make_table(rows), *(f"note: {note}" for note in made.notes)]
