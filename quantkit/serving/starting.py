"""Running a server: waiting until it answers, asking it once, and ending all that it started."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from quantkit.errors import InputError, WorkerError
from quantkit.masking import hide_tokens
from quantkit.serving.programs import find_program
from quantkit.serving.records import ServeCommand, reachable
from quantkit.signals import signals_held

PROMPT = "Say hello in one sentence."
"""What the check asks."""
ANSWER_TOKENS = 32
START_SECONDS = 900.0
"""How long a server may take until it answers; large models are read from slow disks."""
STOP_SECONDS = 10.0
"""How long a server may take to end when it is asked to."""

_LAST_LINES = 12
_LINE_WIDTH = 300
_POLL_SECONDS = 0.3
_REQUEST_SECONDS = 300.0
"""How long a whole answer may take, however it is divided."""
_HEALTH_SECONDS = 5.0
_MOST_BYTES = 1 << 22
_NO_ANSWER = (OSError, ValueError, RecursionError, http.client.HTTPException)
"""What a request raises where the other side is silent, or speaks something else than HTTP."""
_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class ChatAnswer:
    """What a server said to one chat completion."""

    model: str
    content: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True)
class RunningServer:
    """A server that answers."""

    serve: ServeCommand
    process: subprocess.Popen[str]
    words: deque[str]
    """Its last lines."""

    def ask(self) -> ChatAnswer:
        """Have it answer one chat completion.

        Raises:
            WorkerError: it died, refuses, or answers something else.
        """
        body = {
            "model": self.serve.model_name,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
        }
        try:
            found = _request(self.serve, f"{self.serve.url}/chat/completions", body)
        except _NO_ANSWER as error:
            raise self.failure(f"does not answer a chat completion: {error}") from None
        return _read_answer(found, self)

    def wait(self) -> None:
        """Stay until the server ends, which it should not.

        Raises:
            WorkerError: it ended.
        """
        self.process.wait()
        raise self.failure(_ending(self.process))

    def failure(self, what: str) -> WorkerError:
        """Return an error with the server's last lines."""
        said = "\n".join(f"  | {line}" for line in self.words)
        return WorkerError(
            f"the {self.serve.runtime} server {what}"
            + (f"; its last lines:\n{said}" if said else "; it said nothing")
        )


@contextmanager
def running_server(
    serve: ServeCommand, *, timeout: float = START_SECONDS, tell: Tell | None = None
) -> Iterator[RunningServer]:
    """Start a server, wait until it answers, and end it and all that it started afterwards.

    Args:
        serve: of `serve_command`.
        timeout: seconds that it may take until it answers.
        tell: called with each line that the server says.

    Raises:
        InputError: it is not installed, or the port is in use.
        WorkerError: it ended, or did not answer in time; with its last lines.
    """
    found = find_program(serve)
    _check_port(serve)
    with tempfile.TemporaryDirectory(prefix="quantkit-serve-") as scratch:
        for name, text in serve.files.items():
            (Path(scratch) / name).write_text(text, encoding="utf-8")
        command = _in_folder(found.command, serve.files, scratch)
        process = _spawn(command, serve.environment)
        words: deque[str] = deque(maxlen=_LAST_LINES)
        assert process.stdout is not None
        listener = threading.Thread(target=_listen, args=(process.stdout, words, tell), daemon=True)
        listener.start()
        server = RunningServer(serve, process, words)
        try:
            _await_health(server, time.monotonic() + timeout, timeout)
            for each in serve.setup:
                _set_up(_in_folder(each, serve.files, scratch), server)
            yield server
        finally:
            _stop(process)
            listener.join(timeout=2)


def _in_folder(command: Sequence[str], files: Mapping[str, str], folder: str) -> tuple[str, ...]:
    """The command with the files that it names where they were written."""
    return tuple(str(Path(folder) / word) if word in files else word for word in command)


def _check_port(serve: ServeCommand) -> None:
    """Refuse a port that somebody listens on, before minutes of loading.

    Raises:
        InputError: it is in use, or the address is not one of this machine.
    """
    try:
        places = socket.getaddrinfo(serve.host, serve.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = places[0]
        with socket.socket(family, kind, protocol) as probe:
            # A port that only waits for its last packets is free to a server.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        words = error.strerror or str(error)
        raise InputError(
            f"cannot listen on {serve.host} port {serve.port}: {words}; name another one with "
            f"--port, or another address with --host"
        ) from None


def _spawn(command: Sequence[str], added: Mapping[str, str]) -> subprocess.Popen[str]:
    environment = {**os.environ, **added}
    if command[0] != sys.executable:
        # Another interpreter must not see our packages.
        for name in ("PYTHONPATH", "PYTHONHOME"):
            environment.pop(name, None)
    if list(command[1:2]) == ["-m"]:
        # Else modules would be taken from the working folder, which may be a stranger's.
        environment["PYTHONSAFEPATH"] = "1"
    started: list[subprocess.Popen[str]] = []
    try:
        with signals_held():
            started.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    text=True,
                    encoding="utf-8",
                    errors="replace",
                    # A group of its own: Ctrl-C reaches the parent alone, which stops the group.
                    start_new_session=True,
                    preexec_fn=_dying_with_parent(),
                )
            )
    except OSError as error:
        raise InputError(f"cannot start {command[0]}: {error.strerror or error}") from None
    except BaseException:
        # A signal that was held: nobody else knows the process.
        for process in started:
            _stop(process)
        raise
    return started[0]


def _dying_with_parent() -> Callable[[], object] | None:
    """What a child calls so that the kernel ends it when its parent is killed; on Linux alone.

    The function is looked up here: between fork and exec as little as possible should happen.
    """
    if sys.platform != "linux":
        return None
    return partial(ctypes.CDLL(None).prctl, _DIE_WITH_PARENT, signal.SIGTERM)


def _listen(pipe: IO[str], words: deque[str], tell: Tell | None) -> None:
    with pipe:
        for line in iter(lambda: pipe.readline(_MOST_BYTES), ""):
            clean = hide_tokens("".join(c if c.isprintable() else " " for c in line).rstrip())
            if clean:
                words.append(clean[:_LINE_WIDTH])
                if tell is not None:
                    tell(clean)


def _await_health(server: RunningServer, deadline: float, timeout: float) -> None:
    """Wait until the server answers at its health path.

    Raises:
        WorkerError: it ended, or the time is over.
    """
    serve = server.serve
    address = f"http://{reachable(serve.host)}:{serve.port}{serve.health}"
    while server.process.poll() is None:
        left = max(_POLL_SECONDS, min(_HEALTH_SECONDS, deadline - time.monotonic()))
        with (
            contextlib.suppress(*_NO_ANSWER),
            _open(serve, "GET", address, left),
        ):
            # The status says all.
            return
        if time.monotonic() > deadline:
            raise server.failure(f"did not answer at {address} within {timeout:g} seconds")
        time.sleep(_POLL_SECONDS)
    # What it said last comes in after its end.
    time.sleep(_POLL_SECONDS)
    raise server.failure(_ending(server.process))


def _set_up(command: Sequence[str], server: RunningServer) -> None:
    """Run a command that the server needs before its first request.

    Raises:
        WorkerError: it fails.
    """
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        said = " | ".join((done.stderr or done.stdout).split("\n")[-4:])[-_LINE_WIDTH:]
        raise server.failure(f"cannot be set up: {' '.join(command)} failed: {said}")


def _stop(process: subprocess.Popen[str]) -> None:
    """Ask the server to end, and kill what is left of its group when it has not."""
    deadline = time.monotonic() + STOP_SECONDS
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    # A second Ctrl-C ends the waiting, not the stopping.
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.wait(timeout=max(0.0, deadline - time.monotonic()))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ending(process: subprocess.Popen[str]) -> str:
    code = process.poll()
    if code is not None and code < 0:
        return f"was killed by signal {-code}"
    return f"ended with exit code {code}"


def _request(serve: ServeCommand, address: str, body: Mapping[str, Any]) -> Any:
    """Post `body`, and read the JSON that comes back.

    Raises:
        OSError, ValueError, RecursionError, http.client.HTTPException: as in `_NO_ANSWER`.
    """
    with _open(serve, "POST", address, _REQUEST_SECONDS, json.dumps(body).encode()) as answer:
        found = answer.read(_MOST_BYTES)
    return json.loads(found)


@contextmanager
def _open(
    serve: ServeCommand, method: str, address: str, seconds: float, body: bytes | None = None
) -> Iterator[http.client.HTTPResponse]:
    """Send a request, past any proxy, with the key that the server was given.

    Args:
        seconds: after these the connection ends, whatever was read until then.

    Raises:
        ValueError: the status is not one of success.
        OSError, http.client.HTTPException: there is no answer, or none that is whole in time.
    """
    place = urlsplit(address)
    assert place.hostname is not None
    headers = {"Connection": "close"}
    key = os.environ.get(serve.api_key_variable or "")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    if body is not None:
        headers["Content-Type"] = "application/json"
    deadline = time.monotonic() + seconds
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=seconds)
    with contextlib.closing(connection):
        connection.connect()
        # Its own limit is for each read: an answer of single bytes would never reach it.
        alarm = threading.Timer(seconds, _hang_up, (connection.sock,))
        alarm.daemon = True
        alarm.start()
        try:
            connection.request(method, place.path, body, headers)
            with connection.getresponse() as answer:
                if not 200 <= answer.status < 300:
                    words = answer.read(_LINE_WIDTH).decode("utf-8", "replace")
                    raise ValueError(f"status {answer.status}: {' '.join(words.split())}")
                yield answer
        except (OSError, http.client.HTTPException):
            if time.monotonic() < deadline:
                raise
        finally:
            alarm.cancel()
        if time.monotonic() >= deadline:
            raise TimeoutError(f"there is no whole answer after {seconds:g} seconds")


def _hang_up(connection: socket.socket) -> None:
    """End a connection under a thread that reads from it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _read_answer(found: Any, server: RunningServer) -> ChatAnswer:
    """Take apart a chat completion.

    Raises:
        WorkerError: it is none.
    """
    try:
        choice = found["choices"][0]
        message = choice["message"]
        content = message.get("content") or message.get("reasoning_content") or ""
        usage = found.get("usage") or {}
        answer = ChatAnswer(
            model=str(found.get("model", "")),
            content=content,
            finish_reason=str(choice.get("finish_reason")),
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
        )
        if message.get("role") != "assistant" or not isinstance(content, str):
            raise ValueError
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        shown = json.dumps(found)[:_LINE_WIDTH]
        raise server.failure(f"answers no chat completion: {shown}") from None
    return answer
