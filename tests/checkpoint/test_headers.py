from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from quantkit.checkpoint.headers import read_header, read_index, read_json
from quantkit.errors import CheckpointError


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_header_says_where_every_tensor_lies(tmp_path: Path) -> None:
    """Reading `size` bytes from `start` gives the tensor that the safetensors library wrote."""
    path = tmp_path / "x.safetensors"
    tensors: dict[str, np.ndarray] = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(5, dtype=np.int8),
        "empty": np.zeros((0, 4), dtype=np.float16),
        "scalar": np.array(3.5),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    raw = path.read_bytes()

    infos = read_header(path)

    assert infos.keys() == tensors.keys()
    for name, expected in tensors.items():
        info = infos[name]
        found = np.frombuffer(raw[info.start : info.start + info.size], dtype=expected.dtype)
        assert info.shape == expected.shape
        assert np.array_equal(found.reshape(info.shape), expected)


def many_keys(count: int) -> bytes:
    """So many keys, the last one twice."""
    pairs = ", ".join(f'"{number}": 1' for number in (*range(count), count - 1))
    return f"{{{pairs}}}".encode()


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry("F32", [2], 0, 8)}, b"\0" * 7, "cut short"),
        ({"a": entry("F32", [2], 0, 8)}, b"\0" * 9, "1 bytes behind"),
        ({"a": entry("F32", [2], 0, 4)}, b"\0" * 4, "takes 8 bytes"),
        ({"a": entry("F32", [2], 8, 0)}, b"", "takes 8 bytes"),
        ({"a": entry("F33", [2], 0, 8)}, b"\0" * 8, "'F33', which is unknown"),
        ({"a": entry("F32", [-2, -1], 0, 8)}, b"\0" * 8, "shape"),
        ({"a": entry("F32", [True], 0, 4)}, b"\0" * 4, "shape"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4, "offsets"),
        ({"a": [1]}, b"", "not described"),
        ({"a": entry("I8", [4], 0, 4), "b": entry("I8", [4], 2, 6)}, b"\0" * 6, "overlaps"),
        ({"a": entry("I8", [4], 0, 4), "b": entry("I8", [4], 5, 9)}, b"\0" * 9, "gap"),
        (b'{"a": 1, "a": 2}', b"", "'a' twice"),
        # Neither costs time that grows with the square of its length.
        (many_keys(100_000), b"", "'99999' twice"),
        ({"a": entry("F32", [3] * 1_000_000, 0, 8)}, b"\0" * 8, "shape"),
        ({"a": entry("I8", [1 << 70, 0], 0, 0)}, b"", "shape"),
        (b'{"a": ', b"", "not valid JSON"),
        (b"\xff\xfe\xfd\xfc", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b"[]", b"", "not a JSON object"),
    ],
)
def test_damaged_header_is_named_in_one_line(
    tmp_path: Path, header: Any, data: bytes, words: str
) -> None:
    """The line names the file and what is wrong with it."""
    path = write_raw(tmp_path / "x.safetensors", header, data)

    with pytest.raises(CheckpointError) as caught:
        read_header(path)

    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [3, 1 << 40, (1 << 64) - 1])
def test_header_longer_than_its_file_is_refused_before_memory_is_taken(
    tmp_path: Path, length: int
) -> None:
    """The announced length is compared with the file before anything is read."""
    path = write_raw(tmp_path / "x.safetensors", b"{}", length=length)

    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"\0\0\0"])
def test_file_without_a_header_is_refused(tmp_path: Path, content: bytes) -> None:
    """An empty or tiny file, as an interrupted download leaves it."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_header(path)


@settings(max_examples=150, deadline=None, database=None)
@given(st.binary(max_size=40), st.integers(0, 60), st.integers(0, 255))
def test_no_damage_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, extra: bytes, position: int, byte: int
) -> None:
    """Whatever is changed in a file, it is accepted only if the safetensors library accepts it."""
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    write_raw(path, {"a": entry("I8", [4], 0, 4)}, b"\1\2\3\4")
    raw = bytearray(path.read_bytes() + extra)
    raw[min(position, len(raw) - 1)] = byte
    path.write_bytes(raw)

    try:
        names = sorted(read_header(path))
    except CheckpointError:
        return
    try:
        with safe_open(path, "numpy") as library:
            assert sorted(library.keys()) == names
    except SafetensorError as error:
        pytest.fail(f"accepted what the library refuses: {error}")


@pytest.mark.parametrize(
    ("document", "words"),
    [({}, "no weight_map"), ({"weight_map": {"a": 3}}, "not a name"), ([], "not a JSON object")],
)
def test_index_that_is_none_is_refused(tmp_path: Path, document: Any, words: str) -> None:
    """An index must map tensor names to file names."""
    path = tmp_path / "index.json"
    path.write_text(json.dumps(document))

    with pytest.raises(CheckpointError, match=words):
        read_index(path)


def test_missing_and_unreadable_json_are_told_apart(tmp_path: Path) -> None:
    """A folder in the place of a file is not a missing file."""
    with pytest.raises(CheckpointError, match="is missing"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_json(tmp_path)
