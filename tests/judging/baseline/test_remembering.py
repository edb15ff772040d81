"""Tests of quantkit.judging.baseline.remembering: a second run computes nothing of the baseline."""

from __future__ import annotations

import json
import os
import queue
import sys
import time
from pathlib import Path

import pytest

from quantkit.errors import ResourceError, WorkerError
from quantkit.judging.baseline.entries import digest_body
from quantkit.judging.baseline.remembering import start_with
from quantkit.judging.baseline.store import describe_store, open_store
from quantkit.judging.evaluate import WORKERS
from quantkit.judging.worker import Answers, Worker, WorkerProcess, collect
from tests.helpers import make_pico_model
from tests.judging.baseline.conversation import ROWS, Bench, make_bench, run_gate

ALL = ["start", "versions", "load", "logits", "logits", "generate"]
NONE = ["start", "versions"]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("FAKE_VERSION", "1.0")
    monkeypatch.setenv("LOG_FILE", str(tmp_path / "log.txt"))
    return make_bench(tmp_path)


def test_a_second_run_gets_the_same_bytes_and_loads_no_model(bench: Bench) -> None:
    """Only the time of loading, which nobody measured, is not told again."""
    plain = run_gate(bench, enabled=False)
    first = run_gate(bench)
    second = run_gate(bench)

    assert first.asked == ALL
    assert second.asked == NONE
    assert first.logits == second.logits == plain.logits
    assert first.answers == plain.answers
    assert first.answers[0].pop("load_seconds") == 1.25
    assert second.answers == first.answers
    assert first.notes == ()
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert second.notes == (
        "3 of 3 answers of the baseline were not computed again: they were kept, computed on "
        f"{today} by fake 1.0 from the same files",
    )


def test_a_real_runtime_is_remembered(bench: Bench) -> None:
    """A small Llama in transformers: every number again, and no time of loading."""
    model = make_pico_model(bench.folder / "pico")
    (model / "model.json").write_bytes((bench.model / "model.json").read_bytes())
    real = Bench(bench.folder, model, WORKERS["transformers"], bench.log)

    first, second = run_gate(real), run_gate(real)

    assert second.logits == first.logits
    assert first.answers[0].pop("load_seconds") > 0
    assert second.answers == first.answers
    assert second.notes[0].startswith("3 of 3 answers of the baseline were not computed again")


def test_the_model_is_loaded_at_the_first_request_that_was_not_kept(bench: Bench) -> None:
    """What follows may be kept again, and what the process answers is added."""
    run_gate(bench, ROWS[:1])

    mixed = run_gate(bench, [*ROWS, ROWS[0]])

    assert mixed.asked == ["start", "versions", "load", "logits"]
    assert mixed.logits[0] == mixed.logits[2] != mixed.logits[1]
    assert mixed.notes[0].startswith("3 of 4 answers")
    assert run_gate(bench, [*ROWS, ROWS[0]]).asked == NONE


def test_a_copy_of_the_model_elsewhere_is_the_same_model(bench: Bench) -> None:
    """A baseline that is dequantized for each gate lies in another folder each time."""
    run_gate(bench)
    moved = bench.model.with_name("moved")
    moved.mkdir()
    (moved / "model.json").write_bytes((bench.model / "model.json").read_bytes())
    (moved / "README.md").write_text("prose is not read")

    assert run_gate(Bench(bench.folder, moved, bench.script, bench.log)).asked == NONE


def spoil_weight(bench: Bench) -> None:
    path = bench.model / "model.json"
    other = path.with_suffix(".new")
    other.write_text(path.read_text().replace("0.5", "0.6"))
    # At once: a worker that reads it meanwhile sees the one or the other.
    other.replace(path)


def spoil_sibling(bench: Bench) -> None:
    bench.script.with_name("protocol.py").write_text("# part of the worker\n")


def spoil_script(bench: Bench) -> None:
    bench.script.write_text(bench.script.read_text() + "\n# another one\n")


@pytest.mark.parametrize("spoil", [spoil_weight, spoil_script, spoil_sibling])
def test_other_bytes_are_computed_again(bench: Bench, spoil: object) -> None:
    """A byte of the model, of the worker or of a script beside it makes another baseline."""
    assert callable(spoil)
    run_gate(bench)
    spoil(bench)

    assert run_gate(bench).asked == ALL


@pytest.mark.parametrize(
    ("name", "value"), [("FAKE_VERSION", "1.1"), ("CUDA_VISIBLE_DEVICES", "7"), ("LD_PRELOAD", "")]
)
def test_another_version_or_setting_is_computed_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """So is what a variable of the environment may change."""
    run_gate(bench)
    monkeypatch.setenv(name, value)

    assert run_gate(bench).asked == ALL


def test_other_threads_ids_or_prompts_are_computed_again(bench: Bench) -> None:
    """The whole request counts, in its order."""
    run_gate(bench)

    assert run_gate(bench, threads=2).asked == ALL
    assert run_gate(bench, ROWS[::-1], prompts=[]).asked == NONE
    other = [[[1, 2, 3], [4, 5, 7]], ROWS[1]]
    assert run_gate(bench, other).asked == ["start", "versions", "load", "logits"]
    assert run_gate(bench, prompts=[[5, 6, 8]]).asked == ["start", "versions", "load", "generate"]


def entries_with(bench: Bench, name: str) -> list[Path]:
    return sorted(describe_store().folder.glob(f"*/{name}"))


@pytest.mark.parametrize("name", ["data", "answer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_a_damaged_entry_is_computed_again_and_mended(bench: Bench, name: str, damage: str) -> None:
    """The note says so; what is read afterwards is whole."""
    first = run_gate(bench)
    for path in entries_with(bench, name):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        whole = {"flip": bytes(content), "cut": bytes(content[:-1]), "empty": b""}
        path.unlink()
        if damage != "remove":
            path.write_bytes(whole[damage])

    second = run_gate(bench)

    assert second.logits == first.logits
    assert second.asked == (ALL if name == "answer.json" else ALL[:-1])
    assert any("damaged and is computed again" in note for note in second.notes)
    third = run_gate(bench)
    assert (third.logits, third.asked) == (first.logits, NONE)
    assert len(third.notes) == 1


@pytest.mark.parametrize("fault", ["short", "nan"])
def test_what_the_gate_refuses_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Logits that are not finite, or too few, are asked for again."""
    monkeypatch.setenv("FAKE_VERSION", "1.0")
    monkeypatch.setenv("LOG_FILE", str(tmp_path / "log.txt"))
    bench = make_bench(tmp_path, fault=fault)
    run_gate(bench)

    assert run_gate(bench).asked == ["start", "versions", "load", "logits", "logits"]


def test_without_versions_nothing_is_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that does not say what it computes with may be another one tomorrow."""
    monkeypatch.delenv("FAKE_VERSION")

    for _ in range(2):
        seen = run_gate(bench)
        assert seen.asked == ALL
        assert "does not say its versions" in seen.notes[0]


def start(bench: Bench, answers: Answers) -> Worker:
    store = open_store(True)
    return start_with(store, 300.0)("baseline", [sys.executable, str(bench.script)], answers, 1)


def ask(worker: Worker, answers: Answers, **request: object) -> dict[str, object]:
    worker.ask(request)
    return collect([worker], answers, 300.0)[0]


def test_a_model_that_loads_otherwise_than_before_ends_the_gate(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two kinds of numbers are never mixed; the next gate starts anew."""
    run_gate(bench)
    monkeypatch.setenv("FAKE_DEVICE", "cuda")

    with pytest.raises(ResourceError, match="computed: its device changed"):
        run_gate(bench, [[[3, 2, 1]]])

    assert run_gate(bench).asked == ALL


def test_files_that_change_while_they_are_loaded_are_not_kept(bench: Bench) -> None:
    """What was hashed would not be what was computed with."""
    answers: Answers = queue.Queue()
    worker = start(bench, answers)
    worker.ask({"op": "load", "path": str(bench.model), "device": "cpu", "threads": 1})
    spoil_weight(bench)
    collect([worker], answers, 300.0)
    worker.stop()

    assert describe_store().entries == 0


def fail(bench: Bench, rows: list[list[list[int]]], *, enabled: bool) -> str:
    with pytest.raises(WorkerError) as caught:
        run_gate(bench, rows, enabled=enabled)
    return str(caught.value)


def test_a_worker_that_dies_says_the_same_with_a_memory_and_without(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it dies at its start or when it loads, which may be long after the gate's begin."""
    run_gate(bench)
    other = [[[9, 9]]]

    monkeypatch.setenv("FAKE_UNLOADABLE", "baseline")
    assert fail(bench, other, enabled=True) == fail(bench, other, enabled=False)
    assert run_gate(bench).asked == NONE

    (bench.model / "new.json").touch()
    loading = fail(bench, other, enabled=True)
    assert loading == fail(bench, other, enabled=False)
    assert "baseline's worker ended with exit code 1 during 'load'" in loading

    # It dies of `versions`, which the gate does not ask without a memory.
    monkeypatch.setenv("FAKE_DEAD", "baseline")
    assert fail(bench, other, enabled=True) == loading.replace("no model", "no breath left")


def test_what_measures_is_always_asked_anew_and_usage_without_a_model_is_unknown(
    bench: Bench,
) -> None:
    """Times are never kept; the memory of a process that loaded nothing would mislead."""
    run_gate(bench)
    answers: Answers = queue.Queue()
    worker = start(bench, answers)
    load = {"op": "load", "path": str(bench.model), "device": "cpu", "threads": 1}
    ask(worker, answers, **load)

    assert ask(worker, answers, op="usage") == {"ok": True, "memory_bytes": None}
    assert ask(worker, answers, op="time") == {"ok": True, "memory_bytes": 5}
    assert ask(worker, answers, op="usage") == {"ok": True, "memory_bytes": 5}
    assert ask(worker, answers, op="time") == {"ok": True, "memory_bytes": 5}
    worker.stop()
    assert bench.log.read_text().split()[1::2][-3:] == ["time", "usage", "time"]


def test_continuations_of_several_prompts_are_kept(bench: Bench) -> None:
    """As those of one are."""
    request = {"op": "continue", "prompts": [[4, 5], [6]], "max_new_tokens": 1}
    for _ in range(2):
        answers: Answers = queue.Queue()
        worker = start(bench, answers)
        ask(worker, answers, op="load", path=str(bench.model), device="cpu", threads=1)
        assert ask(worker, answers, **request) == {"ok": True, "ids": [[4], [6]]}
        worker.stop()

    assert bench.log.read_text().split()[1::2].count("continue") == 1


def test_no_process_outlives_its_worker(bench: Bench) -> None:
    """Whether the model was loaded or not."""
    run_gate(bench)
    answers: Answers = queue.Queue()
    worker = start(bench, answers)
    worker.ask({"op": "load", "path": str(bench.model), "device": "cpu", "threads": 1})
    inner = worker._process  # type: ignore[attr-defined]
    assert isinstance(inner, WorkerProcess)
    assert inner.process.poll() is None
    worker.stop()

    with pytest.raises(ProcessLookupError):
        os.kill(inner.process.pid, 0)


def test_without_a_store_the_worker_is_the_plain_one() -> None:
    assert start_with(None, 1.0) is WorkerProcess


def test_answers_that_are_no_answers_to_their_request_are_not_taken(bench: Bench) -> None:
    """Not even with the right checksum: what lies on a disk is checked like a worker's words."""
    run_gate(bench)
    for path in entries_with(bench, "answer.json"):
        text = path.read_text()
        if '"shape"' in text:
            body = json.loads(text)["body"]
            body["answer"]["shape"][0] += 1
            document = {"body": body, "sha256": digest_body(body)}
            path.write_text(json.dumps(document))

    assert run_gate(bench).asked == ["start", "versions", "load", "logits", "logits"]
