"""pytorch_model.bin: read without running what a pickle may hold.

Only `torch.load` with `weights_only=True` opens these files, after a look at what they would make
it do: that mode runs no code of a file, but allocates what the file asks for. Opening maps the
file into memory and reads its table of contents; a tensor's bytes are read when it is asked for.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from quantkit.errors import CheckpointError
from quantkit.records import TensorInfo

_DTYPES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
)

_CALLED = re.compile(
    r"collections OrderedDict|torch [A-Z]\w+Storage|"
    r"torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
)
"""What the tables of named tensors are made of, as pickle names it: module, blank, name. Others
that torch lets through, `builtins bytearray` and `torch._utils _rebuild_qtensor` among them,
allocate as much as they are told to."""
_NAMING = frozenset({"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})
"""Steps that name what is called in other ways than GLOBAL does. torch.save writes none, and
torch.load knows none."""

_MOST_TABLE_BYTES = 64 << 20
_MOST_STEPS = 5_000_000
"""Of a table: a tensor takes about twenty. A step of one byte may make an object of a hundred."""

_END = struct.Struct("<4s4H2LH")
"""The end of an archive: PK56, two disks, two counts, bytes of the directory, its start, comment.
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT"""
_LOCATOR = struct.Struct("<4sLQL")
"""Before it in those of more than 4 GB, and in all that torch writes: PK67, disk, start of the
wide end, disks."""
_WIDE_END = struct.Struct("<4sQ2H2L4Q")
_RECORD = struct.Struct("<26x2H")
"""Before the bytes of a record: the length of its name and of what follows that."""


def read_pickle_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a .bin file by name; `start` is 0, since only torch knows the place.

    Raises:
        CheckpointError: the file is missing, damaged, of the old format, or holds code.
    """
    infos = {}
    loaded, most = _load(path), path.stat().st_size
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path} holds {name!r}, which is not a tensor")
        if tensor.dtype not in _DTYPES or tensor.is_quantized or tensor.layout != torch.strided:
            raise CheckpointError(f"{path}: tensor {name!r} has the unknown dtype {tensor.dtype}")
        size = tensor.numel() * tensor.element_size()
        if size > most:
            # One number can stand for any number of them.
            raise CheckpointError(
                f"{path}: tensor {name!r} claims {size} bytes and the file has {most}: it is not "
                f"what it claims; ask its author for safetensors"
            )
        infos[name] = TensorInfo(name, _DTYPES[tensor.dtype], tuple(tensor.shape), path, 0, size)
    return infos


def read_pickled_tensor(info: TensorInfo) -> Tensor:
    """Return a copy of one tensor of a .bin file.

    Raises:
        CheckpointError: as `read_pickle_header`.
    """
    tensor = _load(info.file).get(info.name)
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != info.shape:
        raise CheckpointError(f"{info.file} changed while it was in use: tensor {info.name!r}")
    return tensor.detach().contiguous().clone()


def _load(path: Path) -> dict[object, object]:
    """Return what a file holds by name, mapped into memory.

    Raises:
        CheckpointError: as `read_pickle_header`.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, or no file")
    try:
        _check_table(path, _read_table(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is a pickle that holds more than tensors, possibly code, and is not opened: "
            f"ask its author for safetensors"
        ) from None
    # A table of nonsense ends in whatever its steps were given.
    except (
        *(OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError),
        *(AssertionError, MemoryError, OverflowError, struct.error, zipfile.BadZipFile),
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is damaged or of the format before torch 1.6 ({reason}): "
            f"convert the checkpoint to safetensors"
        ) from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not named tensors")
    # An OrderedDict of a pickle may have attributes of its own in place of its methods.
    return dict(dict.items(loaded))


def _read_table(path: Path) -> bytes:
    """Return data.pkl of an archive all of whose records lie in it as they are.

    Whatever torch may read of them is then no larger than the file.

    Raises:
        CheckpointError: a record is packed, there twice, or larger than the file.
        OSError, ValueError, zipfile.BadZipFile: it is no archive, or one of which two readers may
            find two directories.
    """
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        size = path.stat().st_size
        if _find_directory(file, size) != archive.start_dir:
            raise ValueError("its directory is not where an archive has it")
        records = archive.infolist()
        # torch's reader takes capitals for small letters.
        names = [record.filename.casefold() for record in records]
        tables = [each for each in records if each.filename.casefold().endswith("/data.pkl")]
        if len(set(names)) < len(names) or len(tables) != 1:
            raise ValueError("it has not one table of tensors, or a record twice")
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
                raise CheckpointError(
                    f"{path}: the record {record.filename!r:.100} is packed or claims more bytes "
                    f"than the file has, as torch.save writes none: ask its author for safetensors"
                )
        if tables[0].file_size > _MOST_TABLE_BYTES:
            raise CheckpointError(
                f"{path}: its table of tensors is larger than {_MOST_TABLE_BYTES >> 20} MB: "
                f"convert the checkpoint to safetensors"
            )
        # Not by zipfile, which compares a checksum: torch can be told to write none.
        place = tables[0].header_offset
        place += _RECORD.size + sum(_read_at(file, place, _RECORD))
        file.seek(place)
        return file.read(tables[0].file_size)


def _find_directory(file: BinaryIO, size: int) -> int:
    """Return where the directory of an archive begins, if nothing else can be taken for its end.

    zipfile looks for the end farther up and moves the directory to where it fits, which torch's
    reader does otherwise: the one would look at other records than the other reads.

    Raises:
        ValueError, struct.error: the archive does not end as torch.save ends it.
    """
    place = size - _END.size
    mark, *_, length, start, comment = _read_at(file, place, _END)
    if mark != b"PK\5\6" or comment:
        raise ValueError("it does not end as an archive without a comment")
    mark, _, wide, _ = _read_at(file, place - _LOCATOR.size, _LOCATOR)
    if mark == b"PK\6\7":
        place -= _LOCATOR.size + _WIDE_END.size
        mark, *_, length, start = _read_at(file, place, _WIDE_END)
        if wide != place or mark != b"PK\6\6":
            raise ValueError("its end is not where the archive says")
    if start + length != place:
        raise ValueError("its directory does not lie before its end")
    return int(start)


def _read_at(file: BinaryIO, place: int, shape: struct.Struct) -> tuple[Any, ...]:
    file.seek(max(0, place))
    return shape.unpack(file.read(shape.size))


def _check_table(path: Path, table: bytes) -> None:
    """Refuse a table that calls what makes no tensor, or that goes on after its end.

    Raises:
        CheckpointError: it does, or it takes too many steps.
        ValueError: it is no pickle.
    """
    end = 0
    for count, (step, argument, place) in enumerate(pickletools.genops(table)):
        if step.name in _NAMING or (step.name == "GLOBAL" and not _CALLED.fullmatch(str(argument))):
            raise CheckpointError(
                f"{path} is a pickle that holds more than tensors ({argument or step.name!r:.100}),"
                f" possibly code, and is not opened: ask its author for safetensors"
            )
        if count == _MOST_STEPS:
            raise CheckpointError(
                f"{path}: its table of tensors has more than {_MOST_STEPS:,} steps: convert the "
                f"checkpoint to safetensors"
            )
        end = (place or 0) + 1
    if end != len(table):
        raise ValueError("its table of tensors has bytes behind its end")
