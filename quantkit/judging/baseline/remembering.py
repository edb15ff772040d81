"""The baseline's worker with a memory: what the store holds is answered without its model.

To the gate it is a worker as any other. Its process starts at once and says its versions, for which
it imports nothing; the model is loaded at the first request that the store cannot answer.
"""

from __future__ import annotations

import json
import math
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import ResourceError, WorkerError
from quantkit.judging.baseline.fingerprint import (
    FORMAT,
    FileStates,
    describe_worker,
    digest,
    hash_files,
    look_at_files,
)
from quantkit.judging.baseline.store import AnswerStore, Draft
from quantkit.judging.worker import (
    Answer,
    Answers,
    Outlet,
    StartWorker,
    Worker,
    WorkerProcess,
    are_tokens,
)

_KEPT = frozenset({"logits", "encode", "generate", "continue"})
"""Requests whose answer depends on the model and the request alone. Those that measure time or
memory do not."""
_MODEL_FREE = frozenset({"versions", "exit"})
"""Requests that a worker answers before it has loaded anything."""
_MEASURED = frozenset({"load_seconds", "memory_bytes"})
"""What an answer to `load` says of this time only."""


@dataclass(frozen=True)
class _Model:
    """The model as far as the keys know it."""

    key: str
    """Of the answer to `load`; every other key is made of it and of that answer."""
    folder: Path
    files: FileStates
    """Their states before any of them was loaded."""


@dataclass(frozen=True)
class _Awaited:
    """A request that the process works on and whose answer is to be kept."""

    key: str
    request: Mapping[str, Any]


def start_with(store: AnswerStore | None, timeout_seconds: float) -> StartWorker:
    """Return what `running_pair` starts the baseline's worker with.

    Args:
        store: what is kept; None: the plain worker.
        timeout_seconds: how long a worker may be silent about one request.
    """
    if store is None:
        return WorkerProcess
    opened = store

    def start(role: str, command: Sequence[str], answers: Answers, threads: int) -> Worker:
        return RememberingWorker(
            role, command, answers, threads, store=opened, timeout_seconds=timeout_seconds
        )

    return start


class RememberingWorker:
    """A worker that looks into the store first and keeps there what its process answers."""

    def __init__(
        self,
        role: str,
        command: Sequence[str],
        answers: Outlet,
        threads: int,
        *,
        store: AnswerStore,
        timeout_seconds: float,
    ) -> None:
        self.role = role
        self._command = command
        self._threads = threads
        self._store = store
        self._timeout = timeout_seconds
        self._outlet = _Outlet(answers)
        self._process = WorkerProcess(role, command, self._outlet, threads)
        self._model: _Model | None = None
        self._loaded_as: dict[str, Any] = {}
        self._unloaded: Mapping[str, Any] | None = None
        self._awaited: _Awaited | None = None
        self._draft: Draft | None = None

    def ask(self, request: Mapping[str, Any]) -> None:
        """Answer from the store, or send the request on, after the model was loaded for it.

        Raises:
            WorkerError: the model cannot be loaded.
            ResourceError: it is not the one that the answers are of, or memory or disk ran out.
            MissingPackageError: as `Worker.read_answer`, while it is loaded.
        """
        if request["op"] == "load":
            self._ask_load(request)
        elif not self._answer_kept(request):
            if self._unloaded is not None and request["op"] == "usage":
                # The memory of a process without a model says nothing of the model.
                self._answer({"ok": True, "memory_bytes": None})
            else:
                if request["op"] not in _MODEL_FREE:
                    self._load_model()
                self._process.ask(request)
        # Hashing the last answer takes this process a while, in which the workers are busy.
        self._finish()

    def read_answer(self, line: str) -> dict[str, Any]:
        """Return the answer in `line`, and take hold of it for the store; as `Worker`."""
        answer = self._process.read_answer(line)
        awaited, self._awaited = self._awaited, None
        if awaited is None:
            return answer
        if awaited.request["op"] == "load":
            self._loaded_as = _essence(answer)
            if self._have_files_changed():
                return answer
            answered: Mapping[str, Any] = self._loaded_as
        else:
            answered = answer
        file = _file_of(awaited.request)
        if _is_whole(answered, awaited.request, file):
            self._draft = self._store.start(awaited.key, answered, file)
        return answer

    def death(self) -> WorkerError | ResourceError:
        """Return what to raise when the process has ended; as `Worker`."""
        return self._process.death()

    def error(self, what: str) -> WorkerError:
        """Return an error about the process; as `Worker`."""
        return self._process.error(what)

    def stop(self) -> None:
        """End the process, then keep the last answer."""
        try:
            self._process.stop()
        finally:
            self._finish()

    def _ask_load(self, request: Mapping[str, Any]) -> None:
        """Answer `load` as it was answered before for the same files, worker and machine."""
        self._unloaded, self._loaded_as = None, {}
        self._model = self._identify(request)
        kept = None if self._model is None else self._store.recall(self._model.key)
        if self._model is not None and kept is None:
            self._awaited = _Awaited(self._model.key, request)
        if kept is None:
            self._process.ask(request)
        else:
            self._unloaded, self._loaded_as = request, dict(kept.answer)
            self._answer(kept.answer)

    def _identify(self, request: Mapping[str, Any]) -> _Model | None:
        """Return what the model's answers depend on; None, with a note, where that is not known."""
        versions = self._ask_versions()
        if versions is None:
            self._store.say(
                f"the answers of the {self.role} are neither kept nor reused: its worker does not "
                "say its versions"
            )
            return None
        folder = Path(str(request["path"]))
        try:
            files = look_at_files(folder)
            depends = {
                "format": FORMAT,
                "files": hash_files(folder, files, self._store),
                "worker": describe_worker(self._command, self._threads, versions),
                "request": {name: value for name, value in request.items() if name != "path"},
            }
        except OSError as error:
            # A folder that cannot be read is the worker's to complain about.
            self._store.say(
                f"the answers of the {self.role} are neither kept nor reused: cannot read "
                f"{error.filename or folder}: {error.strerror or error}"
            )
            return None
        return _Model(digest(depends), folder, files)

    def _ask_versions(self) -> dict[str, str] | None:
        line = self._await({"op": "versions"})
        if line is None:
            # Dead already: `load` is what the gate hears that of.
            self._outlet.put((self.role, None))
            return None
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            return None
        versions = answer.get("versions") if isinstance(answer, dict) else None
        if not isinstance(versions, dict) or not versions:
            return None
        return {str(name): str(value) for name, value in versions.items()}

    def _answer_kept(self, request: Mapping[str, Any]) -> bool:
        """Answer from the store if it has the answer; else remember to keep it."""
        if self._model is None or request["op"] not in _KEPT:
            return False
        depends = {
            "model": self._model.key,
            "loaded_as": self._loaded_as,
            "request": {name: value for name, value in request.items() if name != "file"},
        }
        key, file = digest(depends), _file_of(request)
        kept = self._store.recall(key, file)
        self._store.count(kept, self._versions())
        if kept is None:
            self._awaited = _Awaited(key, request)
            return False
        if not _is_whole(kept.answer, request, file):
            self._store.forget(key)
            self._awaited = _Awaited(key, request)
            return False
        self._answer(kept.answer)
        return True

    def _load_model(self) -> None:
        """Send the request to load that the store answered, and compare the answers."""
        if self._unloaded is None:
            return
        request, self._unloaded = self._unloaded, None
        line = self._await(request)
        if line is None:
            raise self._process.death()
        found = _essence(self._process.read_answer(line))
        names = {*found, *self._loaded_as}
        different = [name for name in names if found.get(name) != self._loaded_as.get(name)]
        if self._model is not None and different:
            self._store.forget(self._model.key)
        if different or self._have_files_changed():
            raise ResourceError(
                f"the {self.role} does not load as when its kept answers were computed: its "
                f"{', '.join(sorted(different)) or 'files'} changed; repeat the gate"
            )

    def _have_files_changed(self) -> bool:
        """Whether other files may have been loaded than were hashed; then nothing is kept."""
        if self._model is None:
            return False
        try:
            changed = look_at_files(self._model.folder) != self._model.files
        except OSError:
            changed = True
        if changed:
            self._store.say(
                f"the answers of the {self.role} are neither kept nor reused: files in "
                f"{self._model.folder} changed while it was loaded"
            )
            self._model = None
        return changed

    def _versions(self) -> str:
        versions = self._loaded_as.get("versions")
        if not isinstance(versions, dict):
            return ""
        return ", ".join(f"{name} {value}" for name, value in sorted(versions.items()))

    def _answer(self, answer: Mapping[str, Any]) -> None:
        self._outlet.put((self.role, json.dumps(answer)))

    def _await(self, request: Mapping[str, Any]) -> str | None:
        """Ask the process and wait for its line, which the gate does not see."""
        with self._outlet.diverted() as own:
            self._process.ask(request)
            try:
                return own.get(timeout=self._timeout)[1]
            except queue.Empty:
                raise self._process.error(f"was silent for {self._timeout:g} seconds") from None

    def _finish(self) -> None:
        draft, self._draft = self._draft, None
        if draft is not None:
            self._store.finish(draft)


class _Outlet:
    """Where the lines of a process go: to the gate, or aside while it is asked for ourselves."""

    def __init__(self, answers: Outlet) -> None:
        self._answers = answers
        self._aside: Answers | None = None
        self._lock = threading.Lock()

    def put(self, item: Answer, /) -> None:
        """Pass a line on."""
        with self._lock:
            (self._answers if self._aside is None else self._aside).put(item)

    @contextmanager
    def diverted(self) -> Iterator[Answers]:
        """Yield a queue of the lines that come inside; the gate gets those that are left in it."""
        own: Answers = queue.Queue()
        with self._lock:
            self._aside = own
        try:
            yield own
        finally:
            with self._lock:
                self._aside = None
                while not own.empty():
                    self._answers.put(own.get())


def _essence(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer to `load` says of the model, as it comes back from the store."""
    return {name: value for name, value in answer.items() if name not in _MEASURED}


def _file_of(request: Mapping[str, Any]) -> Path | None:
    return Path(str(request["file"])) if "file" in request else None


def _is_whole(answer: Mapping[str, Any], request: Mapping[str, Any], file: Path | None) -> bool:
    """Whether an answer is worth keeping: what the gate would refuse is asked for again.

    Logits and encodings must be finite float32 of the shape that the answer says; continuations
    must be token ids.
    """
    if request["op"] == "load":
        return isinstance(answer.get("versions"), dict)
    if request["op"] == "generate":
        return are_tokens(answer.get("ids"))
    if request["op"] == "continue":
        rows = answer.get("ids")
        if not isinstance(rows, list) or len(rows) != len(request["prompts"]):
            return False
        return all(map(are_tokens, rows))
    shape = answer.get("shape")
    if file is None or answer.get("finite") is not True or not isinstance(shape, list):
        return False
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        return False
    return file.is_file() and file.stat().st_size == 4 * math.prod(shape)
