"""A size of memory as people write it."""

from __future__ import annotations

from pydantic import ByteSize, TypeAdapter, ValidationError

from quantkit.errors import InputError

_SIZES = TypeAdapter(ByteSize)


def read_memory(memory: int | str | None) -> int | None:
    """Return bytes; None stays None.

    Args:
        memory: bytes, or a number with a unit: `1500MB`, `2GB`, `2GiB`.

    Raises:
        InputError: it is no size.
    """
    if memory is None:
        return None
    try:
        size = 0 if isinstance(memory, bool) else int(_SIZES.validate_python(memory))
    except (ValidationError, OverflowError):
        size = 0
    if size <= 0:
        raise InputError(f"memory: {memory!r} is no size: write bytes, 1500MB, 2GB or 2GiB")
    return size
