"""`quantkit inspect`: what is in an artifact."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

import quantkit
from quantkit.cli.console import Reply
from quantkit.cli.layout import Cell, Line, Sentence, make_table
from quantkit.cli.options import JsonOption, QuietOption, check_there
from quantkit.report.rounding import format_bytes

if TYPE_CHECKING:
    from quantkit.formats.inspected import InspectedLayer, Inspection

EXAMPLE = "Example: quantkit inspect artifacts/model-awq4"


def inspect(
    artifact: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT", help="Folder of a quantized model, its output, a GGUF or ONNX file."
        ),
    ],
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Show what is in an artifact: schemes, sizes, bits per weight, and what is wrong with it.

    Reads the config and the headers only; works on anybody's compressed-tensors folder, GGUF or
    ONNX file.
    """
    check_there(artifact)
    found = quantkit.inspect(artifact)
    document = {
        **asdict(found),
        "folder": str(found.folder),
        "file": None if found.file is None else str(found.file),
    }
    return Reply(document, _lines(found), exit_code=2 if found.problems else 0)


def _lines(found: Inspection) -> list[Line]:
    tensors = ", ".join(f"{count} x {dtype}" for dtype, count in found.tensors.items())
    layers = Counter(_storage(layer) for layer in found.layers)
    rows = (
        ("folder", Cell(str(found.folder), whole=True)),
        ("format", found.format),
        ("architecture", found.architecture or "not named"),
        ("scheme", found.scheme),
        ("weights", f"{found.parameters:,}"),
        ("size", format_bytes(found.tensor_bytes)),
        ("bits per weight", f"{found.bits_per_weight:.2f}"),
        ("tensors", tensors),
        *(("matrices", f"{count} x {storage}") for storage, count in layers.most_common()),
        *((("kv cache", found.kv_cache),) if found.kv_cache != "none" else ()),
        *found.details.items(),
        ("verdict", found.verdict or "none recorded"),
    )
    problems = (Sentence("problem: ", problem) for problem in found.problems)
    return [make_table(rows), *problems]


def _storage(layer: InspectedLayer) -> str:
    if layer.scheme == "none":
        return f"{layer.bits}-bit floating point"
    if layer.group_size is not None:
        return f"{layer.scheme}, group size {layer.group_size}"
    shared = {"channel": "row", "block": "block of 128 x 128"}
    return f"{layer.scheme}, one scale a {shared.get(layer.sharing, layer.sharing)}"
