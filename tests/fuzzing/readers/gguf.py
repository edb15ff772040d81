"""GGUF files of models, which `inspect` and `verify` read, the latter with every weight."""

from __future__ import annotations

import shutil
from pathlib import Path

import quantkit
from tests.fuzzing.corpus import pico_gguf
from tests.fuzzing.damage import BYTES, at_start, flip, insert, overwrite, set_number
from tests.fuzzing.reader import Reader

_HEADER = 16_000
"""Bytes within which the metadata and the tensors' descriptions lie."""

_HEADERS = (
    set_number(within=_HEADER),
    set_number(within=64),
    at_start(flip, _HEADER),
    at_start(insert, _HEADER),
    at_start(overwrite, _HEADER),
)


def _build(folder: Path) -> None:
    for file_type in ("Q8_0", "Q4_K_M"):
        (folder / file_type).mkdir()
        shutil.copyfile(pico_gguf(file_type), folder / file_type / "model.gguf")


def _read(folder: Path) -> object:
    quantkit.inspect(folder / "model.gguf")
    return quantkit.verify(folder / "model.gguf")


READERS = (
    Reader(
        name="gguf",
        build=_build,
        damages={"model.gguf": (*_HEADERS, *_HEADERS, *BYTES)},
        read=_read,
    ),
)
