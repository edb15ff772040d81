"""Files with random damage, the same ones every time."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable
from pathlib import Path

from quantkit.errors import InputError

HUGE = (1 << 60, (1 << 64) - 1, 1 << 63, 1 << 32)


def damage(sound: bytes, chance: random.Random, header: int) -> bytes:
    """Flip bytes, write a huge number, cut, insert or repeat; mostly within the header."""
    data = bytearray(sound)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        place = chance.randrange(min(header, len(data)) or 1)
        kind = chance.randrange(6)
        if kind == 0:
            del data[chance.randrange(len(data) + 1) :]
        elif kind == 1:
            data[place : place + 8] = struct.pack("<Q", chance.choice((*HUGE, 0, 1, 1 << 31)))
        elif kind == 2:
            data[place:place] = chance.randbytes(chance.randrange(1, 9))
        elif kind == 3:
            del data[place : place + chance.randrange(1, 9)]
        else:
            data[place : place + 1] = bytes([chance.randrange(256)])
        if not data:
            break
    return bytes(data)


def try_all(
    path: Path, sound: bytes, header: int, read: Callable[[Path], None], rounds: int
) -> None:
    """Read damaged files; any other error than ours is raised. Some of each kind must occur.

    Args:
        path: where they are written, one behind the other.
        sound: the file before.
        header: bytes of it in which most damage is done.
        read: reads the file.
        rounds: number of files.
    """
    chance = random.Random(6)
    accepted = 0
    for _ in range(rounds):
        path.write_bytes(damage(sound, chance, header))
        with contextlib.suppress(InputError):
            read(path)
            accepted += 1
    assert rounds // 100 < accepted < rounds
