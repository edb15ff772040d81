"""A machine that is in trouble says nothing about an artifact: no verdict comes of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import ResourceError
from quantkit.judging.side_files import compare_side_files
from quantkit.judging.suspicions import compare_hashes
from quantkit.judging.weights import compare_weights
from quantkit.running import silent
from tests.formats.cases import UNLIKE, make_case
from tests.helpers import make_pico_model, no_more_files


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An original, and an artifact of it."""
    root = tmp_path_factory.mktemp("trouble")
    model = make_pico_model(root / "model", hidden=128, intermediate=256, kv_heads=4)
    make_case(model, UNLIKE).write(root / "artifact")
    return model, root / "artifact"


Comparison = Callable[[], object]


def of_weights(model: Path, artifact: Path) -> Comparison:
    baseline = open_checkpoint(resolve_source(str(model)))
    return lambda: compare_weights(baseline, artifact, silent).suspicions


def of_hashes(_: Path, artifact: Path) -> Comparison:
    path = artifact / "model.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return lambda: compare_hashes(artifact, {path.name: digest})


def of_side_files(model: Path, _: Path) -> Comparison:
    return lambda: compare_side_files(model, [model])


@pytest.mark.parametrize("prepare", [of_weights, of_hashes, of_side_files])
def test_too_many_open_files_are_no_finding(
    folders: tuple[Path, Path], prepare: Callable[[Path, Path], Comparison]
) -> None:
    """The same comparison finds nothing where files can be opened."""
    compare = prepare(*folders)
    assert compare() == ()

    # What no reader caught, the command line takes for the same.
    with no_more_files(), pytest.raises((ResourceError, OSError), match="oo many open files"):
        compare()

    assert compare() == ()
