"""What `make odd` says of its machine is true, also of the processes that tests start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import quantkit

ROOT = Path(__file__).parent.parent
CONDITIONS = os.environ.get("QUANTKIT_ODD", "").split()

pytestmark = pytest.mark.odd


def condition(name: str) -> pytest.MarkDecorator:
    """Only where the script was not told to leave `name` out."""
    return pytest.mark.skipif(name not in CONDITIONS, reason=f"ODD_WITHOUT={name}")


def in_child(expression: str) -> str:
    """What Python, in a process of its own, makes of `expression`."""
    program = f"import os, socket, sys; print({expression})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


@condition("network")
@pytest.mark.parametrize("host", ["192.0.2.1", "1.1.1.1"])
def test_another_machine_cannot_be_reached(host: str) -> None:
    """Neither from here nor from a process that was started here."""
    assert "Network is unreachable" in in_child(f"socket.create_connection(({host!r}, 443))")


@condition("network")
def test_loopback_can_be_used() -> None:
    """The servers of the tests are there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert in_child(f"socket.create_connection(('127.0.0.1', {port})).fileno() > 0") == "True"


@condition("root")
def test_the_user_is_not_root(tmp_path: Path) -> None:
    """And has none of root's rights: that one reads and writes what nobody may."""
    assert os.geteuid() != 0
    closed = tmp_path / "closed"
    closed.write_text("")
    closed.chmod(0)
    with pytest.raises(PermissionError):
        closed.read_text()


@condition("home")
def test_the_home_folder_cannot_be_written() -> None:
    """No program may need to keep something there."""
    with pytest.raises(OSError, match=r"Permission denied|Read-only"):
        (Path.home() / "new").touch()


@condition("path")
def test_the_path_has_blanks_and_letters_beyond_ascii() -> None:
    """That of the sources, and that of the interpreter."""
    for path in (str(Path(quantkit.__file__)), sys.executable):
        assert " " in path
        assert not path.isascii()
    assert Path(quantkit.__file__).is_relative_to(ROOT)


@condition("optimize")
def test_python_has_no_assert_statements() -> None:
    """Those of the tests are pytest's, which stay: else this would pass."""
    assert not __debug__
    assert in_child("__debug__") == "False"
    with pytest.raises(AssertionError):
        assert not ROOT


@condition("tmp")
def test_temporary_files_are_on_another_file_system(tmp_path: Path) -> None:
    """A rename from there to the output is no rename."""
    for folder in (tmp_path, Path(tempfile.gettempdir())):
        assert folder.stat().st_dev != ROOT.stat().st_dev
