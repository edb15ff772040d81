"""Importance matrices of llama.cpp, in both forms."""

from __future__ import annotations

from pathlib import Path

import torch

from quantkit.formats.gguf.imatrix import Imatrix, ImatrixEntry, read_imatrix, write_imatrix
from tests.fuzzing.damage import BYTES, set_number
from tests.fuzzing.reader import Reader


def _build(folder: Path) -> None:
    entry = ImatrixEntry(torch.ones(2, 8), torch.tensor([5, 0]))
    other = ImatrixEntry(torch.ones(1, 4), torch.tensor([512]))
    imatrix = Imatrix({"blk.0.ffn_up.weight": entry, "output.weight": other}, ("text",), 1)
    for name, form in (("gguf", "gguf"), ("dat", "dat")):
        (folder / name).mkdir()
        # Which form a file has is seen from its beginning.
        write_imatrix(folder / name / "imatrix.gguf", imatrix, form)


def _read(folder: Path) -> object:
    found = read_imatrix(folder / "imatrix.gguf")
    return [
        found.find_importance(name, entry.sums.shape[1]) for name, entry in found.entries.items()
    ]


READERS = (
    Reader(
        name="imatrix",
        build=_build,
        damages={
            "imatrix.gguf": (set_number(within=600), set_number(within=60, widths=(4,)), *BYTES)
        },
        read=_read,
    ),
)
