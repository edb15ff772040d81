"""Real files that several readers start from, each made once a process."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import quantkit
from tests.helpers import make_pico_model


@cache
def root() -> Path:
    """A folder for them, which goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="quantkit-fuzzing-")).resolve()
    return folder


@cache
def pico_model(shards: int = 1) -> Path:
    """A decoder of two blocks with a tokenizer; vocabulary and matrices as small as they can be."""
    place = root() / f"model-{shards}"
    return make_pico_model(place, hidden=32, intermediate=32, heads=2, kv_heads=1, shards=shards)


@cache
def pico_gguf(file_type: str) -> Path:
    """The same as a GGUF file of a mix of types."""
    place = root() / f"gguf-{file_type}"
    quantkit.convert(pico_model(), to=f"gguf:{file_type}", output=place)
    return next(place.rglob("*.gguf"))


def copying(**files: Callable[[], Path]) -> Callable[[Path], None]:
    """Make a `build` that has one sample for each name: a copied folder, or a folder of a file."""

    def build(folder: Path) -> None:
        for name, find in files.items():
            source = find()
            if source.is_dir():
                shutil.copytree(source, folder / name)
            else:
                (folder / name).mkdir()
                shutil.copyfile(source, folder / name / source.name)

    return build
