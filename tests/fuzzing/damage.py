"""Damage to bytes: what disks, transfers and attackers make of a file."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tests.fuzzing.reader import Damage

_NUMBERS = (0, 1, 2, 7, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**60, 2**62, 2**63, -1)
"""Counts, lengths and offsets that overflow somewhere or claim what no file has."""
_LARGEST = 1 << 22
"""Bytes that a damaged file may have: what is larger is only slow."""


def flip(draw: random.Random, content: bytes) -> bytes:
    """Turn single bits over."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        if found:
            found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    return bytes(found)


def overwrite(draw: random.Random, content: bytes) -> bytes:
    """Put zeros, ones or noise in the place of some bytes."""
    at, size = _span(draw, content)
    fill = draw.choice((bytes(size), b"\xff" * size, draw.randbytes(size)))
    return content[:at] + fill + content[at + size :]


def cut(draw: random.Random, content: bytes) -> bytes:
    """Leave out the end, or a part within."""
    at, size = _span(draw, content)
    return content[:at] if draw.random() < 0.5 else content[:at] + content[at + size :]


def insert(draw: random.Random, content: bytes) -> bytes:
    """Put a part in twice, or noise between."""
    at, size = _span(draw, content)
    more = content[at : at + size] if draw.random() < 0.5 else draw.randbytes(size)
    return (content[:at] + more + content[at:])[:_LARGEST]


def append(draw: random.Random, content: bytes) -> bytes:
    """Put zeros, noise or the file itself behind its end."""
    more = draw.choice((b"\0", bytes(4096), draw.randbytes(64), content))
    return (content + more)[:_LARGEST]


def empty(draw: random.Random, content: bytes) -> bytes:
    """Leave nothing, or next to nothing."""
    return draw.choice((b"", b"\0", b"\n", b"\xef\xbb\xbf", content[: draw.randint(0, 32)]))


def set_number(
    *, within: int, widths: Sequence[int] = (4, 8), step: int = 1
) -> Callable[[random.Random, bytes], bytes]:
    """Make the damage that puts a hostile number in the place of one of the first `within` bytes.

    Args:
        widths: bytes of the numbers that the format has, little-endian.
        step: of the places.
    """

    def damage(draw: random.Random, content: bytes) -> bytes:
        width = draw.choice(list(widths))
        at = draw.randrange(0, max(1, min(within, len(content) - width + 1)), step)
        before = int.from_bytes(content[at : at + width], "little")
        near = (before + 1, before - 1, before * 2, before ^ (1 << draw.randrange(8 * width)))
        number = draw.choice((*_NUMBERS, len(content), *near)) % (1 << 8 * width)
        return content[:at] + number.to_bytes(width, "little") + content[at + width :]

    return damage


def at_start(damage: Damage, within: int) -> Damage:
    """Make the damage that does the same to the first `within` bytes, and leaves the others."""

    def first(draw: random.Random, content: bytes) -> bytes:
        return damage(draw, content[:within]) + content[within:]

    return first


BYTES: tuple[Damage, ...] = (flip, flip, overwrite, cut, insert, append, empty)
"""What can happen to any file."""


def _span(draw: random.Random, content: bytes) -> tuple[int, int]:
    """A place and a length, mostly short ones."""
    at = draw.randint(0, len(content))
    most = max(1, min(len(content) - at, draw.choice((1, 4, 16, 256, 1 << 16))))
    return at, draw.randint(1, most)
