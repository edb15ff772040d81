"""Servers as processes: waiting for them, asking them, ending them and all that they started."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import quantkit
from quantkit.errors import InputError, WorkerError
from quantkit.serving.programs import find_program
from quantkit.serving.records import ServeCommand
from quantkit.serving.starting import running_server
from tests.ports import free_port

ECHO = Path(__file__).with_name("echo_server.py")


def echo(output: Path, behaviour: str, port: int | None = None) -> ServeCommand:
    """A command that starts the echo server in place of ONNX Runtime's."""
    port = port or free_port()
    serve = quantkit.serve_command(output, "onnxruntime", port=port, model_name="echo")
    return replace(serve, command=(sys.executable, str(ECHO), str(port), "echo", behaviour))


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def await_end(pid: int) -> bool:
    """Whether a process ends within five seconds."""
    deadline = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def test_a_server_is_asked_once_and_ended(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says again what it was asked; a proxy for the world outside is passed by."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    lines: list[str] = []
    with running_server(echo(output, "child"), timeout=20, tell=lines.append) as server:
        answer = server.ask()
        assert answer.content == "Say hello in one sentence."
        assert (answer.model, answer.finish_reason) == ("echo", "stop")
        assert is_alive(server.process.pid)
    child = next(int(line.split()[1]) for line in lines if line.startswith("child"))
    assert await_end(server.process.pid)
    assert await_end(child)


def test_a_server_that_dies_is_quoted(output: Path) -> None:
    """Without what could move a terminal's cursor."""
    with (
        pytest.raises(WorkerError, match=r"exit code 7; its last lines:\n[^@]*weights") as dead,
        running_server(echo(output, "dies"), timeout=20),
    ):
        pass
    assert "\x1b" not in str(dead.value)


def test_a_server_that_never_answers_is_ended(output: Path) -> None:
    """When its time is over."""
    with (
        pytest.raises(WorkerError, match=r"did not answer at http://127.0.0.1:.* within 1 seconds"),
        running_server(echo(output, "silent"), timeout=1.0),
    ):
        pass


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [("nonsense", "answers no chat completion"), ("garbled", "does not answer a chat completion")],
)
def test_an_answer_that_is_none_is_refused(output: Path, behaviour: str, words: str) -> None:
    """Status 200 is not enough, and neither is what is not HTTP."""
    with (
        pytest.raises(WorkerError, match=words),
        running_server(echo(output, behaviour), timeout=20) as server,
    ):
        server.ask()


@pytest.mark.parametrize("behaviour", ["drips", "trickles"])
def test_an_answer_that_never_ends_is_given_up(
    output: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    """Each byte comes in time; of its health the status is enough."""
    monkeypatch.setattr("quantkit.serving.starting._REQUEST_SECONDS", 1.0)
    with running_server(echo(output, behaviour), timeout=20) as server:
        start = time.monotonic()
        with pytest.raises(WorkerError, match="there is no whole answer after 1 seconds"):
            server.ask()
        assert time.monotonic() - start < 10


def test_a_port_in_use_is_said_before_anything_is_loaded(output: Path) -> None:
    """With the option that names another one."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        serve = echo(output, "ok", taken.getsockname()[1])
        with (
            pytest.raises(InputError, match=r"Address already in use; name another one with --p"),
            running_server(serve),
        ):
            pass


def test_an_absent_program_is_said_with_its_container(
    output: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what installs it, where quantkit does."""
    monkeypatch.setenv("PATH", "")
    serve = quantkit.serve_command(plain, "tgi", gpu="L4")
    with pytest.raises(InputError, match=r"text-generation-launcher is not installed .*docker run"):
        find_program(serve)
    serve = quantkit.serve_command(output, "vllm", gpu="cpu", memory=8 << 30)
    with pytest.raises(InputError, match="quantkit runtimes install vllm"):
        find_program(serve)
    serve = quantkit.serve_command(output, "llama.cpp", gpu="cpu")
    assert find_program(serve).command[0] == sys.executable


_INTERRUPTED = """
import os, signal, sys
from quantkit.serving.starting import _spawn

os.register_at_fork(**{sys.argv[1]: lambda: signal.raise_signal(signal.SIGINT)})
try:
    _spawn(["sleep", "60"], {})
except KeyboardInterrupt:
    print("heard")
try:
    os.wait()
except ChildProcessError:
    print("ended")
"""


@pytest.mark.parametrize("moment", ["before", "after_in_parent"])
def test_a_signal_while_a_server_is_started_is_heard(moment: str) -> None:
    """And the server is ended."""
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, moment], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("heard\nended\n", "")
