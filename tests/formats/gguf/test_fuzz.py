"""Damaged and hostile GGUF files and importance matrices: one line each, at once, in our tree."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import torch

from quantkit.errors import CalibrationError, CheckpointError
from quantkit.formats.gguf.container import open_gguf, read_tensor_rows
from quantkit.formats.gguf.header import Array, GgufSpec, Value
from quantkit.formats.gguf.imatrix import (
    Form,
    Imatrix,
    ImatrixEntry,
    read_imatrix,
    write_imatrix,
)
from quantkit.formats.gguf.writing import write_gguf
from quantkit.ggml_types import GGML_TYPES
from tests.formats.gguf.damage import HUGE, try_all
from tests.formats.gguf.library import read_places


def text(word: bytes) -> bytes:
    return struct.pack("<Q", len(word)) + word


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def compose(
    entries: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    counts: tuple[int, int] | None = None,
    version: int = 3,
    magic: bytes = b"GGUF",
) -> bytes:
    """A file in the order of the format; `counts` lies about tensors and entries."""
    entries, tensors = entries or [], tensors or []
    tensor_count, entry_count = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, tensor_count, entry_count)
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


ONE = bytes(32)
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the magic takes 4 bytes, 0 are left"),
    "short": (b"GGUF\3\0", "the version takes 4 bytes, 2 are left"),
    "magic": (compose(magic=b"GGUG"), "begins with b'GGUG'"),
    "old": (compose(magic=b"tjgg"), "came before GGUF"),
    "endian": (compose(version=3 << 24), "big-endian"),
    "version 1": (compose(version=1), "version 1;"),
    "version 0": (compose(version=0), "version 0;"),
    "version 4": (compose(version=4), "version 4;"),
    "key twice": (compose([entry(b"k", 0, b"\1")] * 2), "metadata 'k' is given twice"),
    "empty key": (compose([entry(b"", 0, b"\1")]), "no name"),
    "key bytes": (compose([entry(b"\xff\n", 0, b"\1")]), "no name"),
    "kind": (compose([entry(b"k", 13, b"\1")]), "metadata 'k' has the kind 13"),
    "nested": (compose([entry(b"k", 9, struct.pack("<IQ", 9, 1))]), "array of arrays"),
    "items": (compose([entry(b"k", 9, struct.pack("<IQ", 4, 99))]), "99 items of metadata 'k'"),
    "value": (compose([entry(b"k", 8, struct.pack("<Q", 99))]), "metadata 'k' takes 99 bytes"),
    "alignment 0": (compose([entry(b"general.alignment", 4, bytes(4))]), "power of 2"),
    "alignment 48": (compose([entry(b"general.alignment", 4, b"\x30\0\0\0")]), "power of 2"),
    "alignment kind": (compose([entry(b"general.alignment", 8, text(b"32"))]), "power of 2"),
    "tensor twice": (compose([], [tensor(b"t", (8,))] * 2, ONE), "tensor 't' is given twice"),
    "long name": (compose([], [tensor(b"t" * 64, (8,))], ONE), "longer than 63"),
    "dimensions": (compose([], [tensor(b"t", (1,) * 5)], ONE), "5 dimensions"),
    "type": (compose([], [tensor(b"t", (8,), 99)], ONE), "type 99, which is not known"),
    "removed": (compose([], [tensor(b"t", (8,), 31)], ONE), "type 31, which was removed"),
    "columns": (compose([], [tensor(b"t", (31,), 2)], ONE), "31 columns"),
    "no weights": (compose([], [tensor(b"t", (0, 1 << 62))], ONE), "no weights"),
    "scalar": (compose([], [tensor(b"t", (), 2)], ONE), "1 columns"),
    "offset": (compose([], [tensor(b"t", (8,), 0, 8)], ONE + ONE), "'t' follows a gap"),
    "overlap": (
        compose([], [tensor(b"t", (8,)), tensor(b"u", (8,))], ONE + ONE),
        "'u' overlaps the one before it",
    ),
    "cut": (compose([], [tensor(b"t", (8,))], ONE[1:]), "cut short: tensor 't' ends at byte 96"),
    "split text": (compose([entry(b"split.count", 8, text(b"2"))]), "'split.count' is not a count"),
    "split name": (compose([entry(b"split.count", 2, b"\2\0")]), "part 1 of 2, but its name"),
    **{
        f"{what} {count}": made
        for count in HUGE
        for what, made in {
            "tensors": (compose(counts=(count, 0)), f"{count} tensors are claimed"),
            "entries": (compose(counts=(0, count)), f"{count} metadata entries are claimed"),
            "key": (compose([struct.pack("<Q", count) + bytes(9)]), f"takes {count} bytes"),
            "array": (compose([entry(b"k", 9, struct.pack("<IQ", 0, count))]), f"{count} items"),
            "strings": (compose([entry(b"k", 9, struct.pack("<IQ", 8, count))]), f"{count} items"),
            "shape": (compose([], [tensor(b"t", (8, count))], ONE), "cut short: tensor 't'"),
            "offsets": (compose([], [tensor(b"t", (8,), 0, count)], ONE), "follows a gap"),
        }.items()
    },
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named_in_one_line(tmp_path: Path, case: str) -> None:
    """The line names the file, what is wrong and where; nothing is allocated for a false claim."""
    content, words = DAMAGED[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)

    with pytest.raises(CheckpointError) as caught:
        open_gguf(path)

    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    """A missing file, a folder, and a pipe, which would block a reader for ever."""
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(CheckpointError, match="is missing"):
        open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(CheckpointError, match="is not a file"):
        open_gguf(tmp_path)
    with pytest.raises(CheckpointError, match="is not a file"):
        open_gguf(tmp_path / "pipe.gguf")


def test_header_has_a_limit_of_its_own(tmp_path: Path) -> None:
    """A sparse file of terabytes justifies no string of terabytes."""
    path = tmp_path / "x.gguf"
    path.write_bytes(compose([entry(b"k", 8, struct.pack("<Q", 1 << 40))]))
    os.truncate(path, 1 << 41)

    with pytest.raises(CheckpointError, match="goes beyond the 134217728 bytes that are read"):
        open_gguf(path)


def sound_gguf(folder: Path) -> bytes:
    kinds = [GGML_TYPES[name] for name in ("F32", "Q8_0", "Q4_K")]
    specs = [GgufSpec(f"t.{kind.name}", kind, (2, 256)) for kind in kinds]
    metadata = {
        "general.architecture": Value("string", "llama"),
        "general.alignment": Value("uint32", 32),
        "tokens": Array("string", ["a", "bc", ""]),
        "scores": Array("float32", [0.0, 1.0]),
        "yes": Value("bool", True),
    }
    contents = [(spec.name, [bytes(spec.size)]) for spec in specs]
    write_gguf(folder, "sound", metadata, specs, contents, 1 << 40)
    return (folder / "sound.gguf").read_bytes()


def test_random_damage_is_refused_or_llama_cpp_reads_the_file_too(tmp_path: Path) -> None:
    """Whatever is accepted has its tensors where llama.cpp sees them, and rows can be read."""

    def read(path: Path) -> None:
        found = open_gguf(path)
        for name in found.tensors:
            read_tensor_rows(found, name)
        places = {name: found.tensors[name].start for name in found.tensors}
        assert read_places(path) == places

    try_all(tmp_path / "x.gguf", sound_gguf(tmp_path), 420, read, 1500)


def sound_imatrix(path: Path, form: Form) -> bytes:
    entry = ImatrixEntry(torch.ones(2, 8), torch.tensor([5, 0]))
    other = ImatrixEntry(torch.ones(1, 4), torch.tensor([512]))
    imatrix = Imatrix({"blk.0.ffn_up.weight": entry, "output.weight": other}, ("text",), 1)
    write_imatrix(path, imatrix, form)
    return path.read_bytes()


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_random_damage_of_an_importance_matrix_is_refused_or_does_not_matter(
    tmp_path: Path, form: Form
) -> None:
    """Every entry that is read can be asked for."""
    sound = sound_imatrix(tmp_path / "sound.gguf", form)

    def read(path: Path) -> None:
        imatrix = read_imatrix(path)
        for name, entry in imatrix.entries.items():
            importance = imatrix.find_importance(name, entry.sums.shape[1])
            assert importance is not None
            assert bool(torch.isfinite(importance).all())

    try_all(tmp_path / "x.gguf", sound, len(sound), read, 800)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "takes 4 bytes"),
        (b"hello, world", "of neither form"),
        (struct.pack("<i", 0), "of neither form"),
        (struct.pack("<i", 2**31 - 1) + bytes(99), "of neither form"),
        (struct.pack("<iiiii", 1, 1, 0, 0, 0), "0 values"),
        (struct.pack("<ii4sii", 1, 4, b"name", 1, 2**31 - 1), "takes 8589934588 bytes"),
        (struct.pack("<ii4sii", 1, 4, b"name", 1, -1), "-1 values"),
        (struct.pack("<iiiii", 1, -4, 0, 0, 0), "length of -4"),
        (struct.pack("<ii1siif", 1, 1, b"n", 1, 1, -1.0), "not finite numbers from 0"),
        (struct.pack("<ii1siif", 1, 1, b"n", 1, 1, float("nan")), "not finite numbers from 0"),
    ],
    ids=range(10),
)
def test_false_claims_of_the_old_form_are_refused(
    tmp_path: Path, content: bytes, words: str
) -> None:
    """Before anything is allocated for them."""
    path = tmp_path / "x.dat"
    path.write_bytes(content)

    with pytest.raises((CheckpointError, CalibrationError)) as caught:
        read_imatrix(path)

    assert words in str(caught.value)
    assert str(path) in str(caught.value)
