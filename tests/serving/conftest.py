"""Small artifacts of every format, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import quantkit
from tests.pico_jobs import make_pico_job


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with one artifact of each format, rounded to the nearest."""
    recipe = make_pico_job(
        tmp_path_factory.mktemp("serving"),
        (
            {"format": "compressed-tensors"},
            {"format": "gguf", "type": "Q8_0"},
            {"format": "onnx", "precision": "int4"},
        ),
        quantize={"scheme": "w4a16", "group_size": 32, "method": "rtn"},
    )
    quantkit.quantize(recipe, gate=False, device="cpu")
    assert recipe.output is not None
    return Path(recipe.output)


@pytest.fixture(scope="session")
def with_fp8_cache(output: Path) -> Path:
    """A compressed-tensors folder with FP8 weights, and scales for an FP8 key/value cache."""
    recipe = make_pico_job(
        output.parent,
        output="fp8",
        quantize={"scheme": "fp8_dynamic", "method": "rtn", "kv_cache": "fp8"},
    )
    quantkit.quantize(recipe, gate=False, device="cpu")
    return output.parent / "fp8"


@pytest.fixture(scope="session")
def plain(output: Path) -> Path:
    """The 16-bit checkpoint that they were made from."""
    return output.parent / "model"


@pytest.fixture
def odd_place(output: Path, tmp_path: Path) -> Path:
    """The compressed-tensors folder under a name that a shell would take apart."""
    folder = tmp_path / 'it\'s "a" $HOME folder; echo'
    shutil.copytree(output / "compressed-tensors", folder)
    return folder
