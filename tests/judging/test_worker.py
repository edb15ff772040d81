"""What a parent does with workers that speak, or end, without being asked."""

from __future__ import annotations

import queue
import sys
from pathlib import Path

import pytest

from quantkit.errors import WorkerError
from quantkit.judging.worker import MAX_ANSWER, Answers, Pair, WorkerProcess, are_tokens

_ECHO = """
import sys
for line in sys.stdin:
    print('{"ok": true}', flush=True)
"""
_ENDS = "import sys; sys.exit(7)"
_SPEAKS = "import sys; print('hello', flush=True); sys.stdin.read()"
_FLOODS = """
import sys
while True:
    print("x" * 100_000)
"""


def start(tmp_path: Path, role: str, text: str, answers: Answers) -> WorkerProcess:
    """Start a worker that is a few lines of Python."""
    script = tmp_path / f"{role}.py"
    script.write_text(text)
    return WorkerProcess(role, [sys.executable, "-S", str(script)], answers, threads=1)


@pytest.mark.parametrize(
    ("text", "words"),
    [(_ENDS, "ended with exit code 7"), (_SPEAKS, "spoke unasked: 'hello'")],
    ids=["ends", "speaks"],
)
def test_a_worker_that_was_not_asked_is_named(tmp_path: Path, text: str, words: str) -> None:
    """While the other one is asked, the baseline says something, or is no more."""
    answers: Answers = queue.Queue()
    workers = [
        start(tmp_path, "baseline", text, answers),
        start(tmp_path, "candidate", "import sys; sys.stdin.read()", answers),
    ]
    try:
        with pytest.raises(WorkerError, match=f"the baseline's worker {words}"):
            Pair(workers, answers, 60).ask_candidate({"op": "usage"})
    finally:
        for worker in workers:
            worker.stop()


def test_what_was_said_before_a_request_is_no_answer_to_it(tmp_path: Path) -> None:
    """It would pass for one, and every later answer for one too early."""
    answers: Answers = queue.Queue()
    workers = [start(tmp_path, role, _ECHO, answers) for role in ("baseline", "candidate")]
    try:
        answers.put(("candidate", '{"ok": true, "memory_bytes": 1}'))
        with pytest.raises(WorkerError, match="the candidate's worker spoke unasked"):
            Pair(workers, answers, 60).ask({"op": "usage"}, {"op": "usage"})
    finally:
        for worker in workers:
            worker.stop()


def test_a_worker_that_never_stops_talking_is_not_listened_to(tmp_path: Path) -> None:
    """What nobody takes would fill the memory: a few lines are kept, then its end."""
    answers: Answers = queue.Queue()
    worker = start(tmp_path, "candidate", _FLOODS, answers)
    try:
        lines = [answers.get(timeout=60)[1]]
        while lines[-1] is not None:
            lines.append(answers.get(timeout=60)[1])
        assert 1 < len(lines) < 10
        assert all(len(line) <= MAX_ANSWER for line in lines if line is not None)
    finally:
        worker.stop()


@pytest.mark.parametrize("value", [None, "12", [1, -1], [2**31], [True], [1.0], [[1]]])
def test_what_no_tokenizer_can_take_is_no_token(value: object) -> None:
    """Each would be an error of a library, far from the worker that said it."""
    assert not are_tokens(value)
    assert are_tokens([0, 5])
