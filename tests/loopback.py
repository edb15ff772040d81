"""No test reaches a machine but this one: Python's own sockets are refused all other addresses.

Standard library only: `scripts/check_odd.sh` lets every Python process begin with this file where
the kernel cannot take the network away.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
from typing import Any

# What was tried, in the order of time; the test in which it grows fails (tests/conftest.py). Where
# Python has begun with this file, it is the first of two hooks that notes it.
refused: list[str] = getattr(sys.modules.get("sitecustomize"), "refused", [])


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook (`sys.addaudithook`) by which a foreign host is as far as without a network.

    Raises:
        OSError: A connection or a datagram to another machine.
        socket.gaierror: The look-up of a name of another machine.
    """
    if not event.startswith("socket."):
        return
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        # Other families have no host in front: a path, a number of a network device, nothing.
        if isinstance(address, tuple) and isinstance(address[0], str) and not _is_here(address[0]):
            refused.append(f"{event} {address[0]}")
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
    looks_up = event in ("socket.getaddrinfo", "socket.gethostbyname")
    if looks_up and not _is_here(arguments[0]) and _parse(arguments[0]) is None:
        refused.append(f"{event} {arguments[0]!r}")
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


def _is_here(host: str | bytes | None) -> bool:
    """Whether `host` is this machine: by its name, or a number that its loopback device has."""
    if host is None or host in ("", b"", "localhost", b"localhost", "0.0.0.0", "::"):
        return True
    if host == socket.gethostname():
        return True
    number = _parse(host)
    return number is not None and number.is_loopback


def _parse(host: str | bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The number that `host` is, whose look-up asks nobody; None for a name."""
    try:
        return ipaddress.ip_address(host.decode("ascii") if isinstance(host, bytes) else host)
    except ValueError:
        return None


def start() -> None:
    """Refuse from now on; a hook cannot be taken away again."""
    sys.addaudithook(refuse)
