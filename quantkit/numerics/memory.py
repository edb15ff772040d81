"""The memory of tensors in RAM, seen without taking hold of it.

A tensor that numpy has seen by `Tensor.numpy` can never be resized again, and so never gives its
memory back while something refers to it; by DLPack older numpy may only read.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, UntypedStorage


def view_memory(owner: UntypedStorage | Tensor) -> memoryview:
    """Return the bytes of a storage, or of a tensor's whole storage, to read and to write.

    They are there as long as the storage is, and has not been resized.
    """
    storage = owner.untyped_storage() if isinstance(owner, Tensor) else owner
    array = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    return memoryview(array).cast("B")


def view_numbers(part: Tensor, kind: Any) -> NDArray[Any]:
    """Return the numbers of a contiguous tensor as others of `kind`, along the last axis.

    They are there as long as the tensor is.
    """
    room: Any = (ctypes.c_char * part.nbytes).from_address(part.data_ptr())
    numbers = part.shape[-1] * part.itemsize // np.dtype(kind).itemsize
    return np.frombuffer(room, kind).reshape(*part.shape[:-1], numbers)


def return_freed_memory() -> None:
    """Give the holes between tensors back to the system, where the C library can."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
