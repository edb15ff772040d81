"""Tests of quantkit.judging.encoder_verdict."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from quantkit.judging.encoder_verdict import judge_encoder
from quantkit.recipe import GateSpec
from quantkit.records import EncoderResult


def spec(**limits: object) -> GateSpec:
    """The default limits, or others."""
    return GateSpec.model_validate({"data": "test"} | limits)


def make_embeddings(
    texts: int = 64, cosine: float = 0.995, overlap: float = 0.95, **fields: Any
) -> EncoderResult:
    """An embedding model with about these values, and some spread between texts."""
    spread = np.random.default_rng(0).normal(0, 1, texts)
    spread -= spread.mean()
    values = {
        "cosine": tuple(cosine - 0.001 * spread),
        "overlap": tuple(overlap + 0.02 * spread),
        "difference": 0.01,
    }
    return EncoderResult("onnxruntime", "embedding", texts, **(values | fields))


def make_classes(
    texts: int = 400, changed: int = 2, lost: int = 0, labels: bool = True
) -> EncoderResult:
    """A classifier of three classes, of which the artifact changes and loses some answers."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, texts)
    before = np.where(rng.random(texts) < 0.9, truth, (truth + 1) % 3)
    after = before.copy()
    wrong = np.flatnonzero(before != truth)[:changed]
    after[wrong] = (truth[wrong] + 2) % 3
    right = np.flatnonzero(before == truth)[:lost]
    after[right] = (truth[right] + 1) % 3
    given: dict[str, Any] = {}
    if labels:
        given = {
            "labels": tuple(truth.astype(float)),
            "baseline_labels": tuple(before.tolist()),
            "candidate_labels": tuple(after.tolist()),
            "baseline_score": tuple((before == truth).astype(float)),
            "candidate_score": tuple((after == truth).astype(float)),
        }
    agreement = tuple((before == after).astype(float))
    return EncoderResult(
        "onnxruntime",
        "sequence-classification",
        texts,
        agreement=agreement,
        difference=0.1,
        **given,
    )


def make_pairs(noise: float, pairs: int = 200) -> EncoderResult:
    """Embeddings of pairs whose similarities people have given."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, pairs).astype(float)
    before = truth + rng.normal(0, 1, pairs)
    after = before + noise * rng.normal(0, 1, pairs)
    return make_embeddings(
        labels=tuple(truth), baseline_score=tuple(before), candidate_score=tuple(after)
    )


def test_embeddings_well_within_every_limit_pass() -> None:
    """Cosine and overlap are judged; the percentile is measured, and has no limit by default."""
    got = judge_encoder(make_embeddings(), spec())

    assert got.verdict == "PASS"
    assert [check.name for check in got.checks] == ["min_cosine", "min_retrieval_overlap"]
    assert [measure.name for measure in got.measures] == [
        "cosine",
        "cosine_p1",
        "retrieval_overlap",
    ]
    assert (got.reasons, got.windows, got.perplexity, got.kl) == ((), 64, None, None)


@pytest.mark.parametrize(
    ("worse", "name"),
    [({"cosine": 0.97}, "min_cosine"), ({"overlap": 0.8}, "min_retrieval_overlap")],
)
def test_one_value_wholly_outside_its_limit_fails(worse: dict[str, float], name: str) -> None:
    got = judge_encoder(make_embeddings(**worse), spec())  # type: ignore[arg-type]

    assert got.verdict == "FAIL"
    assert [check.name for check in got.checks if check.verdict == "FAIL"] == [name]
    assert "is below the limit of" in got.reasons[0]


@pytest.mark.parametrize("cosine", [0.99005, 0.98995])
def test_an_interval_across_its_limit_is_inconclusive(cosine: float) -> None:
    got = judge_encoder(make_embeddings(cosine=cosine), spec())

    assert got.verdict == "INCONCLUSIVE"
    assert "not proven to be within the limit of 0.99" in got.reasons[0]


def test_few_texts_decide_nothing() -> None:
    got = judge_encoder(make_embeddings(texts=7), spec())

    assert got.verdict == "INCONCLUSIVE"
    assert "too few evaluation texts to judge: 7, and at least 8" in got.reasons[0]


def test_the_percentile_of_few_texts_does_not_pass_and_the_reason_says_how_many_are_needed() -> (
    None
):
    """A limit on the 1st percentile wants to know of one text in a hundred."""
    limit = spec(min_cosine_p1=0.98)

    few = judge_encoder(make_embeddings(texts=128), limit)
    many = judge_encoder(make_embeddings(texts=400), limit)
    bad = judge_encoder(make_embeddings(texts=128, cosine=0.97), limit)

    assert (few.verdict, many.verdict, bad.verdict) == ("INCONCLUSIVE", "PASS", "FAIL")
    assert "368 texts or more, and there are 128" in few.reasons[0]


def test_a_limit_that_could_not_be_measured_does_not_pass() -> None:
    """Neighbours of too few texts are not compared; without that limit nothing is missing."""
    note = "retrieval overlap was not measured: there are 9 different texts"
    result = make_embeddings(texts=9, overlap=1.0)
    result = dataclasses.replace(result, overlap=(), notes=(note,))

    got = judge_encoder(result, spec())
    free = judge_encoder(result, spec(min_retrieval_overlap=None))

    assert (got.verdict, got.reasons, got.notes) == ("INCONCLUSIVE", (note,), ())
    assert (free.verdict, free.reasons, free.notes) == ("PASS", (), (note,))


def test_without_any_limit_nothing_is_judged() -> None:
    got = judge_encoder(make_embeddings(), spec(min_cosine=None, min_retrieval_overlap=None))

    assert got.verdict == "INCONCLUSIVE"
    assert "no limit" in got.reasons[0]


def test_a_classifier_is_judged_by_agreement_accuracy_and_f1() -> None:
    got = judge_encoder(make_classes(), spec())

    assert got.verdict == "PASS"
    assert [check.name for check in got.checks] == [
        "min_label_agreement",
        "max_accuracy_drop",
        "max_f1_drop",
    ]
    accuracy = got.measures[1].metric
    assert accuracy.baseline == accuracy.value == np.mean(make_classes().baseline_score)
    assert accuracy.low <= accuracy.value <= accuracy.high


def test_a_classifier_that_loses_answers_fails() -> None:
    got = judge_encoder(make_classes(lost=40), spec())

    assert got.verdict == "FAIL"
    assert {check.name for check in got.checks if check.verdict == "FAIL"} == {
        "min_label_agreement",
        "max_accuracy_drop",
        "max_f1_drop",
    }
    assert "loss of accuracy of 10%" in " ".join(got.reasons)


def test_agreement_on_a_few_texts_is_not_proof() -> None:
    """Eight of eight leave room for one label in three that differs."""
    few = judge_encoder(make_classes(texts=8, changed=0, labels=False), spec())
    many = judge_encoder(make_classes(texts=128, changed=0, labels=False), spec())

    assert (few.verdict, many.verdict) == ("INCONCLUSIVE", "PASS")


@pytest.mark.parametrize(
    ("noise", "verdict"), [(0.02, "PASS"), (0.35, "INCONCLUSIVE"), (1.5, "FAIL")]
)
def test_pairs_are_judged_by_their_rank_correlation(noise: float, verdict: str) -> None:
    got = judge_encoder(make_pairs(noise), spec(max_metric_drop=0.02))
    (check,) = (check for check in got.checks if check.name == "max_spearman_drop")

    assert check.verdict == verdict
    spearman = got.measures[-1].metric
    assert spearman.baseline is not None
    assert check.value == pytest.approx(spearman.baseline - spearman.value)
    assert check.low == pytest.approx(spearman.baseline - spearman.high)


def test_the_difference_is_paired() -> None:
    """Correlations of 200 pairs are known within some 0.05, what an artifact loses much better."""
    got = judge_encoder(make_pairs(0.02), spec())
    check = got.checks[-1]

    assert check.high - check.low < 0.01


def test_outputs_that_are_not_finite_have_no_numbers() -> None:
    result = make_embeddings(finite=False, suspicions=("not finite: the artifact's outputs",))
    got = judge_encoder(result, spec())
    untold = judge_encoder(make_embeddings(finite=False), spec())

    assert (got.verdict, got.checks, got.measures) == ("FAIL", (), ())
    assert got.reasons == ("not finite: the artifact's outputs",)
    assert untold.reasons[0].startswith("not finite")


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"identical": True}, "a copy of it"), ({"difference": 1e-6}, "weights of the artifact")],
)
def test_an_artifact_that_computes_what_the_baseline_does_was_not_quantized(
    fields: dict[str, Any], words: str
) -> None:
    """An artifact in float does, and may."""
    got = judge_encoder(make_embeddings(**fields), spec())

    assert got.verdict == "FAIL"
    assert words in got.reasons[0]
    assert judge_encoder(make_embeddings(**fields), spec(), quantized=False).verdict == "PASS"


def test_any_suspicion_fails_whatever_the_numbers_are() -> None:
    result = make_embeddings(suspicions=("all alike",))

    got = judge_encoder(result, spec(), suspicions=("a file is missing",))

    assert (got.verdict, got.reasons) == ("FAIL", ("all alike", "a file is missing"))


def test_nothing_measured_fails() -> None:
    got = judge_encoder(EncoderResult("onnxruntime", "embedding", 0), spec())

    assert (got.verdict, got.checks) == ("FAIL", ())
    assert got.reasons[0] == "nothing was measured: there was no text"


def test_a_judgement_is_plain_data_that_json_holds() -> None:
    got = judge_encoder(make_pairs(0.1), spec(min_cosine_p1=0.9))

    json.dumps(dataclasses.asdict(got), allow_nan=False)
