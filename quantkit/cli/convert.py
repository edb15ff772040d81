"""`quantkit convert`: a checkpoint into another format, without data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import quantkit
from quantkit.cli.console import Reply, show_progress
from quantkit.cli.layout import Cell, Line, Sentence, make_table
from quantkit.cli.options import JsonOption, OverwriteOption, QuietOption, given
from quantkit.cli.process import load_for_good
from quantkit.inputs import ConvertOptions, check_convert_inputs
from quantkit.report.rounding import format_bytes

if TYPE_CHECKING:
    from quantkit.conversion import Conversion

EXAMPLE = "Example: quantkit convert MODEL-GPTQ --to compressed-tensors --output artifacts/model"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A model, plain or GPTQ, AWQ, FP8, ModelOpt, compressed-tensors: Hub id or "
            "folder; or a GGUF file.",
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="compressed-tensors: the same codes; safetensors: the weights they stand for; "
            "gguf:TYPE, for instance gguf:Q4_K_M: of plain weights, or of another GGUF file.",
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
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="The original of a GGUF file, for its config and tokenizer, for --to safetensors.",
        ),
    ] = None,
    imatrix: Annotated[
        str | None,
        typer.Option(
            "--imatrix",
            metavar="FILE",
            help="llama.cpp's importance matrix, .gguf or .dat, for --to gguf:TYPE.",
        ),
    ] = None,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(
            "--pre-tokenizer",
            metavar="NAME",
            help="llama.cpp's name of it, where it is not recognised, for --to gguf:TYPE.",
        ),
    ] = None,
    requantize: Annotated[
        bool | None,
        typer.Option(
            "--requantize",
            help="Round the weights of a quantized GGUF file a second time, for --to gguf:TYPE.",
        ),
    ] = None,
    overwrite: OverwriteOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Write a model in another format, without data; codes of a quantized one are kept."""
    # What the files alone can refuse is answered before torch is loaded, which takes seconds.
    options = ConvertOptions(dtype, base, imatrix, pre_tokenizer, bool(requantize))
    check_convert_inputs(source, to, Path(output), options, overwrite=bool(overwrite))
    chosen = given(
        dtype=dtype,
        base=base,
        imatrix=imatrix,
        pre_tokenizer=pre_tokenizer,
        requantize=requantize,
        overwrite=overwrite,
    )
    with show_progress(quiet) as progress:
        made = load_for_good(lambda: quantkit.convert)(
            source,
            to=to,
            output=output,
            **chosen,
            **given(progress=progress),
        )
    return Reply(_document(made), _lines(made))


def _document(made: Conversion) -> dict[str, Any]:
    artifact = {**asdict(made.artifact), "folder": str(made.artifact.folder)}
    return {**asdict(made), "artifact": artifact}


def _lines(made: Conversion) -> list[Line]:
    artifact = made.artifact
    rows = (
        ("from", Cell(f"{made.source} ({made.source_format})", whole=True)),
        ("to", Cell(f"{artifact.path} ({artifact.file_type or artifact.format})", whole=True)),
        *((("layers", str(made.layers)),) if made.layers else ()),
        ("size", format_bytes(artifact.tensor_bytes)),
        ("bits per weight", f"{artifact.bits_per_weight:.2f}"),
    )
    return [make_table(rows), *(Sentence("note: ", note) for note in made.notes)]
