"""A runtime worker as its parent sees it: a process that is asked, awaited and never trusted.

Each worker has threads of its own for its three pipes, so that neither a worker that reads nothing
nor one that prints without end can block or fill its parent. A fourth waits for its death, and ends
what it has started: a child that outlives it would hold its memory, and its pipes open.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, TypeGuard

from quantkit.errors import InputError, MissingPackageError, ResourceError, WorkerError
from quantkit.masking import clean_line, without_secrets

MAX_ANSWER = 1 << 20
"""Characters of an answer; a longer one is nonsense."""

_MOST_UNASKED = 4
"""Lines that a worker may say besides its answers, before nobody listens any more."""
_MOST_TOKENS = 1 << 31
_LAST_WORDS = 5
_WORDS_WIDTH = 600

Answer = tuple[str, str | None]
"""(role, line) as a worker speaks; None for the line when its output ended."""
Answers = queue.Queue[Answer]


class Outlet(Protocol):
    """Where a worker's lines go: a queue, or what passes them on to one."""

    def put(self, item: Answer, /) -> None:
        """Take a line, from any thread."""


class Worker(Protocol):
    """A worker, as the gate speaks with it: a process, or one with a memory before it."""

    role: str
    """What messages call it: `baseline` or `candidate`."""

    def ask(self, request: Mapping[str, Any]) -> None:
        """Send one request; it must not be sent before the last one was answered."""

    def read_answer(self, line: str) -> dict[str, Any]:
        """Return the answer in `line` if it is one and says that all went well.

        Raises:
            WorkerError: it is not, or the worker says that it failed.
            ResourceError: the worker ran out of memory or disk.
            MissingPackageError: the worker's interpreter lacks a package.
        """

    def death(self) -> WorkerError | ResourceError:
        """Return what to raise when the output has ended: how the worker died, its last words.

        SIGKILL is what the kernel sends where memory runs out, and nothing that a model does.
        """

    def error(self, what: str) -> WorkerError:
        """Return a `WorkerError` that says who, what, during which request, and the last words."""

    def stop(self) -> None:
        """End the process and everything that it started, at once: it holds nothing to save."""


StartWorker = Callable[[str, Sequence[str], Answers, int], Worker]
"""(role, command, where its lines go, threads of its arithmetic) -> the started worker."""


class WorkerProcess:
    """A `Worker` that is one running process."""

    def __init__(self, role: str, command: Sequence[str], answers: Outlet, threads: int) -> None:
        self.role = role
        self._asked = "start"
        self._python = command[0]
        self._answers = answers
        self._requests: queue.Queue[str | None] = queue.Queue()
        self._requests_sent = 0
        self._words: deque[str] = deque(maxlen=_LAST_WORDS)
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=child_environment(os.environ, threads, own=command[0] == sys.executable),
                text=True,
                encoding="utf-8",
                errors="replace",
                # A group of its own: Ctrl-C reaches the parent alone, which then stops the group.
                start_new_session=True,
            )
        except OSError as error:
            raise InputError(
                f"cannot start the interpreter {command[0]}: {error.strerror or error};"
                " see gate.python in the recipe"
            ) from error
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._bury, self._send, self._listen, self._overhear)
        ]
        for thread in self._threads:
            thread.start()

    def ask(self, request: Mapping[str, Any]) -> None:
        """Send one request; as `Worker`."""
        self._asked = str(request["op"])
        self._requests_sent += 1
        self._requests.put(json.dumps(request) + "\n")

    def read_answer(self, line: str) -> dict[str, Any]:
        """Return the answer in `line`; raises as `Worker.read_answer`."""
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            raise self.error(f"answered nonsense: {clean_line(line)[:80]!r}") from None
        if not isinstance(answer, dict) or not isinstance(answer.get("ok"), bool):
            raise self.error(f"answered nonsense: {clean_line(line)[:80]!r}")
        if answer["ok"]:
            return answer
        words = clean_line(str(answer.get("error", "no reason given"))[:_WORDS_WIDTH])
        if answer.get("kind") in ("memory", "disk"):
            hint = "; TMPDIR names the folder of its files" if answer["kind"] == "disk" else ""
            raise ResourceError(
                f"the {self.role}'s worker ran out of {answer['kind']}: {words}{hint}"
            )
        if answer.get("kind") == "package":
            raise MissingPackageError(
                clean_line(str(answer.get("package") or "compressed-tensors")),
                f"judging the {self.role}",
                f"install it for {self._python} ({words})",
            )
        raise self.error(f"failed at {self._asked!r}: {words}")

    def death(self) -> WorkerError | ResourceError:
        """Return how the process died; as `Worker`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=2)
        code = self.process.poll()
        if code is None:
            return self.error("closed its output")
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
            if name == "SIGKILL":
                lacking = "was killed by SIGKILL, as the kernel does when memory runs out"
                return ResourceError(str(self.error(lacking)))
            return self.error(f"was killed by {name}")
        return self.error(f"ended with exit code {code}")

    def error(self, what: str) -> WorkerError:
        """Return an error about the process; as `Worker`."""
        if self.process.poll() is not None:
            self._threads[-1].join(timeout=2)
        words = " | ".join(self._words)[-_WORDS_WIDTH:]
        said = f"; its last words: {words}" if words else "; it said nothing"
        during = "" if what.startswith("failed at") else f" during {self._asked!r}"
        return WorkerError(f"the {self.role}'s worker {what}{during}{said}")

    def stop(self) -> None:
        """End the process and all that it started; as `Worker`."""
        if self.process.poll() is None:
            _kill_group(self.process)
        self.process.wait()
        self._requests.put(None)
        for thread in self._threads:
            thread.join(timeout=2)

    def _bury(self) -> None:
        self.process.wait()
        _kill_group(self.process)

    def _send(self) -> None:
        assert self.process.stdin is not None
        # A dead worker breaks the pipe; its end is told by the end of its output.
        with contextlib.suppress(OSError), self.process.stdin as pipe:
            for line in iter(self._requests.get, None):
                pipe.write(line)
                pipe.flush()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as pipe:
            for number, line in enumerate(_bounded_lines(pipe, MAX_ANSWER), 1):
                self._answers.put((self.role, line))
                # Nobody takes what comes unasked: it would fill the memory.
                if number > self._requests_sent + _MOST_UNASKED:
                    break
        self._answers.put((self.role, None))

    def _overhear(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as pipe:
            for line in _bounded_lines(pipe, MAX_ANSWER):
                if line.strip():
                    self._words.append(clean_line(line))


def collect(
    workers: Sequence[Worker],
    answers: Answers,
    timeout_seconds: float,
    idle: Sequence[Worker] = (),
) -> list[dict[str, Any]]:
    """Wait until each worker has answered once, and return the answers in the workers' order.

    Args:
        workers: that were asked.
        answers: what they and the others say.
        timeout_seconds: after which it takes too long.
        idle: the others, which were not asked.

    Raises:
        WorkerError: a worker died, was silent for `timeout_seconds`, or answered nonsense.
        ResourceError: as `Worker.death` and `Worker.read_answer`.
        MissingPackageError: as `Worker.read_answer`.
    """
    by_role = {worker.role: worker for worker in (*workers, *idle)}
    got: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(got) < len(workers):
        try:
            role, line = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            silent = next(worker for worker in workers if worker.role not in got)
            raise silent.error(f"was silent for {timeout_seconds:g} seconds") from None
        if line is None:
            raise by_role[role].death()
        if role in got or by_role[role] in idle:
            raise _refuse_unasked(by_role[role], line)
        got[role] = by_role[role].read_answer(line)
    return [got[worker.role] for worker in workers]


def _refuse_unasked(worker: Worker, line: str) -> WorkerError:
    return worker.error(f"spoke unasked: {clean_line(line)[:80]!r}")


class Pair:
    """The baseline's and the candidate's worker, which are asked in step."""

    def __init__(self, workers: Sequence[Worker], answers: Answers, timeout: float) -> None:
        self.workers = workers
        self._answers = answers
        self._timeout = timeout

    def ask(self, baseline: Mapping[str, Any], candidate: Mapping[str, Any]) -> None:
        """Send a request to each; both must have answered the last one."""
        self._check_quiet()
        # The candidate first: the baseline may be answered from a store, here and now.
        self.workers[1].ask(candidate)
        self.workers[0].ask(baseline)

    def answers(self) -> list[dict[str, Any]]:
        """Wait for both answers; raises as `collect`."""
        return collect(self.workers, self._answers, self._timeout)

    def ask_candidate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request to the candidate's worker alone and wait; raises as `collect`."""
        return self.ask_one(1, request)

    def ask_one(self, which: int, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request to worker 0 or 1 while the other has nothing to do; as `collect`."""
        self._check_quiet()
        self.workers[which].ask(request)
        asked, idle = self.workers[which], self.workers[1 - which]
        return collect([asked], self._answers, self._timeout, [idle])[0]

    def _check_quiet(self) -> None:
        """Refuse what was said since the last answers: it would pass for the next ones."""
        try:
            role, line = self._answers.get_nowait()
        except queue.Empty:
            return
        worker = next(each for each in self.workers if each.role == role)
        raise worker.death() if line is None else _refuse_unasked(worker, line)


@contextmanager
def running_pair(
    baseline: Sequence[str],
    candidate: Sequence[str],
    timeout: float,
    *,
    threads: int | None = None,
    start_baseline: StartWorker | None = None,
) -> Iterator[Pair]:
    """Start each worker with its command; stop them whatever happens inside.

    Args:
        baseline: interpreter and script of the baseline's worker.
        candidate: and of the candidate's.
        timeout: how long a worker may be silent about one request, in seconds.
        threads: of each worker's arithmetic; None: half of the cores.
        start_baseline: starts the baseline's worker, with what it remembers; None: without memory.
    """
    answers: Answers = queue.Queue()
    threads = threads or worker_threads()
    with contextlib.ExitStack() as running:
        first = (start_baseline or WorkerProcess)("baseline", baseline, answers, threads)
        running.callback(first.stop)
        second = WorkerProcess("candidate", candidate, answers, threads)
        running.callback(second.stop)
        yield Pair((first, second), answers, timeout)


def are_tokens(value: object) -> TypeGuard[list[int]]:
    """Whether a worker's answer is a list of token ids, as tokenizers can take them."""
    return isinstance(value, list) and all(
        type(token) is int and 0 <= token < _MOST_TOKENS for token in value
    )


def machine_threads() -> int:
    """Threads of a worker that computes alone: the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    wish = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(wish) if wish.isdecimal() and int(wish) else cores))


def worker_threads() -> int:
    """Threads of each of the two workers: half of the cores that this process may use."""
    return max(1, machine_threads() // 2)


def child_environment(
    environment: Mapping[str, str], threads: int, *, own: bool = True
) -> dict[str, str]:
    """Return `environment` for a worker: offline, quiet, and without tokens or keys.

    Args:
        environment: usually `os.environ`.
        threads: threads of the worker's arithmetic.
        own: whether it runs under this interpreter; another one must not see our PYTHONPATH.
    """
    child = without_secrets(environment)
    if not own:
        for name in ("PYTHONPATH", "PYTHONHOME"):
            child.pop(name, None)
    return child | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONSAFEPATH": "1",
    }


def find_interpreter(python: str | None) -> str:
    """Return the program that runs workers; None means this interpreter.

    Raises:
        InputError: there is no such program, or it may not be run.
    """
    found = sys.executable if python is None else shutil.which(python)
    if found is None:
        raise InputError(
            f"cannot start the interpreter {python}: there is no such program;"
            " see gate.python in the recipe"
        )
    return found


def worker_command(python: str | None, script: Path) -> list[str]:
    """Return the command line of a worker; raises as `find_interpreter`."""
    return [find_interpreter(python), str(script)]


def _bounded_lines(pipe: IO[str], longest: int) -> Iterator[str]:
    return iter(lambda: pipe.readline(longest), "")


def _kill_group(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it has started, as far as they live."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
