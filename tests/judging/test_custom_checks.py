"""Tests of quantkit.judging.custom_checks and .handles: functions that ask both models."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import quantkit
from quantkit.errors import InputError, ResourceError, WorkerError
from quantkit.judging.custom_checks import read_checks
from quantkit.judging.evaluate import evaluate
from quantkit.judging.handles import RuntimeHandle
from quantkit.judging.verdict import judge
from quantkit.recipe import GateSpec
from quantkit.records import CheckOutcome, CustomCheck, EvalResult, TokenWindows
from quantkit.report.document import report_document
from tests.encoder_models import write_encoder_checkpoint
from tests.helpers import make_pico_model, pico_text
from tests.judging.fake_worker import make_table

FAKE = Path(__file__).with_name("fake_worker.py")
VOCAB = 11


def run(tmp_path: Path, *checks: Any, timeout: float = 60.0, **candidate: object) -> EvalResult:
    """Evaluate a fake candidate with checks; the baseline's table has the seed 1, its own 2."""
    for name, model in (("baseline", {"seed": 1}), ("candidate", {"seed": 2} | candidate)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "fake.json").write_text(json.dumps({"vocab": VOCAB, **model}))
    ids = np.random.default_rng(0).integers(0, VOCAB, (30, 9))
    windows = TokenWindows(ids, np.ones(ids.shape, np.float32), "test", "0" * 64)
    return evaluate(
        tmp_path / "baseline",
        tmp_path / "candidate",
        windows,
        checks=read_checks(checks),
        timeout_seconds=timeout,
        device="cpu",
        worker=FAKE,
    )


def find_log_softmax(seed: int) -> np.ndarray:
    logits = torch.from_numpy(make_table(VOCAB, seed)).double()
    return torch.log_softmax(logits, dim=1).float().numpy()


def test_a_check_sees_what_both_models_compute(tmp_path: Path) -> None:
    """Log-probabilities of each, and continuations; the artifact's path and the runtime.

    Afterwards a handle is of no use: a clear error, and no waiting for workers that have ended.
    """
    seen: list[Any] = []
    kept: list[RuntimeHandle] = []

    def looks(handle: RuntimeHandle) -> CheckOutcome:
        kept.append(handle)
        for model, seed in ((handle.baseline, 1), (handle.candidate, 2)):
            found = model.log_probabilities([3, 4, 5])
            np.testing.assert_allclose(found, find_log_softmax(seed)[[3, 4, 5]], rtol=1e-5)
            each = model.token_log_probabilities([3, 4, 5])
            np.testing.assert_array_equal(each, found[[0, 1], [4, 5]])
            seen.append(model.generate_ids([1], 6))
        seen.append((handle.artifact.name, handle.original.name, handle.vocabulary))
        seen.append((handle.runtime, handle.positions))
        return CheckOutcome("looks", True, np.float32(0.5), 1, "  it\nlooked ")  # type: ignore[arg-type]

    (found,) = run(tmp_path, looks).custom_checks

    assert list(map(len, seen[:2])) == [6, 6]
    assert seen[2:] == [("candidate", "baseline", VOCAB), ("transformers", 4096)]
    with pytest.raises(RuntimeError, match="within its check only"):
        kept[0].candidate.generate_ids([1])
    assert found.sha256 is not None
    assert replace(found, sha256=None) == CustomCheck(
        "looks",
        0.5,
        1.0,
        "PASS",
        "it looked",
        f"{__name__}.test_a_check_sees_what_both_models_compute.<locals>.looks",
        None,
    )


def passes(handle: RuntimeHandle) -> bool:
    return True


def gives_nothing(handle: RuntimeHandle) -> Any:
    return None


def gives_a_number(handle: RuntimeHandle) -> Any:
    return CheckOutcome("numbers", "yes")  # type: ignore[arg-type]


def gives_no_number(handle: RuntimeHandle) -> CheckOutcome:
    return CheckOutcome("numbers", True, float("nan"))


def breaks_off(handle: RuntimeHandle) -> bool:
    raise SystemExit("enough")


def asserts(handle: RuntimeHandle) -> bool:
    assert handle.vocabulary == 7, "seven tokens\nare wanted"
    return True


def asks_for_a_word(handle: RuntimeHandle) -> bool:
    return bool(handle.candidate.generate("a word"))


def asks_beyond(handle: RuntimeHandle) -> bool:
    return bool(handle.candidate.generate_ids([1, VOCAB]))


def asks_too_long(handle: RuntimeHandle) -> bool:
    return bool(handle.candidate.log_probabilities([1] * 5000).any())


def talks(handle: RuntimeHandle) -> bool:
    raise ValueError("word " * 1000)


OUTCOMES: tuple[tuple[Callable[[RuntimeHandle], Any], str, str], ...] = (
    (passes, "PASS", ""),
    (lambda handle: np.bool_(False), "FAIL", ""),
    (functools.partial(passes), "PASS", ""),
    (gives_nothing, "FAIL", "TypeError: it returned None: a check takes"),
    (gives_a_number, "FAIL", "TypeError: CheckOutcome.passed is 'yes', not True or False"),
    (gives_no_number, "FAIL", "ValueError: CheckOutcome.value is nan, which decides nothing"),
    (breaks_off, "FAIL", "SystemExit: enough"),
    (asserts, "FAIL", "AssertionError: seven tokens are wanted"),
    (asks_for_a_word, "FAIL", "ValueError: the baseline has no tokenizer: give token ids"),
    (asks_beyond, "FAIL", "ValueError: the prompt of a check has token 11, and the models"),
    (asks_too_long, "FAIL", "ValueError: the prompt of a check has 5000 tokens"),
    (talks, "FAIL", "ValueError: word word"),
)
"""A check, its verdict, and how what is said of it begins."""


def test_whatever_a_check_does_is_its_outcome(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that raises fails with one line, its traceback is logged, and the next one runs."""
    with caplog.at_level(logging.ERROR):
        found = run(tmp_path, *(check for check, _, _ in OUTCOMES)).custom_checks

    for outcome, (_, verdict, detail) in zip(found, OUTCOMES, strict=True):
        assert outcome.verdict == verdict
        assert outcome.detail.startswith(detail)
        assert "\n" not in outcome.detail
    # What a check raises may hold a whole text of a model.
    assert len(found[-1].detail) == 500
    assert found[-1].detail.endswith("…")
    assert len(caplog.records) == sum(bool(detail) for _, _, detail in OUTCOMES)
    assert all(record.exc_info for record in caplog.records)


def find_process(folder: Path) -> int:
    """The process of the fake worker that has loaded `folder`."""
    (file,) = folder.glob("*.pid")
    return int(file.stem)


def test_a_worker_that_dies_in_a_check_ends_all_checks(tmp_path: Path) -> None:
    """Even where the check takes no notice: the artifact is not proven."""
    later: list[str] = []

    def kills(handle: RuntimeHandle) -> bool:
        os.kill(find_process(handle.artifact), signal.SIGTERM)
        with pytest.raises(WorkerError):
            handle.candidate.generate_ids([1])
        with pytest.raises(WorkerError):
            handle.baseline.generate_ids([1])
        return True

    def comes_later(handle: RuntimeHandle) -> bool:
        later.append("here")
        return True

    with pytest.raises(WorkerError, match="candidate's worker was killed by SIGTERM during 'gen"):
        run(tmp_path, kills, comes_later)
    assert not later


def test_a_worker_that_hangs_in_a_check_is_not_waited_for(tmp_path: Path) -> None:
    """Longer than the gate's timeout."""

    def stops(handle: RuntimeHandle) -> bool:
        os.kill(find_process(handle.original), signal.SIGSTOP)
        return bool(handle.baseline.generate_ids([1]))

    with pytest.raises(WorkerError, match="baseline's worker was silent for 2 seconds"):
        run(tmp_path, stops, timeout=2.0)


def test_a_worker_without_memory_stops_the_job(tmp_path: Path) -> None:
    """That says nothing of the artifact, and the job goes on later."""

    def kills(handle: RuntimeHandle) -> bool:
        os.kill(find_process(handle.artifact), signal.SIGKILL)
        return bool(handle.candidate.generate_ids([1]))

    with pytest.raises(ResourceError, match="SIGKILL"):
        run(tmp_path, kills)


def test_a_check_that_fails_fails_the_artifact_and_none_proves_it(tmp_path: Path) -> None:
    """The reason has its numbers; without a limit of the recipe nothing passes."""

    def is_small(handle: RuntimeHandle) -> CheckOutcome:
        return CheckOutcome("is_small", False, 3.25, 2, "three and a quarter")

    lax = GateSpec(data="", max_kl=100, max_perplexity_increase=1e9, min_top1_agreement=0)
    result = run(tmp_path, is_small, passes)
    judgement = judge(result, lax)

    assert judgement.verdict == "FAIL"
    assert judgement.reasons == ("check is_small failed: value 3.25, limit 2; three and a quarter",)
    assert judgement.custom_checks == result.custom_checks
    fine = replace(result, custom_checks=result.custom_checks[1:])
    assert judge(fine, lax).verdict == "PASS"
    none = GateSpec(data="", max_kl=None, max_perplexity_increase=None, min_top1_agreement=None)
    assert judge(fine, none).verdict == "INCONCLUSIVE"


def test_threads_of_a_check_take_turns(tmp_path: Path) -> None:
    """A worker answers one request at a time, and no file of logits is another thread's."""

    def asks_at_once(handle: RuntimeHandle) -> bool:
        prompts = [[first, 4, 5] for first in range(VOCAB)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(handle.candidate.log_probabilities, prompts))
        expected = find_log_softmax(2)
        return all(
            np.allclose(each, expected[ids]) for each, ids in zip(found, prompts, strict=True)
        )

    (found,) = run(tmp_path, asks_at_once).custom_checks
    assert found.verdict == "PASS"


def test_checks_are_not_run_on_a_model_that_is_not_finite(tmp_path: Path) -> None:
    """It fails in any case, and a note says that they were not asked."""
    result = run(tmp_path, passes, fault="nan")

    assert result.custom_checks == ()
    assert any("the checks of your own were not asked" in note for note in result.notes)


async def waits(handle: RuntimeHandle) -> bool:
    return True


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        (passes, r"checks is a function: write a list, checks=\[my_check\]"),
        (["passes"], r"checks\[0\] is a str and no function: a check takes"),
        ([passes, lambda: True], r"checks\[1\] <lambda>\(\) cannot be called with 1 argument"),
        ([waits], r"checks\[0\] waits answers only later"),
        ([passes, passes], r"checks\[1\] passes is there twice"),
    ],
)
def test_what_is_no_check_is_refused_before_the_work(checks: Any, message: str) -> None:
    """By every function that takes checks."""
    with pytest.raises(InputError, match=message):
        read_checks(checks)
    with pytest.raises(InputError, match=message):
        quantkit.quantize("awq4", model="no/such/model", output="out", checks=checks)


def test_checks_need_a_gate(tmp_path: Path) -> None:
    """They would be forgotten silently."""
    model = make_pico_model(tmp_path / "model", layers=1)
    with pytest.raises(InputError, match="checks are part of the gate"):
        quantkit.quantize("awq4", model=model, output=tmp_path / "out", gate=False, checks=[passes])


def test_encoders_have_neither_checks_nor_solvers_of_the_callers_own(tmp_path: Path) -> None:
    """They generate no text and have solvers of their own: refused before the work."""
    model = write_encoder_checkpoint(tmp_path / "encoder")
    job = {"model": model, "output": tmp_path / "out"}

    with pytest.raises(InputError, match="is an encoder, and checks of your own ask models that"):
        quantkit.quantize("onnx-int8-encoder", checks=[passes], **job)  # type: ignore[arg-type]
    for function in (quantkit.quantize, quantkit.plan):
        with pytest.raises(InputError, match="is an encoder, and solvers of your own are for dec"):
            function(
                "onnx-int8-encoder",
                overrides=["quantize.method=own"],
                solvers={"own": lambda weight, statistics, form: None},
                **job,  # type: ignore[arg-type]
            )
    assert not (tmp_path / "out").exists()


def answers_like_before(handle: RuntimeHandle) -> CheckOutcome:
    """Ask a text and a conversation of both models, in their real runtimes."""
    chat = [{"role": "user", "content": "Ba ce di?"}]
    texts = [handle.candidate.generate(prompt, 8) for prompt in ("Ba ce di", chat)]
    same = [handle.baseline.generate(prompt, 8) for prompt in ("Ba ce di", chat)]
    ids = handle.encode("Ba ce di")
    assert "Ba ce di" in handle.decode(ids)
    moved = handle.candidate.token_log_probabilities(ids) - handle.baseline.token_log_probabilities(
        ids
    )
    assert all(isinstance(text, str) for text in (*texts, *same))
    return CheckOutcome("moved", float(abs(moved).max()) < 1e-6, abs(moved).max(), 1e-6)


def test_a_job_reports_the_checks(tmp_path: Path) -> None:
    """Of real models, in every form of the report, with the hash of the check's source."""
    model = make_pico_model(tmp_path / "model", hidden=32, intermediate=64, layers=1)
    (tmp_path / "evaluation.txt").write_text(pico_text(400, seed=1))
    (tmp_path / "recipe.yaml").write_text(
        f"version: 1\nmodel: {model}\noutput: {tmp_path / 'out'}\n"
        "quantize: {method: rtn, group_size: 32}\n"
        f"gate: {{data: {tmp_path / 'evaluation.txt'}, samples: 16, sequence_length: 16, "
        "probes: null, max_kl: 10, max_perplexity_increase: 10, min_top1_agreement: 0, "
        "weights: skip}\n"
    )

    result = quantkit.quantize(tmp_path / "recipe.yaml", checks=[passes, answers_like_before])

    assert result.verdict == "FAIL"
    (row,) = report_document(result.report)["artifacts"]
    *limits, first, second = row["checks"]
    assert [check["custom"] for check in limits] == [None] * 3
    assert (first["name"], first["verdict"], first["value"]) == ("passes", "PASS", None)
    assert (second["name"], second["verdict"], second["limit"]) == ("moved", "FAIL", 1e-6)
    assert second["custom"]["function"].endswith("answers_like_before")
    assert len(second["custom"]["sha256"]) == 64
    assert second["low"] is second["high"] is None
    for file in ("report/report.html", "report/report.md", "report/junit.xml"):
        text = (tmp_path / "out" / file).read_text()
        assert "moved" in text
        assert "passes" in text
    card = (result.artifacts[0].folder / "README.md").read_text()
    assert "## Custom checks" in card
