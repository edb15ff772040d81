"""The tests' own network: what it lets through, and that nothing else goes unseen."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from tests import loopback


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "huggingface.co", b"192.0.2.1"])
def test_another_machine_is_refused_and_remembered(host: str | bytes) -> None:
    """As where there is no network; the test would fail for it, had it not been asked to."""
    with pytest.raises(OSError, match=r"unreachable|name resolution"):
        socket.create_connection((host, 443), timeout=1)
    assert loopback.refused.pop()


@pytest.mark.parametrize("attempt", ["connect", "connect_ex", "sendto", "gethostbyname"])
def test_no_call_is_forgotten(attempt: str) -> None:
    """Datagrams and look-ups leave the machine, too."""
    with socket.socket(type=socket.SOCK_DGRAM) as own:
        calls: dict[str, Callable[[], object]] = {
            "connect": lambda: own.connect(("192.0.2.1", 53)),
            "connect_ex": lambda: own.connect_ex(("192.0.2.1", 53)),
            "sendto": lambda: own.sendto(b"", ("192.0.2.1", 53)),
            "gethostbyname": lambda: socket.gethostbyname("huggingface.co"),
        }
        with pytest.raises(OSError, match=r"unreachable|name resolution"):
            calls[attempt]()
    assert loopback.refused.pop()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1.2.3"])
def test_this_machine_can_be_reached(host: str) -> None:
    """The tests have servers of their own."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection((host, port), timeout=60).close()


def test_helpers_check_where_python_has_no_assert_statements() -> None:
    """pytest has written theirs anew, as it does with those of the tests."""
    from tests.solvers import cases

    assert type(cases.__spec__.loader).__name__ == "AssertionRewritingHook"
