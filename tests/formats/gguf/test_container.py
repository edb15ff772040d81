"""The writer and the reader of GGUF files against gguf-py and llama.cpp's own header reader."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from quantkit.errors import CheckpointError, OutputError, ResourceError
from quantkit.formats.gguf.container import open_gguf, read_tensor_rows
from quantkit.formats.gguf.header import (
    KIND_IDS,
    TYPES_BY_ID,
    Array,
    GgufSpec,
    MetadataValue,
    Value,
)
from quantkit.formats.gguf.writing import plan_parts, write_gguf
from quantkit.ggml_types import GGML_TYPES
from tests.formats.gguf.library import read_places

ALL_IN_ONE = 1 << 40
F32 = GGML_TYPES["F32"]
METADATA: dict[str, MetadataValue] = {
    "general.architecture": Value("string", "llama"),
    "u8": Value("uint8", 255),
    "i8": Value("int8", -128),
    "u16": Value("uint16", 65535),
    "i16": Value("int16", -5),
    "u32": Value("uint32", 2**32 - 1),
    "i32": Value("int32", -(2**31)),
    "u64": Value("uint64", 2**64 - 1),
    "i64": Value("int64", -(2**63)),
    "f32": Value("float32", 0.5),
    "f64": Value("float64", 1e-300),
    "yes": Value("bool", True),
    "no": Value("bool", False),
    "text": Value("string", "{{ Grüße }}\n"),
    "tokens": Array("string", ["a", "", "日本", "<0x0A>"]),
    "scores": Array("float32", np.array([0.5, -1.0, 3.0])),
    "types": Array("int32", [1, 3, -6]),
    "flags": Array("bool", [True, False]),
    "large": Array("uint64", [2**64 - 1, 0]),
}


def make_tensors() -> tuple[list[GgufSpec], dict[str, Tensor]]:
    """One tensor of each block type, and shapes of one to three dimensions."""
    generator = torch.Generator().manual_seed(0)
    specs = [GgufSpec(f"t.{name}", kind, (3, 512)) for name, kind in GGML_TYPES.items()]
    specs += [GgufSpec("vector", F32, (5,)), GgufSpec("stack", GGML_TYPES["Q8_0"], (2, 3, 64))]
    tensors = {
        spec.name: torch.randint(
            0, 256, (spec.rows, spec.row_bytes), generator=generator, dtype=torch.uint8
        )
        for spec in specs
    }
    return specs, tensors


def write(folder: Path, limit: int = ALL_IN_ONE) -> dict[str, str]:
    """Write METADATA and the tensors as `model`."""
    specs, tensors = make_tensors()
    return write_gguf(folder, "model", METADATA, specs, tensors.items(), limit)


def write_floats(folder: Path, names: str, limit: int = ALL_IN_ONE) -> None:
    """Write a tensor of 8 float32 for each letter."""
    specs = [GgufSpec(name, F32, (8,)) for name in names]
    contents = ((name, torch.full((1, 32), ord(name), dtype=torch.uint8)) for name in names)
    write_gguf(folder, "x", {}, specs, contents, limit)


def plain(value: MetadataValue) -> Any:
    return value.items if isinstance(value, Array) else value.content


def test_gguf_py_reads_what_we_write(tmp_path: Path) -> None:
    """Every kind of metadata and every block type, with the dimensions and the bytes."""
    write(tmp_path)
    specs, tensors = make_tensors()

    reader = gguf.GGUFReader(tmp_path / "model.gguf")

    for key, value in METADATA.items():
        assert reader.fields[key].contents() == plain(value), key
        assert int(reader.fields[key].types[-1]) == KIND_IDS[value.kind]
    assert [tensor.name for tensor in reader.tensors] == [spec.name for spec in specs]
    for tensor, spec in zip(reader.tensors, specs, strict=True):
        assert tensor.tensor_type.name == spec.kind.name
        assert tuple(int(size) for size in tensor.shape)[::-1] == spec.shape
        assert tensor.data.tobytes() == tensors[spec.name].numpy().tobytes()


def test_we_read_what_we_write(tmp_path: Path) -> None:
    """Metadata with its kinds, shapes, types and rows come back."""
    write(tmp_path)
    specs, tensors = make_tensors()

    found = open_gguf(tmp_path / "model.gguf")

    assert (found.version, found.alignment, found.parts) == (3, 32, (tmp_path / "model.gguf",))
    assert dict(found.metadata) == METADATA
    assert list(found.tensors) == [spec.name for spec in specs]
    for spec in specs:
        tensor = found.tensors[spec.name]
        assert (tensor.kind, tensor.shape, tensor.size) == (spec.kind, spec.shape, spec.size)
        assert torch.equal(read_tensor_rows(found, spec.name), tensors[spec.name])
    assert torch.equal(read_tensor_rows(found, "t.Q4_K", 1, 1), tensors["t.Q4_K"][1:2])
    with pytest.raises(ValueError, match="3 rows"):
        read_tensor_rows(found, "t.Q4_K", 2, 2)
    with pytest.raises(CheckpointError, match="no tensor 'absent'"):
        read_tensor_rows(found, "absent")


@pytest.mark.parametrize("alignment", [32, 64, 8])
def test_we_read_what_gguf_py_writes(tmp_path: Path, alignment: int) -> None:
    """With the alignment that the file asks for."""
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_custom_alignment(alignment)
    writer.add_context_length(4096)
    writer.add_token_list(["a", b"\xff", "c"])
    writer.add_float64("precise", 0.1)
    writer.add_array("numbers", [1, 2, 3])
    arrays = {
        "first": np.arange(10, dtype=np.float32).reshape(2, 5),
        "second": np.arange(7, dtype=np.float16),
        "third": np.arange(3, dtype=np.int64),
    }
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    found = open_gguf(path)

    assert found.alignment == alignment
    assert found.find("general.architecture") == "qwen3"
    assert found.find("qwen3.context_length") == 4096
    assert found.find("precise") == 0.1
    assert found.metadata["numbers"] == Array("int32", [1, 2, 3])
    tokens = found.find_array("tokenizer.ggml.tokens")
    assert tokens is not None
    assert tokens.items == ["a", "\udcff", "c"]
    assert found.find_array("precise") is None
    assert found.find("numbers") is None
    for name, array in arrays.items():
        assert found.tensors[name].shape == array.shape
        assert read_tensor_rows(found, name).numpy().tobytes() == array.tobytes()


def test_llama_cpp_finds_the_tensors_where_we_say(tmp_path: Path) -> None:
    """In a whole file and in each part of a split one."""
    write(tmp_path)
    write(tmp_path, limit=4000)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) > 3
    whole = open_gguf(tmp_path / "model.gguf")
    split = open_gguf(paths[0])
    for path in paths:
        found = whole if path.name == "model.gguf" else split
        ours = {name: own.start for name, own in found.tensors.items() if own.file == path}
        assert read_places(path) == ours


def test_tokens_that_are_not_utf_8_keep_their_bytes(tmp_path: Path) -> None:
    """Some vocabularies hold parts of characters."""
    tokens = Array("string", [b"\xe6\x97".decode("utf-8", "surrogateescape")])
    write_gguf(tmp_path, "x", {"tokens": tokens}, [], [], ALL_IN_ONE)

    assert b"\xe6\x97" in (tmp_path / "x.gguf").read_bytes()
    assert open_gguf(tmp_path / "x.gguf").metadata["tokens"] == tokens


def test_hashes_are_those_of_the_files_and_bytes_repeat(tmp_path: Path) -> None:
    """Pieces and whole tensors give the same bytes."""
    hashes = write(tmp_path, limit=3000)
    again = tmp_path / "again"
    again.mkdir()
    specs, tensors = make_tensors()
    pieces = ((name, (row.numpy().data for row in tensor)) for name, tensor in tensors.items())
    assert write_gguf(again, "model", METADATA, specs, pieces, 3000) == hashes
    for name, digest in hashes.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == set(hashes)


def test_split_files_carry_what_llama_cpp_asks_of_each(tmp_path: Path) -> None:
    """Numbers of the kinds that llama-model-loader.cpp demands; other metadata in the first."""
    hashes = write(tmp_path, limit=4000)
    count = len(hashes)
    for position, name in enumerate(sorted(hashes)):
        assert name == f"model-{position + 1:05d}-of-{count:05d}.gguf"
        fields = gguf.GGUFReader(tmp_path / name).fields
        assert fields["split.no"].contents() == position
        assert fields["split.count"].contents() == count
        assert fields["split.tensors.count"].contents() == len(make_tensors()[0])
        kinds = [fields[f"split.{key}"].types[-1].name for key in ("no", "count", "tensors.count")]
        assert kinds == ["UINT16", "UINT16", "INT32"]
        assert ("general.architecture" in fields) == (position == 0)


def test_parts_hold_no_more_than_their_limit() -> None:
    """A larger tensor gets a file of its own; the order stays."""
    specs = [
        GgufSpec(name, F32, (size,)) for name, size in zip("abcde", (8, 8, 99, 8, 1), strict=True)
    ]

    parts = plan_parts(specs, 64)

    assert [[spec.name for spec in part] for part in parts] == [["a", "b"], ["c"], ["d", "e"]]
    with pytest.raises(ValueError, match="at most 65535"):
        plan_parts([GgufSpec("a", F32, (8,))] * 65536, 1)


def test_we_read_the_parts_that_gguf_py_splits(tmp_path: Path) -> None:
    """The first part leads to the others."""
    writer = gguf.GGUFWriter(tmp_path / "m", "llama", split_max_tensors=2)
    for name in "abcde":
        writer.add_tensor(name, np.full(3, ord(name), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    found = open_gguf(tmp_path / "m-00001-of-00003.gguf")

    assert list(found.tensors) == list("abcde")
    assert len(found.parts) == 3
    assert read_tensor_rows(found, "e").view(torch.float32).tolist() == [[101.0] * 3]
    with pytest.raises(CheckpointError, match=r"part 2 of 3: name m-00001-of-00003\.gguf"):
        open_gguf(tmp_path / "m-00002-of-00003.gguf")


@pytest.mark.parametrize(
    ("specs", "metadata", "contents", "words"),
    [
        (["a", "a"], {}, {}, "same name"),
        (["n" * 64], {}, {}, "1 to 63"),
        ([""], {}, {}, "1 to 63"),
        (["a"], {}, {}, "a was announced, None was given"),
        (["a"], {}, {"b": b"12345678"}, "a was announced, b was given"),
        (["a"], {}, {"a": b"1234567"}, "8 bytes, 7 were given"),
        (["a"], {}, {"a": b"12345678", "b": b""}, "b was not announced"),
        ([], {"k": Value("uint8", 256)}, {}, "metadata k"),
        ([], {"k": Value("uint32", -1)}, {}, "metadata k"),
        ([], {"k": Value("uint32", 1.5)}, {}, "metadata k"),
        ([], {"k": Value("float32", 1e39)}, {}, "metadata k"),
        ([], {"k": Value("bool", 2)}, {}, "metadata k"),
        ([], {"k": Value("int32", "5")}, {}, "metadata k"),
        ([], {"k": Value("string", 5)}, {}, "metadata k"),
        ([], {"k": Value("word", 5)}, {}, "metadata k"),
        ([], {"k": Array("int8", [1, 128])}, {}, "metadata k"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_leaves_nothing(
    tmp_path: Path, specs: list[str], metadata: Any, contents: dict[str, bytes], words: str
) -> None:
    """A mistake of the caller is not written."""
    announced = [GgufSpec(name, F32, (2,)) for name in specs]
    given = [(name, [data]) for name, data in contents.items()]

    with pytest.raises(ValueError, match=words):
        write_gguf(tmp_path, "x", metadata, announced, given, ALL_IN_ONE)

    assert list(tmp_path.iterdir()) == []


def test_names_rows_and_dimensions_are_checked(tmp_path: Path) -> None:
    """A name with a folder, floating-point rows, half a block, five dimensions."""
    rows = [("a", torch.zeros(1, 2))]
    with pytest.raises(ValueError, match="no name of a file"):
        write_gguf(tmp_path, "a/b", {}, [], [], ALL_IN_ONE)
    with pytest.raises(ValueError, match=r"uint8, not torch\.float32"):
        write_gguf(tmp_path, "x", {}, [GgufSpec("a", F32, (2,))], rows, ALL_IN_ONE)
    with pytest.raises(ValueError, match="not whole blocks"):
        write_gguf(tmp_path, "x", {}, [GgufSpec("a", GGML_TYPES["Q4_K"], (2, 32))], [], ALL_IN_ONE)
    with pytest.raises(ValueError, match="more than 4 dimensions"):
        write_gguf(tmp_path, "x", {}, [GgufSpec("a", F32, (1,) * 5)], [], ALL_IN_ONE)
    assert list(tmp_path.iterdir()) == []


def test_nothing_appears_before_everything_is_written(tmp_path: Path) -> None:
    """While tensors are asked for, only temporary names exist; an interruption removes them."""
    seen = []

    def contents() -> Iterator[tuple[str, list[bytes]]]:
        for name in "ab":
            seen.append({path.suffix for path in tmp_path.iterdir()})
            yield name, [bytes(8)]
        raise KeyboardInterrupt

    specs = [GgufSpec(name, F32, (2,)) for name in "abc"]
    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path, "x", {}, specs, contents(), 32)
    assert seen == [{".writing"}, {".writing"}]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_an_output_error(tmp_path: Path) -> None:
    """One line, no traceback."""
    with pytest.raises(OutputError, match="cannot write"):
        write(tmp_path / "absent")


LIMITED = """
import resource, signal, sys
from pathlib import Path
from quantkit.errors import ResourceError
from quantkit.formats.gguf.header import GgufSpec
from quantkit.formats.gguf.writing import write_gguf
from quantkit.ggml_types import GGML_TYPES

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
specs = [GgufSpec("a", GGML_TYPES["F32"], (1000,)), GgufSpec("b", GGML_TYPES["F32"], (4000,))]
contents = [("a", [bytes(4000)]), ("b", [bytes(16000)])]
try:
    write_gguf(Path(sys.argv[1]), "x", {}, specs, contents, 4000)
except ResourceError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    """When the second of two parts does not fit, the first is removed as well."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == ResourceError.exit_code, done.stderr
    assert "no space left while writing" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_types_have_the_sizes_of_gguf_py() -> None:
    """Every type that gguf-py knows; its Q8_1 has two float32 where ggml has two float16."""
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        ours = TYPES_BY_ID[int(kind)]
        assert (ours.name, ours.block) == (kind.name, block)
        assert ours.block_bytes == (36 if kind.name == "Q8_1" else size)


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    """A missing part, another model's part, a name that is not a part's, a link out."""
    write_floats(tmp_path, "abc", limit=32)
    first, second, third = sorted(tmp_path.iterdir())
    kept = second.read_bytes()

    second.unlink()
    with pytest.raises(CheckpointError, match=r"x-00002-of-00003\.gguf is missing"):
        open_gguf(first)
    second.write_bytes(third.read_bytes())
    with pytest.raises(CheckpointError, match="does not say that it is part 2"):
        open_gguf(first)
    second.write_bytes(kept.replace(b"b", b"a"))
    with pytest.raises(CheckpointError, match="tensor 'a' is in"):
        open_gguf(first)
    second.write_bytes(kept)
    renamed = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"rename it to NAME-00001-of-00003\.gguf"):
        open_gguf(renamed)
    inside = tmp_path / "inside"
    inside.mkdir()
    renamed.rename(inside / first.name)
    (inside / second.name).symlink_to(second)
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        open_gguf(inside / first.name)


def test_number_of_tensors_of_all_parts_is_checked(tmp_path: Path) -> None:
    """llama.cpp calls such a model corrupted."""
    write_floats(tmp_path, "ab", limit=32)
    for path in tmp_path.iterdir():
        key = b"split.tensors.count" + (5).to_bytes(4, "little")
        path.write_bytes(path.read_bytes().replace(key + b"\2", key + b"\3"))

    with pytest.raises(CheckpointError, match="have 3 tensors, they have 2"):
        open_gguf(tmp_path / "x-00001-of-00002.gguf")


def test_file_that_shrinks_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    """Rows are read, not mapped: no crash of the process."""
    write_floats(tmp_path, "ab")
    path = tmp_path / "x.gguf"
    found = open_gguf(path)
    path.write_bytes(path.read_bytes()[:-1])

    assert read_tensor_rows(found, "a").shape == (1, 32)
    with pytest.raises(CheckpointError, match="ends within tensor 'b'"):
        read_tensor_rows(found, "b")
