"""What workers answer, and the files that they write: the parent believes none of it."""

from __future__ import annotations

import json
import queue
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import ResourceError, WorkerError
from quantkit.judging.evaluate import _ask_memory
from quantkit.judging.handles import Connection
from quantkit.judging.loading import check_ids, load_models
from quantkit.judging.probing.answers import continue_prompts, probe_endings, probe_loops
from quantkit.judging.probing.prompts import Prompt
from quantkit.judging.scoring import plan_batches, score_windows
from quantkit.judging.worker import MAX_ANSWER, Answers, Pair, WorkerProcess
from quantkit.records import TokenWindows
from tests.fuzzing.damage import BYTES
from tests.fuzzing.reader import Reader
from tests.fuzzing.trees import damage_json, replace_values

_ROLES = ("baseline", "candidate")
_VOCABULARY, _IDS = 11, np.array([[1, 2, 3, 4, 5, 6], [2, 4, 6, 8, 10, 0]])
_LINES = (
    *(
        b"",
        b"hello",
        b"[true]",
        b'{"ok": 1}',
        b'{"ok": true}',
        b"[" * 200_000,
        b"9" * 6000,
        b"\xff",
    ),
    *(b'{"ok": false}', b'{"ok": false, "error": "\\u001b[2J", "kind": "other"}', b"x" * 1_100_000),
    *(b'{"ok": false, "kind": "memory"}', b'{"ok": false, "kind": [], "package": {"a": 1}}'),
    *(b'{"ok": false, "kind": "package", "package": null}', b'{"ok": false, "kind": "disk"}'),
    *(b'{"ok": true, "ids": [[]]}', b'{"ok": true, "shape": [1e400], "finite": true}', b"null"),
)
_VALUES: tuple[Any, ...] = (
    *(0, -1, True, 11.0, 2**31, 2**40, 2**70, 10**400, float("nan"), float("inf"), "11", None, []),
    *(
        [2, 6, 11.0],
        [2, 6, 2**40],
        [True],
        [2**70],
        [-5],
        [1.5],
        [[2**33]],
        [[-1]],
        {"a": 1},
        "x" * 9000,
    ),
    *({"fake": [1]}, {"\x1b[2J": "\x1b"}, [0] * 5000, [None]),
)


class _Script:
    """A `Worker` whose answers are the lines of a file."""

    read_answer = WorkerProcess.read_answer

    def __init__(self, role: str, folder: Path, answers: Answers) -> None:
        self.role = role
        self._asked = "start"
        self._python = "python"
        self._answers = answers
        self._logits = folder / f"{role}.f32"
        lines = (folder / f"{role}.jsonl").read_bytes().decode("utf-8", "replace").split("\n")
        self._lines = [line[:MAX_ANSWER] for line in lines]

    def ask(self, request: Mapping[str, Any]) -> None:
        """Answer with the next line; the files of logits are those of the sample."""
        self._asked = str(request["op"])
        if "file" in request:
            Path(request["file"]).write_bytes(self._logits.read_bytes())
        self._answers.put((self.role, self._lines.pop(0) if self._lines else None))

    def death(self) -> WorkerError | ResourceError:
        """It has said all that it has to say."""
        return self.error("ended")

    def error(self, what: str) -> WorkerError:
        """As a process has it."""
        return WorkerError(f"the {self.role}'s worker {what} during {self._asked!r}")

    def stop(self) -> None:
        """There is nothing to stop."""


def _build(folder: Path) -> None:
    (folder / "talk").mkdir()
    for number, role in enumerate(_ROLES):
        draw = np.random.default_rng(number)
        logits = draw.normal(size=(2, 6, _VOCABULARY)).astype(np.float32)
        logits.tofile(folder / "talk" / f"{role}.f32")
        lines: list[dict[str, Any]] = [
            {
                "vocab": _VOCABULARY,
                "versions": {"fake": "1"},
                "dtype": "float32",
                "device": "cpu",
                "positions": 64,
                "load_seconds": 0.5,
                "unexpected": ["a"],
                "kv_cache": "none",
            },
            {"shape": [2, 6, _VOCABULARY], "finite": True},
            {"ids": [[1, 2, 3], [4, 5]]},
        ]
        if role == "candidate":
            lines += [{"memory_bytes": 1 << 30}, {"ids": [1, 2]}]
        text = "\n".join(json.dumps({"ok": True, **line}) for line in lines)
        (folder / "talk" / f"{role}.jsonl").write_text(text)


def _read(folder: Path) -> object:
    answers: Answers = queue.Queue()
    pair = Pair([_Script(role, folder, answers) for role in _ROLES], answers, 5.0)
    setup = load_models(pair, folder, folder, "cpu", "transformers")
    check_ids(_IDS, setup.vocabulary)
    windows = TokenWindows(_IDS, np.ones(_IDS.shape, np.float32), "text", "0" * 64, ())
    batches = plan_batches(range(2), 6, vocabulary=setup.vocabulary, device=setup.device)
    work = folder.parent / "work"
    scores = list(score_windows(pair, windows, batches, setup.vocabulary, work))
    prompts = [Prompt("first", (1, 2)), Prompt("second", (3,))]
    continued = continue_prompts(pair, prompts, 3)
    found = _ask_memory(pair), Connection(pair, work).ask_ids(1, [1], 4)
    return scores, probe_loops(continued, 0.1), probe_endings(continued, 3, 0.1), found


def _in_line(damage: Any) -> Any:
    """Make the damage that changes one line."""

    def change(draw: random.Random, content: bytes) -> bytes:
        lines = content.split(b"\n")
        at = draw.randrange(len(lines))
        return b"\n".join([*lines[:at], damage(draw, lines[at]), *lines[at + 1 :]])

    return change


def _out_of_order(draw: random.Random, content: bytes) -> bytes:
    """Exchange, repeat or leave out answers."""
    lines = content.split(b"\n")
    return b"\n".join(draw.choices(lines, k=draw.randint(0, len(lines) + 2)))


READERS = (
    Reader(
        name="replies",
        build=_build,
        damages={
            "*.jsonl": (
                *(_in_line(damage_json), _in_line(replace_values(*_VALUES))) * 2,
                _in_line(lambda draw, line: draw.choice(_LINES)),
                _out_of_order,
                *BYTES,
            ),
            "*.f32": BYTES,
        },
        read=_read,
        exit_codes=frozenset({2, 3, 5}),
    ),
)
