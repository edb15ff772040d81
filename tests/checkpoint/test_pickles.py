"""Pickled weights that ask for more memory than they have bytes, or whose steps make no sense."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.pickles import read_pickle_header, read_pickled_tensor
from quantkit.errors import CheckpointError


def rewrite(path: Path, table: bytes, packing: int = zipfile.ZIP_STORED) -> Path:
    """Save a tensor and put another table into its archive."""
    torch.save({"a": torch.ones(4)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            is_table = name.endswith("/data.pkl")
            archive.writestr(
                name,
                (table or content) if is_table else content,
                packing if is_table else zipfile.ZIP_STORED,
            )
    return path


BYTES = b"\x8a\x05" + (600 << 20).to_bytes(5, "little") + b"\x85R"
"""Call what lies on the stack with a number of bytes."""


@pytest.mark.parametrize(
    "table",
    [
        b"\x80\x02}X\x01\x00\x00\x00acbuiltins\nbytearray\n" + BYTES + b"s.",
        b"\x80\x02}X\x01\x00\x00\x00actorch.storage\nUntypedStorage\n" + BYTES + b"s.",
        # Both names from the memo, which a list of names in the text would not see.
        b"\x80\x04\x8c\x08builtins\x94\x8c\x09bytearray\x940h\x00h\x01\x93" + BYTES + b".",
    ],
    ids=["bytearray", "storage", "stack"],
)
def test_a_table_that_allocates_is_refused_before_it_does(tmp_path: Path, table: bytes) -> None:
    """torch's `weights_only` lets some calls through that take as much memory as they are told."""
    path = rewrite(tmp_path / "pytorch_model.bin", table)
    with pytest.raises(CheckpointError, match=r"holds more than tensors .*is not opened") as caught:
        read_pickle_header(path)
    assert "\n" not in str(caught.value)


def test_a_packed_table_is_refused(tmp_path: Path) -> None:
    """A thousandth of its bytes would be in the file."""
    path = rewrite(tmp_path / "pytorch_model.bin", b"", zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is packed or claims more bytes"):
        read_pickle_header(path)


def test_bytes_behind_a_table_are_refused(tmp_path: Path) -> None:
    """torch would read them all and look at none."""
    path = rewrite(tmp_path / "pytorch_model.bin", b"\x80\x02}." + bytes(1000))
    with pytest.raises(CheckpointError, match="bytes behind its end"):
        read_pickle_header(path)


def test_an_archive_of_which_two_readers_see_two_is_refused(tmp_path: Path) -> None:
    """zipfile finds the directory wherever it was moved to, and the end before other bytes."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(4)}, path)
    content = path.read_bytes()
    for other in (content + b"x", b"PK\3\4" + content, content[:-2] + b"\1\0x"):
        path.write_bytes(other)
        with pytest.raises(CheckpointError, match="is damaged or of the format before"):
            read_pickle_header(path)


@pytest.mark.parametrize("table", [b"\x80\x02t.", b"\x80\x02h\x05.", b"\x80\x02}K\x01b.", b"]"])
def test_a_table_of_nonsense_gives_a_line(tmp_path: Path, table: bytes) -> None:
    """Steps without what they work on."""
    path = rewrite(tmp_path / "pytorch_model.bin", table)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        read_pickle_header(path)


def test_attributes_of_a_table_do_not_replace_its_methods(tmp_path: Path) -> None:
    """An OrderedDict of a pickle may have an attribute `items` that is a number."""
    table = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb."
    assert not read_pickle_header(rewrite(tmp_path / "pytorch_model.bin", table))


def test_weights_of_a_module_are_read(tmp_path: Path) -> None:
    """A state_dict has metadata as an attribute, and parameters where it keeps them."""
    module = torch.nn.Linear(3, 2).bfloat16()
    for number, weights in enumerate((module.state_dict(), module.state_dict(keep_vars=True))):
        path = tmp_path / f"{number}.bin"
        torch.save(weights, path)
        infos = read_pickle_header(path)
        assert infos.keys() == {"weight", "bias"}
        assert torch.equal(read_pickled_tensor(infos["weight"]), module.weight)


def test_weights_without_checksums_are_read(tmp_path: Path) -> None:
    """torch can be told to compute none, and does not look at them itself."""
    path = tmp_path / "pytorch_model.bin"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(4)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_pickle_header(path).keys() == {"a"}


def test_the_format_before_torch_1_6_is_refused(tmp_path: Path) -> None:
    """It cannot be mapped, and the line says what to do."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="convert the checkpoint to safetensors"):
        read_pickle_header(path)
