"""Names that a stranger's file may give for another file, and what may lie where it is looked for.

Each attack gives a name, and puts into the folder what belongs to it. Beside the folder lies what
must not be read: a file that its reader would take.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECRET = "canary"
"""Name of the file outside of the folder, and what its content begins with."""


@dataclass(frozen=True)
class Place:
    """Where an attack takes place."""

    folder: Path
    """Of the stranger's files."""
    outside: Path
    """A folder beside it, which holds a file named SECRET that the reader would take."""
    base: str
    """A harmless name of what the carrier names."""


@dataclass(frozen=True)
class Attack:
    """A name, and what is done before it is read."""

    title: str
    make: Callable[[Place], str]
    on_disk: bool = False
    """Whether the name is harmless, and what lies there is not."""


def _named(title: str, name: str) -> Attack:
    return Attack(title, lambda place: name)


def _absolute(place: Place) -> str:
    return str(place.outside / SECRET)


def _climbing(place: Place) -> str:
    return f"../{place.outside.name}/{SECRET}"


def _climbing_later(place: Place) -> str:
    (place.folder / "sub").mkdir(exist_ok=True)
    return f"sub/../../{place.outside.name}/{SECRET}"


def _doubled(place: Place) -> str:
    return f".//..//{place.outside.name}/./{SECRET}"


def _address(place: Place) -> str:
    return f"file://{place.outside}/{SECRET}"


def _link(place: Place) -> str:
    (place.folder / place.base).symlink_to(place.outside / SECRET)
    return place.base


def _links(place: Place) -> str:
    (place.folder / "between").symlink_to(f"../{place.outside.name}/{SECRET}")
    (place.folder / place.base).symlink_to("between")
    return place.base


def _linked_folder(place: Place) -> str:
    copy = shutil.copytree if (place.outside / SECRET).is_dir() else shutil.copy
    copy(place.outside / SECRET, place.outside / Path(place.base).name)
    (place.folder / "linked").symlink_to(place.outside, target_is_directory=True)
    return f"linked/{Path(place.base).name}"


def _circle(place: Place) -> str:
    (place.folder / place.base).symlink_to("round")
    (place.folder / "round").symlink_to(place.base)
    return place.base


def _pipe(place: Place) -> str:
    os.mkfifo(place.folder / place.base)
    return place.base


def _socket(place: Place) -> str:
    path = place.folder / place.base
    # The path of a socket may have 107 bytes.
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path.name)
    return place.base


def _device(place: Place) -> str:
    (place.folder / place.base).symlink_to("/dev/zero")
    return place.base


def _folder(place: Place) -> str:
    (place.folder / place.base).mkdir()
    return place.base


def _composed(place: Place) -> str:
    """The same letter in two ways: two files here, one on macOS."""
    (place.folder / "\u00e9").write_text("a file of its own")
    (place.folder / "e\u0301").symlink_to(place.outside / SECRET)
    return "e\u0301"


def _other_case(place: Place) -> str:
    other = Path(place.base).with_name(Path(place.base).name.upper())
    (place.folder / other).symlink_to(place.outside / SECRET)
    return other.as_posix()


ATTACKS: tuple[Attack, ...] = (
    Attack("absolute", _absolute),
    Attack("`..` first", _climbing),
    Attack("`..` later", _climbing_later),
    Attack("`..` between doubled slashes", _doubled),
    _named("`..` with a blank", f".. /outside/{SECRET}"),
    _named("`..` alone", ".."),
    _named("backslashes", f"..\\outside\\{SECRET}"),
    _named("drive letter", f"C:/{SECRET}"),
    _named("drive without slash", f"c:{SECRET}"),
    _named("UNC", f"\\\\server\\share\\{SECRET}"),
    _named("UNC with slashes", f"//server/share/{SECRET}"),
    _named("NUL byte", f"{SECRET}\0.safetensors"),
    _named("newline", f"{SECRET}\nmore"),
    _named("reserved name", "NUL"),
    _named("reserved, with ending", "com1.safetensors"),
    _named("reserved, superscript", "LPT².json"),
    _named("trailing dot", f"{SECRET}."),
    _named("trailing blank", f"{SECRET} "),
    _named("256 bytes", "n" * 256),
    _named("over 4096 bytes", "n/" * 2100 + SECRET),
    _named("home folder", f"~/{SECRET}"),
    _named("empty", ""),
    _named("a dot", "."),
    Attack("file: address", _address),
    _named("stream of a file", f"{SECRET}:stream"),
    _named("right-to-left mark", f"{SECRET}\u202egnp.exe"),
    _named("half a surrogate pair", f"{SECRET}\udc80"),
    _named("percent-encoded `..`", f"%2e%2e/outside/{SECRET}"),
    _named("leading dash", f"-rf-{SECRET}"),
    Attack("link out of the folder", _link, True),
    Attack("link to a link", _links, True),
    Attack("linked folder above", _linked_folder, True),
    Attack("links in a circle", _circle, True),
    Attack("named pipe", _pipe, True),
    Attack("socket", _socket, True),
    Attack("link to a device", _device, True),
    Attack("folder in its place", _folder, True),
    Attack("twin by case, linked", _other_case, True),
    Attack("twin in Unicode, linked", _composed, True),
)
"""By kind of attack."""
