"""Tests of quantkit.judging.verdict."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from quantkit.calibration.windows import draw
from quantkit.judging.sampling import find_look_confidence, plan_looks
from quantkit.judging.statistics import mean_intervals
from quantkit.judging.verdict import MIN_WINDOWS, judge
from quantkit.recipe import GateSpec
from quantkit.records import EvalResult, Probe, WindowDetails
from tests.report.measured import make_tasks


def make_result(
    windows: int = 64, increase: float = 0.01, kl: float = 0.02, agreement: float = 0.95
) -> EvalResult:
    """A measurement with about these values, and some spread between windows."""
    rng = np.random.default_rng(0)
    base = rng.normal(3, 0.3, windows)
    spread = rng.normal(0, 1, windows) - 0.0
    spread -= spread.mean()
    each = kl * (1 + 0.3 * spread)
    return EvalResult(
        runtime="transformers",
        tokens=windows * 511,
        baseline_nll=tuple(base),
        candidate_nll=tuple(base + math.log1p(increase) + 0.005 * spread),
        kl=tuple(each),
        agreement=tuple(agreement + 0.01 * spread),
        kl_p99=float(np.max(each)) * 5,
        kl_max=float(np.max(each)) * 20,
        finite=True,
    )


def spec(**limits: object) -> GateSpec:
    """The default limits (3 %, 0.05, 90 %), or others."""
    return GateSpec.model_validate({"data": "test"} | limits)


def test_values_well_within_every_limit_pass() -> None:
    """All three checks pass, in the order of the recipe's keys, and there is nothing to explain."""
    got = judge(make_result(), spec())

    assert got.verdict == "PASS"
    assert [(check.name, check.verdict) for check in got.checks] == [
        ("max_perplexity_increase", "PASS"),
        ("max_kl", "PASS"),
        ("min_top1_agreement", "PASS"),
    ]
    assert got.reasons == ()
    assert (got.windows, got.confidence) == (64, 0.95)


@pytest.mark.parametrize(
    ("worse", "name", "reason"),
    [
        (
            {"increase": 0.06},
            "max_perplexity_increase",
            r"perplexity increase of 6% \(95% interval 5.8.*% to 6.1.*%\) is above the limit of 3%",
        ),
        (
            {"kl": 0.09},
            "max_kl",
            r"KL divergence of 0.09 \(95% interval 0.08\d+ to 0.09\d+\) is above the limit of 0.05",
        ),
        (
            {"agreement": 0.8},
            "min_top1_agreement",
            r"top-1 agreement of 80% \(95% interval 79.\d+% to 80.\d+%\) is below the limit of 90%",
        ),
    ],
)
def test_one_value_wholly_outside_its_limit_fails(
    worse: dict[str, float], name: str, reason: str
) -> None:
    """The others do not make up for it, and the reason says in words what is wrong."""
    got = judge(make_result(**worse), spec())  # type: ignore[arg-type]

    assert got.verdict == "FAIL"
    assert [check.name for check in got.checks if check.verdict == "FAIL"] == [name]
    (found,) = got.reasons
    assert re.fullmatch(reason, found)


def test_a_probe_that_fails_fails_the_artifact() -> None:
    """Its sentence is the reason; one that could not be looked at decides nothing."""
    fine = Probe("lost_json", None, 0.25, "UNJUDGED", "the baseline writes no JSON")
    bad = Probe("new_loops", 0.5, 0.25, "FAIL", "6 of 12 continuations loop anew, at most 3 may")

    kept = judge(dataclasses.replace(make_result(), probes=(fine,)), spec())
    failed = judge(dataclasses.replace(make_result(), probes=(fine, bad)), spec())

    assert (kept.verdict, kept.reasons, kept.probes) == ("PASS", (), (fine,))
    assert (failed.verdict, failed.reasons) == ("FAIL", (bad.detail,))
    assert failed.probes == (fine, bad)
    assert [check.verdict for check in failed.checks] == ["PASS"] * 3


def test_details_have_intervals_of_the_same_confidence() -> None:
    """Of several looks, those of the one that decided; what is not finite has none."""
    result = make_result()
    many = tuple(0.02 + 0.001 * math.sin(window) for window in range(64))
    details = WindowDetails(
        windows=tuple(range(64)),
        reverse_kl=many,
        top5_agreement=(0.9,) * 64,
        lost=(0.01,) * 64,
        won=(0.02,) * 64,
        ranges=((0, 511),),
        range_kl=tuple((value,) for value in many),
        range_agreement=((0.9,),) * 64,
    )
    looked = dataclasses.replace(result, details=details, looks=(64, 128))

    got = judge(looked, spec()).details
    broken = judge(dataclasses.replace(looked, finite=False), spec())

    assert got is not None
    low, high = mean_intervals(np.array(many)[:, None], 0.975)[0]
    assert (got.reverse_kl.low, got.reverse_kl.high) == (low, high)
    assert got.flips.value == pytest.approx(0.03)
    assert got.windows == tuple(range(64))
    assert broken.details is None
    assert judge(result, spec()).details is None


@pytest.mark.parametrize("kl", [0.0495, 0.0505])
def test_an_interval_across_its_limit_is_inconclusive(kl: float) -> None:
    """On whichever side the value itself lies: what is not proven does not pass."""
    got = judge(make_result(kl=kl), spec())

    assert got.verdict == "INCONCLUSIVE"
    assert "not proven to be within the limit of 0.05" in got.reasons[0]


def test_the_bounds_decide_to_the_last_digit() -> None:
    """A limit equal to the outer bound holds; the next smaller number does not."""
    result = make_result()
    high = judge(result, spec()).checks[1].high
    low = judge(result, spec()).checks[1].low

    def verdict(limit: float) -> str:
        return judge(result, spec(max_kl=limit)).checks[1].verdict

    assert verdict(high) == "PASS"
    assert verdict(math.nextafter(high, 0)) == "INCONCLUSIVE"
    assert verdict(low) == "INCONCLUSIVE"
    assert verdict(math.nextafter(low, 0)) == "FAIL"


def test_a_reason_tells_a_value_from_a_limit_that_is_next_to_it() -> None:
    """`0.05 is above the limit of 0.05` would explain nothing."""
    result = dataclasses.replace(make_result(), kl=(0.0500004,) * 64)

    (reason,) = judge(result, spec()).reasons

    assert reason == (
        "KL divergence of 0.0500004 (95% interval 0.0500004 to 0.0500004)"
        " is above the limit of 0.05"
    )


def test_a_failure_outweighs_what_is_inconclusive() -> None:
    """FAIL before INCONCLUSIVE before PASS."""
    assert judge(make_result(kl=0.0495, agreement=0.8), spec()).verdict == "FAIL"


def test_metrics_are_what_the_definitions_say() -> None:
    """Perplexities from mean nll, the increase and its interval relative, KL with its tail."""
    result = make_result()

    got = judge(result, spec())

    difference = np.array(result.candidate_nll) - np.array(result.baseline_nll)
    columns = np.stack([difference, result.kl, result.agreement], axis=1)
    bounds = mean_intervals(columns, 0.95)
    assert got.perplexity is not None
    assert got.kl is not None
    assert got.top1_agreement is not None
    assert got.perplexity.baseline == pytest.approx(np.exp(np.mean(result.baseline_nll)))
    assert got.perplexity.value == pytest.approx(np.exp(np.mean(result.candidate_nll)))
    assert got.perplexity.increase == pytest.approx(np.exp(difference.mean()) - 1)
    assert got.perplexity.low == pytest.approx(np.exp(bounds[0, 0]) - 1)
    assert got.perplexity.high == pytest.approx(np.exp(bounds[0, 1]) - 1)
    assert (got.kl.low, got.kl.high) == tuple(bounds[1])
    assert (got.kl.p99, got.kl.maximum) == (result.kl_p99, result.kl_max)
    assert (got.top1_agreement.low, got.top1_agreement.high) == tuple(bounds[2])


def test_the_comparison_is_paired() -> None:
    """Windows of very different difficulty do not blur a small steady increase."""
    base = np.linspace(1, 6, 32)
    result = dataclasses.replace(
        make_result(32), baseline_nll=tuple(base), candidate_nll=tuple(base + math.log(1.01))
    )

    got = judge(result, spec()).perplexity

    assert got is not None
    assert got.low == pytest.approx(0.01)
    assert got.high == pytest.approx(0.01)


def test_limits_that_are_not_set_are_not_checked() -> None:
    """Their values are measured all the same."""
    got = judge(make_result(kl=9.0), spec(max_kl=None, min_top1_agreement=None))

    assert [check.name for check in got.checks] == ["max_perplexity_increase"]
    assert got.verdict == "PASS"
    assert got.kl is not None
    assert got.kl.value == pytest.approx(9.0)


def test_without_any_limit_nothing_passes() -> None:
    """An empty list of checks proves nothing."""
    got = judge(
        make_result(), spec(max_kl=None, min_top1_agreement=None, max_perplexity_increase=None)
    )

    assert (got.verdict, got.checks) == ("INCONCLUSIVE", ())
    assert "no limit" in got.reasons[0]


@pytest.mark.parametrize(("windows", "verdict"), [(MIN_WINDOWS, "PASS"), (2, "INCONCLUSIVE")])
def test_a_tasks_limit_is_a_limit_and_takes_the_windows_place_in_nothing(
    windows: int, verdict: str
) -> None:
    """Where it is the only one, it decides; with too few windows nothing passes all the same."""
    none = {"max_kl": None, "min_top1_agreement": None, "max_perplexity_increase": None}
    (passed, *_) = (task for task in make_tasks() if task.verdict == "PASS")

    got = judge(dataclasses.replace(make_result(windows), tasks=(passed,)), spec(**none))

    assert got.verdict == verdict
    assert ["at least 8 are needed" in reason for reason in got.reasons] == [True] * (windows < 8)


@pytest.mark.parametrize("windows", [1, 2, MIN_WINDOWS - 1])
def test_too_few_windows_decide_nothing_and_say_how_many_are_needed(windows: int) -> None:
    """However good the values look."""
    got = judge(make_result(windows), spec())

    assert got.verdict == "INCONCLUSIVE"
    assert {check.verdict for check in got.checks} == {"INCONCLUSIVE"}
    (reason,) = got.reasons
    assert f"{windows}, and at least 8 are needed" in reason
    assert judge(make_result(MIN_WINDOWS), spec()).verdict == "PASS"


def test_a_divergence_of_exactly_zero_is_a_copy_and_fails() -> None:
    """Also with too few windows: equality needs no statistics."""
    for windows in (3, 64):
        result = make_result(windows)
        copied = dataclasses.replace(
            result, candidate_nll=result.baseline_nll, kl=(0.0,) * windows, kl_max=0.0, kl_p99=0.0
        )

        got = judge(copied, spec())

        assert got.verdict == "FAIL"
        assert "exactly zero" in got.reasons[0]


@pytest.mark.parametrize("where", ["baseline_nll", "candidate_nll", "kl"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_fails_without_numbers(where: str, poison: float) -> None:
    """No NaN can slip through a comparison or into a report."""
    result = make_result()
    values = {where: (poison, *getattr(result, where)[1:])}

    got = judge(dataclasses.replace(result, finite=False, **values), spec())  # type: ignore[arg-type]

    assert got.verdict == "FAIL"
    assert (got.checks, got.perplexity, got.kl, got.top1_agreement) == ((), None, None, None)
    assert "not finite" in got.reasons[0]
    whose = {
        "baseline_nll": "the baseline's",
        "candidate_nll": "the artifact's",
        "kl": "one of the",
    }
    assert whose[where] in got.reasons[0]
    json.dumps(dataclasses.asdict(got), allow_nan=False)


def test_an_infinite_logit_that_leaves_the_scores_finite_fails_too() -> None:
    """The worker's word counts, not only the scores."""
    assert judge(dataclasses.replace(make_result(), finite=False), spec()).verdict == "FAIL"


def test_suspicions_fail_whatever_the_numbers_are() -> None:
    """Those of the evaluation and those that are passed in, all told."""
    result = dataclasses.replace(make_result(), suspicions=("it loops",), versions={"torch": "2"})

    got = judge(result, spec(), suspicions=["hashes differ"])

    assert got.verdict == "FAIL"
    assert got.reasons == ("it loops", "hashes differ")
    assert got.measured_with == {"torch": "2"}
    assert {check.verdict for check in got.checks} == {"PASS"}


def test_an_artifact_that_is_beyond_measure_fails_with_numbers_that_json_has() -> None:
    """A perplexity that overflows is cut at e^700, far outside of any limit."""
    result = make_result()
    broken = dataclasses.replace(result, candidate_nll=tuple(5000.0 + i for i in range(64)))

    got = judge(broken, spec())

    assert got.verdict == "FAIL"
    json.dumps(dataclasses.asdict(got), allow_nan=False)


def test_another_tokenizer_fails_unless_the_recipe_wants_a_note() -> None:
    """A server that is given token ids never asks the runtime's tokenizer."""
    result = dataclasses.replace(make_result(), tokenizer_findings=("other ids in 2 texts",))

    assert judge(result, spec()).verdict == "FAIL"
    assert judge(result, spec()).reasons == ("other ids in 2 texts",)
    tolerated = judge(result, spec(tokenizer="note"))
    assert tolerated.verdict == "PASS"
    assert tolerated.notes == ("other ids in 2 texts",)


def at_look(windows: int, looks: tuple[int, ...], **values: float) -> EvalResult:
    """A measurement of so many windows, on the way through some looks."""
    return dataclasses.replace(make_result(windows, **values), looks=looks)


def test_one_look_is_judged_as_ever() -> None:
    """Neither wider intervals nor a note."""
    got = judge(at_look(64, (64,)), spec())

    assert got == dataclasses.replace(judge(make_result(), spec()), looks=(64,))
    assert (got.confidence, got.notes) == (0.95, ())


@pytest.mark.parametrize("windows", [32, 64, 128])
def test_each_of_three_looks_is_as_sure_as_all_together_need(windows: int) -> None:
    """The intervals that are shown are those that decide, and a note says what they are."""
    got = judge(at_look(windows, (32, 64, 128)), spec())

    assert got.verdict == "PASS"
    assert got.confidence == find_look_confidence(0.95, 3) == 0.9834
    bounds = mean_intervals(np.array(make_result(windows).kl)[:, None], 0.9834)[0]
    assert got.kl is not None
    assert (got.kl.low, got.kl.high) == pytest.approx(tuple(bounds))
    assert got.notes == (
        f"judged after {windows} windows; the gate may decide after 32, 64 or 128, so each "
        "decision uses 98.34% intervals, which keeps the confidence of all of them together at 95%",
    )
    assert got.looks == (32, 64, 128)


def test_a_look_can_decide_either_way_or_leave_it_open() -> None:
    """PASS and FAIL end the measurement at the first look already."""
    looks = (32, 64, 128)

    verdicts = [judge(at_look(32, looks, kl=kl), spec()).verdict for kl in (0.03, 0.09, 0.048)]

    assert verdicts == ["PASS", "FAIL", "INCONCLUSIVE"]


def test_what_is_inconclusive_says_how_many_more_windows_it_wants() -> None:
    """And what stands in their way: the data's end, or the recipe."""
    short = judge(at_look(64, (16, 32, 64), kl=0.049), spec(samples=16, max_samples=500))
    allowed = judge(at_look(64, (16, 32, 64), kl=0.049), spec(samples=16))

    assert short.verdict == allowed.verdict == "INCONCLUSIVE"
    needed = re.search(r"at least (\d+) more are needed", short.reasons[-1])
    assert needed
    assert short.reasons[-1].endswith("the evaluation data holds 64: give more text")
    assert allowed.reasons[-1].endswith("gate.max_samples allows 64: raise it")
    # As many windows do decide where mean and spread stay what they are.
    times = 2 + int(needed[1]) // 64
    same = {
        name: getattr(make_result(kl=0.049), name) * times
        for name in ("baseline_nll", "candidate_nll", "kl", "agreement")
    }
    more = dataclasses.replace(at_look(64, (16, 32, 64)), **same)
    assert judge(more, spec()).verdict == "PASS"


def test_a_failure_asks_for_no_windows() -> None:
    """Also where another check is open: the verdict stands."""
    got = judge(make_result(kl=0.0495, agreement=0.8), spec())

    assert got.verdict == "FAIL"
    assert not [reason for reason in got.reasons if "windows" in reason]


def test_bounds_stay_where_values_can_be() -> None:
    """No divergence is negative and no agreement above one, whatever the formula says."""
    skewed = (*[0.0] * 7, 0.001)
    result = dataclasses.replace(
        make_result(8), kl=skewed, agreement=tuple(1 - value for value in skewed)
    )

    got = judge(result, spec())

    assert got.kl is not None
    assert got.top1_agreement is not None
    assert got.kl.low >= 0
    assert got.top1_agreement.high <= 1


def test_the_demo_is_judged_alike_whatever_the_seed_is() -> None:
    """On its measured windows, in 20 orders of them; a verdict is not a matter of luck."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "gate_windows.json"
    found = json.loads(path.read_text())
    looks = plan_looks(128, len(found["kl"]))
    rest = {"looks": looks, "kl_p99": found["kl_p99"], "kl_max": found["kl_max"]}

    verdicts = []
    for seed in range(20):
        order = draw(len(found["kl"]), seed)[: looks[0]]
        measured = {
            name: tuple(found[name][window] for window in order)
            for name in ("baseline_nll", "candidate_nll", "kl", "agreement")
        }
        result = dataclasses.replace(make_result(), **rest, **measured)
        verdicts.append(judge(result, spec(seed=seed)).verdict)

    assert verdicts == ["PASS"] * 20
