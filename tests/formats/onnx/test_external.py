"""The file beside a graph: places, bytes, and what happens when they do not fit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from quantkit.formats.onnx.external import lay_out, write_tensors

TENSORS = {
    "small": torch.arange(3),
    "large": torch.arange(2048, dtype=torch.float32).reshape(2, 1024),
    "half": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    "none": torch.empty(0, 4, dtype=torch.uint8),
}
DTYPES = {"small": "INT64", "large": "FLOAT", "half": "BFLOAT16", "none": "UINT8"}
PLACES = lay_out((name, DTYPES[name], tuple(each.shape)) for name, each in TENSORS.items())


def test_large_tensors_start_at_a_page(tmp_path: Path) -> None:
    """So that readers can map them; small ones at a multiple of 64 bytes."""
    digest = write_tensors(tmp_path / "data", PLACES, TENSORS.values())

    data = (tmp_path / "data").read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest
    assert [place.offset for place in PLACES] == [0, 4096, 12288, 12352]
    for place, tensor in zip(PLACES, TENSORS.values(), strict=True):
        stored = data[place.offset : place.offset + place.size]
        assert stored == bytes(tensor.flatten().view(torch.uint8).tolist())


@pytest.mark.parametrize("change", ["dtype", "shape", "missing", "extra"])
def test_other_tensors_than_announced_leave_nothing_behind(tmp_path: Path, change: str) -> None:
    """A file whose tensors are not where the graph says would be read as garbage."""
    tensors = list(TENSORS.values())
    if change == "dtype":
        tensors[1] = tensors[1].half()
    elif change == "shape":
        tensors[1] = tensors[1].T
    elif change == "missing":
        tensors.pop()
    else:
        tensors.append(tensors[0])

    with pytest.raises(ValueError, match="tensor"):
        write_tensors(tmp_path / "data", PLACES, tensors)

    assert not list(tmp_path.iterdir())
