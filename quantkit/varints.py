"""Whole numbers of protobuf and Thrift's compact protocol: seven bits a byte, low ones first.

https://protobuf.dev/programming-guides/encoding/#varints
"""

from __future__ import annotations

import mmap

_TOP_BIT = 63


class UnendingNumber(ValueError):
    """A number has more bytes than 64 bits need."""


def read_varint(data: mmap.mmap | memoryview, place: int) -> tuple[int, int]:
    """Return a number and the place behind it.

    Raises:
        IndexError: the data end first.
        UnendingNumber: it does not end.
    """
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > _TOP_BIT:
            raise UnendingNumber("a number of more than 64 bits")
