"""Importance matrices against files that gguf-py writes and bytes composed by hand."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from quantkit.errors import CalibrationError, OutputError
from quantkit.formats.gguf.imatrix import Form, Imatrix, ImatrixEntry, read_imatrix, write_imatrix

STACK, PLAIN = "blk.0.ffn_up_exps.weight", "blk.0.attn_q.weight"


def make_imatrix() -> Imatrix:
    """A plain matrix, and a stack of three of which one saw nothing."""
    generator = torch.Generator().manual_seed(0)
    return Imatrix(
        {
            PLAIN: ImatrixEntry(torch.rand(1, 8, generator=generator), torch.tensor([1100])),
            STACK: ImatrixEntry(torch.rand(3, 4, generator=generator), torch.tensor([600, 0, 7])),
        },
        ("first.txt", "second.txt"),
        chunks=3,
        chunk_size=512,
    )


def write_as_llama_cpp(path: Path, imatrix: Imatrix, kind: type = np.float32) -> None:
    """The tensors and metadata of `save_imatrix` in tools/imatrix/imatrix.cpp."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(imatrix.datasets))
    writer.add_uint32("imatrix.chunk_count", imatrix.chunks)
    writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size)
    for name, entry in sorted(imatrix.entries.items()):
        counts = entry.counts.numpy().astype(kind)
        writer.add_tensor(f"{name}.in_sum2", entry.sums.squeeze(0).numpy())
        writer.add_tensor(f"{name}.counts", counts if len(counts) == 1 else counts[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compose_old(entries: dict[str, tuple[int, list[float]]], end: bytes) -> bytes:
    """The bytes of `save_imatrix_legacy`: name, chunks and values of each entry."""
    pieces = [struct.pack("<i", len(entries))]
    for name, (chunks, values) in entries.items():
        pieces += [struct.pack("<i", len(name)), name.encode()]
        pieces += [struct.pack(f"<ii{len(values)}f", chunks, len(values), *values)]
    return b"".join(pieces) + end


def same(first: Imatrix, second: Imatrix) -> bool:
    return first.entries.keys() == second.entries.keys() and all(
        torch.equal(entry.sums, second.entries[name].sums)
        and torch.equal(entry.counts, second.entries[name].counts)
        for name, entry in first.entries.items()
    )


def test_we_read_what_llama_cpp_writes(tmp_path: Path) -> None:
    """Sums and counts with their record; means as llama-quantize takes them."""
    theirs = make_imatrix()
    write_as_llama_cpp(tmp_path / "i.gguf", theirs)

    found = read_imatrix(tmp_path / "i.gguf")

    assert same(found, theirs)
    assert (found.datasets, found.chunks, found.chunk_size) == (theirs.datasets, 3, 512)
    assert found.form == "gguf"
    plain = found.find_importance(PLAIN, 8)
    assert plain is not None
    assert torch.equal(plain, theirs.entries[PLAIN].sums[0] / 1100)
    stack = found.find_importance(STACK, 4)
    assert stack is not None
    sums = theirs.entries[STACK].sums
    assert torch.equal(stack, torch.stack([sums[0] / 600, torch.ones(4), sums[2] / 7]))
    assert found.find_importance("absent", 8) is None
    for name, columns in ((PLAIN, 16), (PLAIN, 7), (STACK, 8)):
        with pytest.raises(CalibrationError, match="made for another model"):
            found.find_importance(name, columns)


def test_gguf_py_reads_what_we_write(tmp_path: Path) -> None:
    """Names, dimensions, kinds and values are those that llama.cpp's loader asks for."""
    imatrix = make_imatrix()

    digest = write_imatrix(tmp_path / "i.gguf", imatrix)

    assert hashlib.sha256((tmp_path / "i.gguf").read_bytes()).hexdigest() == digest
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["first.txt", "second.txt"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (3, 512)
    for key in ("imatrix.chunk_count", "imatrix.chunk_size"):
        assert reader.fields[key].types == [gguf.GGUFValueType.UINT32]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, entry in imatrix.entries.items():
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        assert {sums.tensor_type.name, counts.tensor_type.name} == {"F32"}
        assert sums.shape.tolist() == list(entry.sums.shape)[::-1]
        assert np.array_equal(sums.data, entry.sums.numpy())
        assert counts.shape.tolist() == [1, len(entry.counts)]
        assert counts.data.reshape(-1).tolist() == entry.counts.tolist()


def test_old_form_holds_means_times_chunks(tmp_path: Path) -> None:
    """Read: divided by the chunks, as llama-quantize does; without chunks as they are."""
    path = tmp_path / "i.dat"
    entries = {"a": (4, [2.0, 4.0]), "b": (0, [3.0])}
    path.write_bytes(compose_old(entries, struct.pack("<ii4s", 7, 4, b"text")))

    found = read_imatrix(path)

    for name, columns, means in (("a", 2, [0.5, 1.0]), ("a", 1, [[0.5], [1.0]]), ("b", 1, [3.0])):
        importance = found.find_importance(name, columns)
        assert importance is not None
        assert importance.tolist() == means
    assert (found.datasets, found.chunks, found.form) == (("text",), 7, "dat")


@pytest.mark.parametrize("end", [b"", struct.pack("<i", 7), struct.pack("<ii", 7, 0)])
def test_old_form_may_end_after_its_entries(tmp_path: Path, end: bytes) -> None:
    """Files of the first versions say neither chunks nor text."""
    path = tmp_path / "i.dat"
    path.write_bytes(compose_old({"a": (1, [2.0])}, end))

    found = read_imatrix(path)

    assert (found.datasets, found.chunks) == ((), 7 if end else 0)


def test_we_write_the_old_form_as_llama_cpp(tmp_path: Path) -> None:
    """Whole chunks of the tokens seen, rounded up; ones for what saw none; the last text."""
    imatrix = make_imatrix()

    digest = write_imatrix(tmp_path / "i.dat", imatrix, "dat")

    raw = (tmp_path / "i.dat").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == digest
    plain = (imatrix.entries[PLAIN].sums[0] / 1100 * 3).tolist()
    sums = imatrix.entries[STACK].sums
    stack = [*(sums[0] / 600 * 2).tolist(), *[2.0] * 4, *(sums[2] / 7 * 2).tolist()]
    end = struct.pack("<ii10s", 3, 10, b"second.txt")
    assert raw == compose_old({PLAIN: (3, plain), STACK: (2, stack)}, end)


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_what_is_written_is_read_again(tmp_path: Path, form: Form) -> None:
    """The same importance, exactly from GGUF and within rounding from the old form."""
    imatrix = make_imatrix()
    write_imatrix(tmp_path / "i.gguf", imatrix, form)

    found = read_imatrix(tmp_path / "i.gguf")

    assert found.form == form
    for name, columns in ((PLAIN, 8), (STACK, 4)):
        expected = imatrix.find_importance(name, columns)
        importance = found.find_importance(name, columns)
        torch.testing.assert_close(importance, expected, rtol=1e-6, atol=0)
    if form == "gguf":
        assert same(found, imatrix)
        write_imatrix(tmp_path / "again.gguf", found)
        assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "i.gguf").read_bytes()


def test_unseen_matrices_are_left_out_of_the_old_form(tmp_path: Path) -> None:
    """They would be ones; llama-imatrix skips them."""
    entries = {**make_imatrix().entries, "z": ImatrixEntry(torch.zeros(1, 2), torch.tensor([0]))}

    write_imatrix(tmp_path / "i.dat", Imatrix(entries), "dat")

    assert read_imatrix(tmp_path / "i.dat").entries.keys() == {PLAIN, STACK}
    with pytest.raises(ValueError, match="no matrix saw a token"):
        write_imatrix(tmp_path / "j.dat", Imatrix({"z": entries["z"]}), "dat")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (ImatrixEntry(torch.tensor([[1.0, -1.0]]), torch.tensor([1])), "not finite numbers from 0"),
        (ImatrixEntry(torch.tensor([[1.0, torch.inf]]), torch.tensor([1])), "not finite"),
        (ImatrixEntry(torch.ones(1, 2), torch.tensor([-1])), "counts of 'a' are no counts"),
        (ImatrixEntry(torch.ones(2, 2), torch.tensor([1])), "not those of one matrix"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path: Path, entry: ImatrixEntry, words: str) -> None:
    """With the name of the entry."""
    path = tmp_path / "i.gguf"
    write_imatrix(path, Imatrix({"a": entry}))

    with pytest.raises(CalibrationError, match=words):
        read_imatrix(path)


def test_other_gguf_files_are_no_importance_matrix(tmp_path: Path) -> None:
    """A model, sums without counts, counts that are no float32."""
    imatrix = make_imatrix()
    write_as_llama_cpp(tmp_path / "i.gguf", imatrix, np.float16)
    with pytest.raises(CalibrationError, match="F16 and F32"):
        read_imatrix(tmp_path / "i.gguf")

    path = tmp_path / "j.gguf"
    write_imatrix(path, imatrix)
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b".counts", b".counto"))
    with pytest.raises(CalibrationError, match="sums without counts"):
        read_imatrix(path)
    path.write_bytes(sound.replace(b"imatrix", b"adapter", 1))
    with pytest.raises(CalibrationError, match="is a GGUF file, but no importance matrix"):
        read_imatrix(path)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """Nothing to write, another ending, a folder that is not there."""
    with pytest.raises(ValueError, match="without entries"):
        write_imatrix(tmp_path / "i.gguf", Imatrix({}))
    with pytest.raises(ValueError, match=r"end with \.gguf"):
        write_imatrix(tmp_path / "i.dat", make_imatrix(), "gguf")
    with pytest.raises(OutputError, match="cannot write"):
        write_imatrix(tmp_path / "absent" / "i.dat", make_imatrix(), "dat")
    assert list(tmp_path.iterdir()) == []
