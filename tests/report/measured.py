"""What the gate measures besides its limits, made by hand with numbers like those of a real job."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from quantkit.records import (
    ArtifactReport,
    Details,
    Difference,
    DomainResult,
    Footprint,
    Generation,
    Judgement,
    Metric,
    Parting,
    PositionRange,
    Probe,
    Report,
    TaskResult,
    TokenChoice,
    Verdict,
)
from tests.report.sample import make_judgement, make_report

RANGES = ((0, 1), (1, 4), (4, 16), (16, 64), (64, 256), (256, 511))

_BEFORE = (
    "The optional keyword-only argument decides what happens with files that are there already.\\n"
    "By default they are kept, and a warning is shown for each. To have them replaced, pass"
)


def make_measured_report(verdict: Verdict = "PASS") -> Report:
    """Return a report on one artifact with everything that a gate measures."""
    report = make_report(verdict)
    judgement = with_measurements(report.artifacts[0].judgement, failing=verdict == "FAIL")
    return replace(report, artifacts=(replace(report.artifacts[0], judgement=judgement),))


def make_comparison(
    names: tuple[str, ...] = ("IQ3_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"),
) -> Report:
    """Return a comparison: the first artifact fails, the last two are not told apart."""
    artifacts = tuple(_competitor(number, name) for number, name in enumerate(names))
    pairs = itertools.combinations(range(len(names)), 2)
    return replace(
        make_report(blocks=0),
        artifacts=artifacts,
        layers=(),
        evidence={},
        comparison=True,
        baseline_footprint=Footprint(
            "transformers 5.23.0", 0.41, 402_653_184, 2210.0, 77.1, 2, "weights in float32"
        ),
        differences=tuple(_difference(artifacts, *pair, last=len(names) - 1) for pair in pairs),
    )


def with_measurements(
    judgement: Judgement, *, failing: bool = False, scale: float = 1.0
) -> Judgement:
    """Return the judgement with details, probes, tasks and a footprint; KL is `scale` times."""
    return replace(
        judgement,
        details=make_details(scale),
        probes=make_probes(failing=failing),
        tasks=make_tasks(failing=failing),
        footprint=Footprint(
            runtime="transformers",
            load_seconds=0.84,
            memory_bytes=612_368_384,
            prefill=1843.2,
            decoding=61.37,
            threads=2,
            what="weights in float32, a prompt of 256 tokens and 64 behind it, medians of 5 "
            "repetitions (spread 3% and 4%)",
        ),
    )


def make_details(scale: float = 1.0) -> Details:
    """Return details of every kind."""
    return Details(
        reverse_kl=_around(0.0131 * scale, 0.04),
        top5_agreement=_around(0.9712 - 0.01 * scale, 0.003),
        flips=_around(0.0512 * scale, 0.05),
        lost=0.0301 * scale,
        positions=tuple(
            PositionRange(start, stop, _around(_kl_at(start) * scale, 0.1), _around(0.94, 0.01))
            for start, stop in RANGES
        ),
        domains=(
            DomainResult("code", 61, 14_208, _around(0.0191 * scale, 0.08), 0.0212, 0.9288),
            DomainResult(
                "documentation", 128, 42_311, _around(0.0117 * scale, 0.05), 0.0171, 0.9451
            ),
            DomainResult("tables", 17, 8_889, _around(0.0078 * scale, 0.15), -0.0031, 0.9613),
        ),
        partings=make_partings(scale),
        generations=make_generations(),
        windows=(17, 3, 204),
        baseline_nll=(2.31, 2.75, 1.98),
        artifact_nll=(2.36, 2.76, 1.97),
        kl=(0.021 * scale, 0.0113 * scale, 0.0046 * scale),
    )


def make_partings(scale: float = 1.0) -> tuple[Parting, ...]:
    """Return two partings: of the first tokens, and of their probabilities alone."""
    return (
        Parting(
            window=204,
            kl=0.0814 * scale,
            position=133,
            position_kl=2.716 * scale,
            before=_BEFORE,
            actual="␣replace",
            baseline=_choices(("␣replace", 0.6213), ("␣True", 0.1402), ("␣the", 0.0521)),
            artifact=_choices(("␣True", 0.4187), ("\\n", 0.1933), ("␣replace", 0.0412)),
        ),
        Parting(
            window=17,
            kl=0.0611 * scale,
            position=0,
            position_kl=1.204 * scale,
            before="def",
            actual="␣__init__",
            baseline=_choices(("␣test", 0.5), ("␣__init__", 0.21), ("␣main", 0.0004)),
            artifact=_choices(("␣test", 0.81), ("␣main", 0.06), ("␣run", 0.02)),
        ),
    )


def make_generations() -> tuple[Generation, ...]:
    """Return continuations that part, that are the same, and that never end."""
    prompt = "Write one sentence about what a checksum is for."
    start = " A checksum shows whether a file has been "
    return (
        Generation(
            prompt,
            start + "changed: it is computed again and compared with the one that was stored.",
            start + "damaged on its way. It does not show who changed it.",
            9,
            True,
            True,
        ),
        Generation('Answer in JSON: {"name": ', '"demo"}', '"demo"}', 4, True, True),
        Generation(
            "List three colours:\\n",
            "1. red\\n2. green\\n3. blue\\n",
            "1. red\\n2. green\\n2. green\\n2. green\\n2. green\\n2. green\\n",
            10,
            True,
            False,
        ),
        Generation(
            "Der Hafen war", " still an diesem Morgen", " leer an diesem Morgen", 0, False, False
        ),
        Generation(
            "Water boils at", " a lower temperature", " a lower temperature", 4, False, False
        ),
        Generation("Two plus two is", " four.", " four. Three", 3, True, False),
    )


def make_probes(*, failing: bool = False) -> tuple[Probe, ...]:
    """Return the five probes: one without a limit, and one that could not be looked at."""
    loops, verdict = (0.375, "FAIL") if failing else (0.0417, "PASS")
    return (
        Probe("new_loops", loops, 0.25, verdict, "of 24 prompts; the worst begins with “List”"),  # type: ignore[arg-type]
        Probe("changed_endings", 0.125, 0.5, "PASS", "3 of 24 prompts"),
        Probe("lost_json", None, 0.25, "UNJUDGED", "the baseline gives no valid JSON either"),
        Probe("special_tokens", 0.3127, None, "UNJUDGED", "of 5 tokens; the largest is </s>"),
        Probe("long_context", 1.62, 3.0, "PASS", "KL at 513 to 2,048 against 1 to 512"),
    )


def make_tasks(*, failing: bool = False) -> tuple[TaskResult, ...]:
    """Return a task with a limit and one without."""
    recovery, verdict = (0.9311, "FAIL") if failing else (0.9902, "PASS")
    return (
        TaskResult(
            "arc_easy", "acc", True, 570, 0.4123, 0.4123 * recovery, recovery, recovery - 0.012,
            recovery + 0.012, 0.3877, 12, 9, 0.97, verdict,  # type: ignore[arg-type]
        ),
        TaskResult(
            "wikitext", "word_perplexity", False, 62, 21.37, 21.66, 0.9866, 0.9821, 0.9911, None,
            41, 21, None, "UNJUDGED",
        ),
    )  # fmt: skip


def _competitor(number: int, name: str) -> ArtifactReport:
    judgement = make_judgement("PASS" if number else "FAIL")
    kl = 0.0731 * 0.3**number
    judgement = with_measurements(
        replace(judgement, kl=replace(_around(kl, 0.05), p99=7 * kl, maximum=30 * kl)),
        failing=not number,
        scale=kl / 0.0123,
    )
    assert judgement.footprint is not None
    what = "weights as in the file, a prompt of 256 tokens and 64 behind it"
    footprint = replace(judgement.footprint, runtime="llama.cpp", what=what)
    return replace(
        make_report().artifacts[0],
        name=f"demo-llama-{name}.gguf",
        format="gguf",
        scheme=name,
        size_bytes=round(3_100_000 * 1.22**number),
        bits_per_weight=3.7 * 1.22**number,
        runtime="llama.cpp",
        judgement=replace(judgement, footprint=footprint),
    )


def _difference(
    artifacts: tuple[ArtifactReport, ...], first: int, second: int, *, last: int
) -> Difference:
    kls = [artifacts[number].judgement.kl for number in (first, second)]
    gap = math.nan if None in kls else kls[0].value - kls[1].value  # type: ignore[union-attr]
    significant = (first, second) != (last - 1, last)
    half = abs(gap) * (0.2 if significant else 1.6)
    metric = Metric(gap, gap - half, gap + half)
    names = artifacts[first].name, artifacts[second].name
    return Difference(*names, 128, metric, significant)


def _kl_at(position: int) -> float:
    return 0.0105 + 0.021 / (1 + position) ** 0.5


def _around(value: float, share: float) -> Metric:
    return Metric(value, value * (1 - share), min(1.0, value * (1 + share)))


def _choices(*found: tuple[str, float]) -> tuple[TokenChoice, ...]:
    return tuple(TokenChoice(text, probability) for text, probability in found)
