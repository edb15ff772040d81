"""`quantkit verify`: is an artifact sound, and who can serve it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

import quantkit
from quantkit.cli.console import Reply
from quantkit.cli.layout import Cell, Line, Sentence, make_table
from quantkit.cli.options import JsonOption, QuietOption, check_there
from quantkit.report.rounding import format_percent

if TYPE_CHECKING:
    from quantkit.formats.comparison import Comparison
    from quantkit.formats.runtimes import RuntimeSupport
    from quantkit.formats.verify import Verification

EXAMPLE = "Example: quantkit verify artifacts/model-awq4 --against MODEL"

_MOST_NAMES = 5


def verify(
    artifact: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT", help="Folder of a quantized model, its output, a GGUF or ONNX file."
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="BASE", help="Compare with the original: Hub id or folder."
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Check that an artifact is well-formed, complete and finite, and say which runtimes serve it.

    Reads every tensor; works on anybody's compressed-tensors folder, GGUF or ONNX file and on
    plain checkpoints.
    """
    check_there(artifact)
    found = quantkit.verify(artifact, against=against)
    document = {
        **asdict(found),
        "folder": str(found.folder),
        "file": None if found.file is None else str(found.file),
    }
    return Reply(document, _lines(found), exit_code=2 if found.problems else 0)


def _lines(found: Verification) -> list[Line]:
    rows = (
        ("folder", Cell(str(found.folder), whole=True)),
        *((("file", Cell(found.file.name, whole=True)),) if found.file is not None else ()),
        ("format", found.format),
        ("scheme", found.scheme),
        *((("kv cache", found.kv_cache),) if found.kv_cache != "none" else ()),
        ("tensors", f"{found.tensors}, {found.layers} quantized layers"),
    )
    count = len(found.problems)
    verdict = f"{count} problem{'s' if count != 1 else ''} found" if count else "no problem found"
    return [
        make_table(rows),
        "",
        make_table(_show_runtimes(found.runtimes), has_titles=True),
        *([] if found.comparison is None else ["", *_compare(found.comparison)]),
        "",
        *(Sentence("note: ", note) for note in found.notes),
        *(Sentence("problem: ", problem) for problem in found.problems),
        verdict,
    ]


def _show_runtimes(runtimes: Sequence[RuntimeSupport]) -> Iterator[tuple[str, str, str, str]]:
    """One row for each answer, the first with the runtime and what all of them come to."""
    yield "runtime", "serves it", "", ""
    for support in runtimes:
        first: tuple[str, str] = (support.runtime, support.serves)
        for answer in support.answers or (None,):
            if answer is None:
                yield (*first, "", "")
                continue
            source = f"({answer.source})" if answer.source else ""
            words = " ".join(filter(None, (answer.words, source)))
            yield (*first, f"{answer.what}: {answer.serves}", words)
            first = ("", "")


def _compare(comparison: Comparison) -> list[Line]:
    """The figures of a comparison, and what is worth a name."""
    changed, folded = (
        list(comparison.changed),
        [layer for layer in comparison.layers if layer.folded],
    )
    rows = [
        ("compared with", comparison.base),
        ("equal tensors", str(comparison.equal)),
        ("changed tensors", _shorten(changed)),
        ("largest error", f"{format_percent(comparison.largest_error)} of a layer's norm"),
    ]
    if folded:
        how = ", ".join(sorted({str(layer.folded).rpartition(".")[2] for layer in folded}))
        rows.append(("folded scales", f"{len(folded)} layers, taken out by: {how}"))
    return [make_table(rows)]


def _shorten(names: list[str]) -> str:
    if len(names) <= _MOST_NAMES:
        return ", ".join(names) or "none"
    return f"{', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES} more"
