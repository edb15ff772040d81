"""pytorch_model.bin: read without running what a pickle may hold.

Only `torch.load` with `weights_only=True` opens these files. Opening maps the file into memory and
reads its table of contents; a tensor's bytes are read when it is asked for.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

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
    if tensor is None or tuple(tensor.shape) != info.shape:
        raise CheckpointError(f"{info.file} changed while it was in use: tensor {info.name!r}")
    return tensor.detach().contiguous().clone()


def _load(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is a pickle that holds more than tensors, possibly code, and is not opened: "
            f"ask its author for safetensors"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is damaged or of the format before torch 1.6 ({reason}): "
            f"convert the checkpoint to safetensors"
        ) from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not named tensors")
    return loaded
