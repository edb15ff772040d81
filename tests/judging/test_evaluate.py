"""Tests of quantkit.judging.evaluate and .worker, with a worker whose model is a bigram table."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.errors import (
    ArtifactError,
    CalibrationError,
    InputError,
    MissingPackageError,
    QuantkitError,
    ResourceError,
    WorkerError,
)
from quantkit.judging import scoring as module
from quantkit.judging.evaluate import evaluate
from quantkit.judging.partings import show_token
from quantkit.judging.sampling import shuffle_windows
from quantkit.judging.tasks.loading import LoadedTask
from quantkit.judging.verdict import judge
from quantkit.judging.worker import Answers, WorkerProcess, child_environment, worker_threads
from quantkit.recipe import GateSpec, ProbesSpec
from quantkit.recipe.judging import TaskSpec
from quantkit.records import EvalResult, Event, TokenWindows
from tests.helpers import write_pico_tokenizer
from tests.judging.fake_worker import make_table

FAKE = Path(__file__).with_name("fake_worker.py")
VOCAB = 11


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders go; empty again after each test, whatever happened in it."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def make_fake(folder: Path, **model: object) -> Path:
    """Write a folder that the fake worker can load."""
    folder.mkdir(parents=True)
    (folder / "fake.json").write_text(json.dumps({"vocab": VOCAB, "seed": 1} | model))
    return folder


def make_windows(count: int = 5, length: int = 9, **fields: object) -> TokenWindows:
    """Random windows in which every token counts."""
    ids = np.random.default_rng(0).integers(0, VOCAB, (count, length))
    values = {"ids": ids, "weights": np.ones(ids.shape, np.float32)} | fields
    return TokenWindows(source="test", sha256="0" * 64, **values)  # type: ignore[arg-type]


def run(
    tmp_path: Path,
    windows: TokenWindows | None = None,
    timeout: float = 60.0,
    probes: ProbesSpec | None = None,
    **candidate: object,
) -> EvalResult:
    """Evaluate a fake candidate, by default one with another table, against a fake baseline."""
    return evaluate(
        make_fake(tmp_path / "baseline"),
        make_fake(tmp_path / "candidate", **({"seed": 2} | candidate)),
        windows or make_windows(),
        probes=probes,
        timeout_seconds=timeout,
        device="cpu",
        worker=FAKE,
    )


def is_alive(pid: int) -> bool:
    """Whether a process of this id exists; a zombie of ours does."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def assert_nothing_is_left(tmp_path: Path) -> None:
    """Both workers have ended and their files are gone."""
    pids = [int(path.stem) for path in tmp_path.glob("*/*.pid")]
    assert len(pids) == 2
    assert not [pid for pid in pids if is_alive(pid)]
    assert list((tmp_path / "scratch").iterdir()) == []


def slow_metrics(
    windows: TokenWindows, vocab: int = VOCAB
) -> tuple[list[list[float]], list[float]]:
    """Per window (baseline nll, candidate nll, kl, agreement), and KL per position; with loops."""
    tables = [make_table(vocab, seed).astype(np.float64) for seed in (1, 2)]
    p_table, q_table = (np.exp(t) / np.exp(t).sum(axis=1, keepdims=True) for t in tables)
    rows, each = [], []
    for ids, weights in zip(windows.ids, windows.weights, strict=True):
        scores = []
        for t in range(len(ids) - 1):
            if weights[t + 1] == 0:
                continue
            p, q = p_table[ids[t]], q_table[ids[t]]
            kl = float(sum(p[v] * np.log(p[v] / q[v]) for v in range(vocab)))
            target = ids[t + 1]
            scores.append((-np.log(p[target]), -np.log(q[target]), kl, p.argmax() == q.argmax()))
            each.append(kl)
        rows.append([float(np.mean(column)) for column in zip(*scores, strict=True)])
    return rows, each


@pytest.mark.parametrize(("batch_tokens", "compare_floats"), [(1024, 1 << 17), (20, 30), (1, 1)])
def test_numbers_equal_the_slow_reference_however_the_work_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_tokens: int, compare_floats: int
) -> None:
    """Batches of windows and pieces of positions change how the work is done and no result."""
    monkeypatch.setattr(module, "BATCH_TOKENS", {"cpu": batch_tokens})
    monkeypatch.setattr(module, "COMPARE_FLOATS", compare_floats)
    windows = make_windows()

    got = run(tmp_path, windows)

    rows, each = slow_metrics(windows)
    columns = (got.baseline_nll, got.candidate_nll, got.kl, got.agreement)
    np.testing.assert_allclose(np.array(columns).T, rows, rtol=1e-6)
    assert got.tokens == 5 * 8
    assert got.kl_p99 == pytest.approx(np.percentile(each, 99), rel=1e-6)
    assert got.kl_max == pytest.approx(max(each), rel=1e-6)
    assert got.finite
    assert got.versions == {"fake": "1", "dtype": "float32", "device": "cpu"}
    assert_nothing_is_left(tmp_path)


def test_positions_count_by_the_weight_of_the_token_that_they_predict(tmp_path: Path) -> None:
    """A masked token is not scored, and a window without any counted token is left out."""
    weights = np.ones((5, 9), np.float32)
    weights[0, 3:7] = 0
    weights[2] = 0
    weights[4, 1:] = 0  # the first token of a window is never predicted
    windows = make_windows(weights=weights)

    got = run(tmp_path, windows)

    kept = make_windows(ids=windows.ids[[0, 1, 3]], weights=weights[[0, 1, 3]])
    rows, _ = slow_metrics(kept)
    np.testing.assert_allclose(got.kl, [row[2] for row in rows], rtol=1e-6)
    np.testing.assert_allclose(got.candidate_nll, [row[1] for row in rows], rtol=1e-6)
    assert got.tokens == 4 + 8 + 8


def test_every_other_number_of_a_window_equals_the_slow_reference(tmp_path: Path) -> None:
    """In a random order too: ranges of positions, domains, and what is in the data's numbers."""
    rng = np.random.default_rng(3)
    weights = (rng.random((6, 40)) < 0.8).astype(np.float32)
    weights[1] = 0
    ids = rng.integers(0, VOCAB, weights.shape)
    domains = np.repeat(rng.integers(0, 2, (6, 4)), 10, axis=1).astype(np.int16)
    windows = make_windows(
        ids=ids, weights=weights, domains=domains, domain_names=("prose", "code")
    )

    got = run(tmp_path, shuffle_windows(windows, 7)).details

    assert got is not None
    assert sorted(got.windows) == [0, 2, 3, 4, 5]
    assert got.windows != (0, 2, 3, 4, 5)
    assert got.ranges == ((0, 16), (16, 39))
    tables = [make_table(VOCAB, seed).astype(np.float64) for seed in (1, 2)]
    p_table, q_table = (np.exp(t) / np.exp(t).sum(axis=1, keepdims=True) for t in tables)
    by_domain: dict[int, list[list[tuple[float, bool]]]] = {0: [], 1: []}
    for row, window in enumerate(got.windows):
        scores = []
        for t in range(39):
            if weights[window, t + 1] == 0:
                continue
            p, q = p_table[ids[window, t]], q_table[ids[window, t]]
            first, second = (sorted(range(VOCAB), key=lambda v: -d[v])[:5] for d in (p, q))
            came = ids[window, t + 1]
            kl = float(sum(p[v] * np.log(p[v] / q[v]) for v in range(VOCAB)))
            scores.append(
                {
                    "t": t,
                    "domain": domains[window, t + 1],
                    "kl": kl,
                    "agree": first[0] == second[0],
                    "reverse_kl": float(sum(q[v] * np.log(q[v] / p[v]) for v in range(VOCAB))),
                    "top5_agreement": len(set(first) & set(second)) / 5,
                    "lost": first[0] == came != second[0],
                    "won": second[0] == came != first[0],
                }
            )
        for name in ("reverse_kl", "top5_agreement", "lost", "won"):
            want = np.mean([score[name] for score in scores])
            assert getattr(got, name)[row] == pytest.approx(want, rel=1e-6)
        for number, (start, stop) in enumerate(got.ranges):
            inside = [score for score in scores if start <= score["t"] < stop]
            kl = np.mean([score["kl"] for score in inside])
            assert got.range_kl[row][number] == pytest.approx(kl, rel=1e-6)
            agreement = np.mean([score["agree"] for score in inside])
            assert got.range_agreement[row][number] == pytest.approx(agreement)
        for domain, found in by_domain.items():
            pairs = [(s["kl"], s["agree"]) for s in scores if s["domain"] == domain]
            found += [pairs] if pairs else []
    assert [each.name for each in got.domains] == ["prose", "code"]
    for domain, each in enumerate(got.domains):
        parts = by_domain[domain]
        assert each.tokens == sum(map(len, parts))
        np.testing.assert_allclose(each.kl, [np.mean([kl for kl, _ in p]) for p in parts], 1e-6)
        np.testing.assert_allclose(each.agreement, [np.mean([a for _, a in p]) for p in parts])


def test_the_worst_windows_are_shown_in_words(tmp_path: Path) -> None:
    """With the baseline's tokenizer; without one, a note says why they are not."""
    baseline = make_fake(tmp_path / "baseline", vocab=300)
    candidate = make_fake(tmp_path / "candidate", vocab=300, seed=2)
    windows = make_windows(7, 12)
    arguments = {"timeout_seconds": 60, "device": "cpu", "worker": FAKE}

    bare = evaluate(baseline, candidate, windows, **arguments)  # type: ignore[arg-type]
    write_pico_tokenizer(baseline, vocab=300)
    got = evaluate(baseline, candidate, windows, **arguments)  # type: ignore[arg-type]

    assert bare.details is not None
    assert got.details is not None
    assert bare.details.partings == ()
    (note,) = bare.notes
    assert note.startswith("no text of windows and continuations is shown: no tokenizer in ")
    assert got.notes == ()
    partings = got.details.partings
    assert [parting.kl for parting in partings] == sorted(got.kl, reverse=True)[:5]
    worst = partings[0]
    assert worst.window == int(np.argmax(got.kl))
    assert worst.position_kl == pytest.approx(got.kl_max, rel=1e-6)
    logits = make_table(300, 1)[windows.ids[worst.window, worst.position]].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum()
    tokenizer = load_tokenizer(baseline)
    assert [choice.text for choice in worst.baseline] == [
        show_token(int(token), tokenizer) for token in np.argsort(-p)[:3]
    ]
    assert [choice.probability for choice in worst.baseline] == pytest.approx(sorted(p)[:-4:-1])
    assert worst.actual == show_token(int(windows.ids[worst.window, worst.position + 1]), tokenizer)


def test_loading_and_memory_of_the_candidate_are_told(tmp_path: Path) -> None:
    """As its worker says; a worker that does not know leaves them open."""
    got = run(tmp_path / "a")
    assert (got.load_seconds, got.memory_bytes) == (0.25, 1 << 20)
    assert run(tmp_path / "b", memory=None).memory_bytes is None


def test_another_model_with_the_same_vocabulary_fails_by_its_numbers(tmp_path: Path) -> None:
    """Nothing but its numbers tells that it is none of this baseline's artifacts."""
    got = judge(run(tmp_path, make_windows(12)), GateSpec(data="test"))

    assert got.verdict == "FAIL"
    assert {check.name: check.verdict for check in got.checks}["max_kl"] == "FAIL"


def test_progress_counts_windows_and_two_batches_lie_on_the_disk_at_most(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events go from 0 to all windows, and files are deleted as the work goes on."""
    monkeypatch.setattr(module, "BATCH_TOKENS", {"cpu": 1})
    events: list[Event] = []
    files: list[int] = []

    def tell(event: Event) -> None:
        events.append(event)
        files.append(len(list(scratch.rglob("*.f32"))))

    evaluate(
        make_fake(tmp_path / "a"),
        make_fake(tmp_path / "b", seed=2),
        make_windows(6),
        timeout_seconds=60,
        device="cpu",
        progress=tell,
        worker=FAKE,
    )

    assert [(event.stage, event.done, event.total) for event in events] == [
        ("gate", done, 6) for done in range(7)
    ]
    assert max(files) <= 4
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("stop_at", "asked"), [(8, [8]), (16, [8, 16]), (33, [8, 16, 33]), (99, [8, 16, 33])]
)
def test_more_windows_are_measured_only_while_it_is_undecided(
    tmp_path: Path, stop_at: int, asked: list[int]
) -> None:
    """One pair of workers computes each window once, and none beyond the look that decides."""
    windows = make_windows(33)
    seen: list[EvalResult] = []

    def is_undecided(result: EvalResult) -> bool:
        seen.append(result)
        return len(result.kl) < stop_at

    got = evaluate(
        make_fake(tmp_path / "baseline"),
        make_fake(tmp_path / "candidate", seed=2),
        windows,
        samples=8,
        is_undecided=is_undecided,
        timeout_seconds=60,
        device="cpu",
        worker=FAKE,
    )

    assert [len(result.kl) for result in seen] == asked
    assert len(got.kl) == asked[-1]
    assert {result.looks for result in seen} == {got.looks} == {(8, 16, 33)}
    for folder in ("baseline", "candidate"):
        rows = [int(line) for line in (tmp_path / folder / "rows.txt").read_text().split()]
        assert sum(rows) == asked[-1]
    assert_nothing_is_left(tmp_path)


def test_a_look_gives_what_all_of_its_windows_at_once_give(tmp_path: Path) -> None:
    """Stopping on the way changes no number, and without a question nothing is stopped."""
    fakes = make_fake(tmp_path / "baseline"), make_fake(tmp_path / "candidate", seed=2)
    windows = make_windows(20)

    whole = evaluate(*fakes, windows, timeout_seconds=60, device="cpu", worker=FAKE)
    looked = evaluate(
        *fakes,
        windows,
        samples=8,
        is_undecided=lambda result: True,
        timeout_seconds=60,
        device="cpu",
        worker=FAKE,
    )

    assert whole.looks == ()
    assert looked.looks == (8, 20)
    for name in ("baseline_nll", "candidate_nll", "kl", "agreement", "kl_p99", "kl_max", "tokens"):
        assert getattr(looked, name) == getattr(whole, name), name


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("exit", r"exit code 7 during 'logits'.* first words \| out of \[31mcheese"),
        ("nonsense", "answered nonsense: 'hello, world'"),
        ("list", "answered nonsense"),
        ("flood", "answered nonsense: 'xxx"),
        ("twice", "answered logits of shape None|spoke unasked"),
        ("short", r"answered logits of shape \[5, 9, 11\] in 8 bytes"),
        ("shape", r"answered logits of shape \[1, 1, 2\]"),
        ("other", "failed at 'logits': no other left"),
    ],
)
def test_a_worker_that_fails_is_an_error_with_its_last_words(
    tmp_path: Path, fault: str, words: str
) -> None:
    """However the candidate's worker fails: one line, nothing runs on and nothing is left."""
    with pytest.raises(WorkerError, match=words) as caught:
        run(tmp_path, fault=fault)

    message = str(caught.value)
    assert message.startswith("the candidate's worker ")
    assert message.isprintable()
    assert len(message) < 1000
    assert_nothing_is_left(tmp_path)


def test_a_worker_that_hangs_is_given_up_after_the_limit(tmp_path: Path) -> None:
    """Silence longer than the limit ends the evaluation, soon after the limit."""
    started = time.monotonic()

    with pytest.raises(WorkerError, match=r"candidate's worker was silent for 1\.5 seconds"):
        run(tmp_path, timeout=1.5, fault="hang")

    assert time.monotonic() - started < 15
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        ("memory", ResourceError, "no memory left"),
        ("disk", ResourceError, "no disk left"),
        ("kill", ResourceError, "killed by SIGKILL, as the kernel does when memory runs out"),
        ("package", MissingPackageError, "no package left"),
    ],
)
def test_what_the_user_can_mend_is_told_apart(
    tmp_path: Path, fault: str, kind: type[QuantkitError], said: str
) -> None:
    """Lacking memory, disk or packages are not the artifact's fault."""
    with pytest.raises(kind, match=said):
        run(tmp_path, fault=fault)

    assert_nothing_is_left(tmp_path)


def test_noise_on_standard_error_blocks_nothing(tmp_path: Path) -> None:
    """Eight megabytes of chatter are drained and forgotten."""
    assert run(tmp_path, fault="noise").finite


def test_numbers_that_are_not_finite_are_reported_and_not_hidden(tmp_path: Path) -> None:
    """A NaN logit makes its window's divergence NaN and the result not finite."""
    got = run(tmp_path, fault="nan")

    assert not got.finite
    assert np.isfinite(got.kl).tolist() == [False, True, True, True, True]


def test_tasks_are_not_asked_of_a_model_without_finite_logits(tmp_path: Path) -> None:
    """The windows' numbers say what is wrong, and a note why there are no tasks."""
    baseline = make_fake(tmp_path / "baseline", vocab=300)
    write_pico_tokenizer(baseline, vocab=300)
    task = LoadedTask("quiz", TaskSpec(name="quiz"), "acc", "none", "mean", True, {})

    got = evaluate(
        baseline,
        make_fake(tmp_path / "candidate", vocab=300, seed=2, fault="nan"),
        make_windows(),
        tasks=(task,),
        timeout_seconds=60,
        device="cpu",
        worker=FAKE,
    )

    assert (got.finite, got.tasks) == (False, ())
    assert "the tasks were not asked" in got.notes[-1]
    assert "not finite: the artifact's" in judge(got, GateSpec(data="test")).reasons[0]


def test_probes_are_made_once_and_reach_the_result(tmp_path: Path) -> None:
    """The greedy continuations of both models are compared; unasked for, nothing is."""
    got = run(tmp_path / "a", make_windows(8, 40), probes=ProbesSpec(), fault="loop")

    assert {probe.name: probe.verdict for probe in got.probes}["new_loops"] == "FAIL"
    assert run(tmp_path / "b", fault="loop").probes == ()


def test_nothing_is_longer_than_both_runtimes_take(tmp_path: Path) -> None:
    """A runtime, or a file's metadata, may allow less than the model; a note says so."""
    got = run(tmp_path, make_windows(8, 40), probes=ProbesSpec(max_new_tokens=8), positions=60)

    assert got.notes[0] == (
        "the artifact takes sequences of up to 60 tokens in transformers, and its baseline of up "
        "to 4096: what is longer was not looked at"
    )
    (long,) = (probe.detail for probe in got.probes if probe.name == "long_context")
    assert "positions 40 to 58 of" in long


def test_tensors_that_the_runtime_ignores_are_suspicious(tmp_path: Path) -> None:
    """Nothing of the artifact is skipped silently."""
    got = run(tmp_path, unexpected=["model.layers.0.mystery"])

    assert got.suspicions == (
        "the runtime ignored 1 tensors of the artifact, for instance model.layers.0.mystery",
    )


def test_different_vocabularies_cannot_be_compared(tmp_path: Path) -> None:
    """They mean another model or tokenizer, which is the user's to mend."""
    with pytest.raises(ArtifactError, match=r"vocabulary of 12 tokens .* different model or token"):
        run(tmp_path, vocab=12)

    assert_nothing_is_left(tmp_path)


def test_windows_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    """A token id beyond the vocabulary is told before any logits are asked for."""
    with pytest.raises(CalibrationError, match="holds token 11, but the models have 11 tokens"):
        run(tmp_path, make_windows(ids=np.full((5, 9), VOCAB)))


def test_windows_without_a_counted_token_are_refused(tmp_path: Path) -> None:
    """Nothing to score is an error and not a perplexity of NaN."""
    with pytest.raises(CalibrationError, match="none of the evaluation tokens counts"):
        run(tmp_path, make_windows(weights=np.zeros((5, 9), np.float32)))


def test_what_a_dead_worker_has_started_ends_with_it(tmp_path: Path) -> None:
    """And does not keep its pipes open, so that nobody waits for the time limit."""
    with pytest.raises(WorkerError, match=r"ended with exit code 7.*child \d+") as died:
        run(tmp_path, fault="orphan", timeout=600)
    child = int(str(died.value).rpartition(" ")[2])
    deadline = time.monotonic() + 60
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


def test_an_interrupt_stops_both_workers(tmp_path: Path) -> None:
    """Ctrl-C while a worker is awaited leaves no process and no file."""

    def press_control_c() -> None:
        deadline = time.monotonic() + 50
        while len([*tmp_path.glob("*/*.pid")]) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press_control_c, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fault="hang")

    assert_nothing_is_left(tmp_path)


def test_an_interpreter_that_does_not_exist_is_an_input_error(tmp_path: Path) -> None:
    """The message names it and the key of the recipe."""
    with pytest.raises(InputError, match=r"/no/such/python.*gate\.python"):
        evaluate(
            make_fake(tmp_path / "a"),
            make_fake(tmp_path / "b"),
            make_windows(),
            python="/no/such/python",
            worker=FAKE,
        )


def test_asking_a_worker_that_reads_nothing_does_not_block(tmp_path: Path) -> None:
    """A request larger than the pipe waits in a thread, so the time limit still works."""
    script = tmp_path / "deaf.py"
    script.write_text("import time; time.sleep(600)")
    answers: Answers = Answers()
    worker = WorkerProcess("candidate", [sys.executable, str(script)], answers, 1)
    started = time.monotonic()

    worker.ask({"op": "logits", "ids": [[1] * 500_000]})
    worker.stop()

    assert time.monotonic() - started < 10


def test_workers_get_no_secrets_and_no_network(tmp_path: Path) -> None:
    """Tokens and keys stay here; what merely resembles one travels."""
    parent = {
        "HF_TOKEN": "1",
        "HUGGING_FACE_HUB_TOKEN": "2",
        "AWS_SECRET_ACCESS_KEY": "3",
        "OPENAI_API_KEY": "4",
        "DB_PASSWORD": "5",
        "TOKENIZERS_PARALLELISM": "true",
        "PATH": "/bin",
        "PYTHONPATH": "/here",
    }

    child = child_environment(parent, threads=3)

    assert not {"1", "2", "4", "5"} & {child[name] for name in child if name in parent}
    assert "AWS_SECRET_ACCESS_KEY" not in child
    assert (child["PATH"], child["OMP_NUM_THREADS"]) == ("/bin", "3")
    assert (child["HF_HUB_OFFLINE"], child["TOKENIZERS_PARALLELISM"]) == ("1", "false")
    assert child["PYTHONPATH"] == "/here"
    assert "PYTHONPATH" not in child_environment(parent, threads=3, own=False)


def test_the_environment_of_a_running_worker_is_the_cleaned_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule above is applied to the processes that are started."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    run(tmp_path)

    for role in ("baseline", "candidate"):
        seen = json.loads((tmp_path / role / "environment.json").read_text())
        assert "hf_secret" not in seen.values()
        assert seen["HF_HUB_OFFLINE"] == "1"


def test_two_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the cores each, at least one, and no more than the user allows in all."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert worker_threads() == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert worker_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert worker_threads() == 1
