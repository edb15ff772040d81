"""The safetensors writer against the safetensors library."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from quantkit.errors import OutputError, ResourceError
from quantkit.formats.shards import (
    DTYPE_NAMES,
    INDEX_NAME,
    TensorSpec,
    plan_shards,
    write_shards,
)

ALL_IN_ONE = 1 << 40


def _specs(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [
        TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def _write(folder: Path, tensors: dict[str, Tensor], limit: int = ALL_IN_ONE) -> dict[str, str]:
    return write_shards(folder, _specs(tensors), tensors.items(), limit)


def _tensors_of_every_dtype() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype, name in DTYPE_NAMES.items():
        values = torch.randint(0, 2, (3, 8), generator=generator)
        tensors[f"t.{name}"] = values.to(dtype)
    return tensors


def _same_bytes(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(
        first.contiguous().reshape(-1).view(torch.uint8),
        second.contiguous().reshape(-1).view(torch.uint8),
    )


def test_the_library_reads_back_every_dtype(tmp_path: Path) -> None:
    """safetensors finds the names, dtypes, shapes and bytes that were written."""
    tensors = _tensors_of_every_dtype()
    _write(tmp_path, tensors)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(_same_bytes(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as reader:
        assert reader.metadata() == {"format": "pt"}


def test_scalars_empty_and_strided_tensors_are_written(tmp_path: Path) -> None:
    """Shapes without dimensions or elements, and views, come back equal."""
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(12.0).reshape(3, 4).T,
        "sliced": torch.arange(20, dtype=torch.float32)[::2],
    }
    _write(tmp_path, tensors)
    found = load_file(tmp_path / "model.safetensors")
    assert all(_same_bytes(found[name], tensor) for name, tensor in tensors.items())


def test_bytes_in_pieces_equal_the_tensor(tmp_path: Path) -> None:
    """A tensor that is given as pieces of bytes makes the same file."""
    tensor = torch.arange(10, dtype=torch.int32)
    data = tensor.numpy().tobytes()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    spec = TensorSpec("t", "I32", (10,))
    first = write_shards(tmp_path / "a", [spec], [("t", tensor)], ALL_IN_ONE)
    second = write_shards(tmp_path / "b", [spec], [("t", [data[:7], data[7:]])], ALL_IN_ONE)
    assert first == second


def test_the_header_is_aligned_and_the_tensors_lie_without_gaps(tmp_path: Path) -> None:
    """The first tensor starts at a multiple of eight and offsets follow each other."""
    tensors = {"a": torch.zeros(5, dtype=torch.int8), "b": torch.zeros(3, dtype=torch.int8)}
    _write(tmp_path, tensors)
    data = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header["a"]["data_offsets"] == [0, 5]
    assert header["b"]["data_offsets"] == [5, 8]
    assert len(data) == 8 + length + 8


def test_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    """Every returned hash equals the hash of the bytes on the disk, the index included."""
    hashes = _write(tmp_path, _tensors_of_every_dtype(), limit=100)
    assert {path.name for path in tmp_path.iterdir()} == hashes.keys()
    for name, digest in hashes.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    """Equal tensors give equal files."""
    runs = []
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        runs.append(_write(tmp_path / run, _tensors_of_every_dtype(), limit=100))
    assert runs[0] == runs[1]


def test_shards_hold_every_tensor_once_and_respect_the_limit(tmp_path: Path) -> None:
    """The index names the file of each tensor; only a tensor larger than the limit exceeds it."""
    tensors = {f"t{index}": torch.full((10 + index,), float(index)) for index in range(7)}
    tensors["t3"] = torch.zeros(100)
    _write(tmp_path, tensors, limit=120)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file in files:
        found = load_file(tmp_path / file)
        assert set(found) == {name for name, place in index["weight_map"].items() if place == file}
        assert sum(t.nbytes for t in found.values()) <= 120 or list(found) == ["t3"]
        assert all(_same_bytes(found[name], tensors[name]) for name in found)


def test_a_tensor_is_never_misaligned() -> None:
    """A tensor that would not start at a multiple of its element size opens a new file."""
    specs = [TensorSpec("odd", "BF16", (3,)), TensorSpec("wide", "I64", (2,))]
    assert plan_shards(specs, ALL_IN_ONE) == ((specs[0],), (specs[1],))
    specs[0] = TensorSpec("even", "BF16", (4,))
    assert plan_shards(specs, ALL_IN_ONE) == ((specs[0], specs[1]),)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([("a", torch.zeros(2))], "b was announced"),
        ([("b", torch.zeros(2)), ("a", torch.zeros(2))], "a was announced, b"),
        ([("a", torch.zeros(3)), ("b", torch.zeros(2))], r"announced as F32 \[2\]"),
        ([("a", torch.zeros(2).half()), ("b", torch.zeros(2))], "float16"),
        ([("a", [b"1234"]), ("b", torch.zeros(2))], "has 8 bytes, 4 were given"),
        ([(name, torch.zeros(2)) for name in "abc"], "c was not announced"),
    ],
)
def test_contents_that_were_not_announced_leave_nothing(
    tmp_path: Path, given: list[tuple[str, Tensor]], message: str
) -> None:
    """A name, dtype, shape or size that differs from the header is refused and cleaned up."""
    specs = [TensorSpec("a", "F32", (2,)), TensorSpec("b", "F32", (2,))]
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path, specs, given, max_shard_bytes=8)
    assert list(tmp_path.iterdir()) == []


def test_nothing_has_its_final_name_before_all_is_written(tmp_path: Path) -> None:
    """While tensors are asked for, only temporary names exist; an interruption removes them."""
    specs = [TensorSpec(name, "F32", (2,)) for name in "abc"]
    seen = []

    def contents() -> Iterator[tuple[str, Tensor]]:
        for name in "ab":
            seen.append({path.suffix for path in tmp_path.iterdir()})
            yield name, torch.zeros(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, specs, contents(), max_shard_bytes=8)
    assert seen == [{".writing"}, {".writing"}]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    """A missing folder is the user's output that cannot be written, not a traceback."""
    with pytest.raises(OutputError, match="cannot write"):
        _write(tmp_path / "absent", {"a": torch.zeros(2)})


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from quantkit.errors import ResourceError
from quantkit.formats.shards import TensorSpec, write_shards

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
folder = Path(sys.argv[1])
specs = [TensorSpec("a", "F32", (1000,)), TensorSpec("b", "F32", (4000,))]
tensors = {"a": torch.zeros(1000), "b": torch.zeros(4000)}
try:
    write_shards(folder, specs, tensors.items(), 4000)
except ResourceError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    """When the second of two shards does not fit, the first is removed as well."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == ResourceError.exit_code, done.stderr
    assert "no space left while writing" in done.stdout
    assert list(tmp_path.iterdir()) == []
