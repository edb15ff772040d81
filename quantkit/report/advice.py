"""What a verdict means in words, and what to try when it is not PASS."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from quantkit.judging.needing import estimate_windows
from quantkit.judging.percentile import LOWEST_COSINE, texts_for_percentile
from quantkit.recipe import MIN_WINDOWS
from quantkit.records import (
    IN_MEMORY,
    ArtifactReport,
    Check,
    LayerRecord,
    Report,
    TaskResult,
    Verdict,
)
from quantkit.report.choice import comparison_sentence
from quantkit.report.custom import custom_rows
from quantkit.report.layers import layer_error, worst_layers
from quantkit.report.probes import ProbeRow, TaskRow, probe_rows, task_rows
from quantkit.report.rounding import format_count, format_percent
from quantkit.report.rows import is_encoder
from quantkit.schemes import GROUP_SIZES, ONNX

_FUSED = MappingProxyType(
    {
        "q_proj": ("q_proj", "k_proj", "v_proj"),
        "k_proj": ("q_proj", "k_proj", "v_proj"),
        "v_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_proj": ("gate_proj", "up_proj"),
        "up_proj": ("gate_proj", "up_proj"),
    }
)
"""Layers that vLLM fuses and that must therefore keep one scheme."""


@dataclass(frozen=True)
class Suggestion:
    """One thing to try: why, and the lines to put into the recipe (or the command)."""

    why: str
    setting: str


def verdict_sentence(report: Report) -> str:
    """Say in one sentence what the verdict rests on."""
    if report.comparison:
        return comparison_sentence(report)
    if report.verdict == "UNJUDGED":
        return "Nothing was measured: how close this is to its baseline is not known."
    if report.verdict == "PASS":
        return _passing_sentence(report)
    found = _of_limits(report, report.verdict)
    if report.verdict == "FAIL":
        failed = f"{found} failed. " if found else "It failed without a broken limit. "
        return f"{failed}Do not serve or publish this artifact."
    if not found:
        return "What was measured is not enough to decide."
    asked: list[Check | TaskResult] = [*_checks(report)]
    asked += [row.task for row in _judged_tasks(report)]
    ours = [each for each in asked if each.verdict == report.verdict]
    if all(each.limit is None or each.low <= each.limit <= each.high for each in ours):
        return f"{found} cannot be decided: the {_interval(report)} reaches across the limit."
    return f"{found} cannot be decided: too little was measured."


def _passing_sentence(report: Report) -> str:
    probes = _judged_probes(report)
    what = "check and task" if _judged_tasks(report) else "check"
    held = sum(row.verdict == "PASS" for row in probes)
    more = f", and {format_count(held, 'probe')} of behaviour hold{'s' if held == 1 else ''} too"
    sentence = f"Every limit holds: the whole {_interval(report)} of each {what} lies within it"
    sentence += f"{more if held else ''}."
    own = sum(len(custom_rows(artifact)) for artifact in report.artifacts)
    if own:
        sentence += f" {format_count(own, 'custom check')} pass{'es' if own == 1 else ''}."
    unseen = len(probes) - held
    if unseen:
        was = "was" if unseen == 1 else "were"
        sentence += f" {format_count(unseen, 'probe')} {was} not looked at."
    return sentence


def _interval(report: Report) -> str:
    """Name the intervals, without a number where they may differ: a look's share in the error
    makes those of checks wider, and not those of tasks."""
    levels = {artifact.judgement.confidence for artifact in report.artifacts}
    looks = any(len(artifact.judgement.looks) > 1 for artifact in report.artifacts)
    if len(levels) != 1 or (looks and _judged_tasks(report)):
        return "confidence interval"
    return f"{100 * levels.pop():.4g}% interval"


def _judged_probes(report: Report) -> list[ProbeRow]:
    return [row for each in report.artifacts for row in probe_rows(each) if row.is_judged]


def _judged_tasks(report: Report) -> list[TaskRow]:
    return [row for each in report.artifacts for row in task_rows(each) if row.is_judged]


def _of_limits(report: Report, verdict: Verdict) -> str:
    """Name what has this verdict: `2 of 3 checks and 1 of 5 probes`; empty for nothing."""
    kinds: dict[str, list[Verdict]] = {
        "check": [check.verdict for check in _checks(report)],
        "probe": [row.verdict for row in _judged_probes(report)],
        "task": [row.verdict for row in _judged_tasks(report)],
        "custom check": [row.verdict for each in report.artifacts for row in custom_rows(each)],
    }
    found = [
        _of(verdicts.count(verdict), len(verdicts), noun)
        for noun, verdicts in kinds.items()
        if verdict in verdicts
    ]
    words = " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)
    return words[:1].upper() + words[1:]


def all_reasons(report: Report) -> tuple[str, ...]:
    """Return the reasons of every judgement, with the artifact's name where there are several."""
    several = len(report.artifacts) > 1
    return tuple(
        f"{artifact.name}: {reason}" if several else reason
        for artifact in report.artifacts
        for reason in artifact.judgement.reasons
    )


def suggestions(report: Report) -> tuple[Suggestion, ...]:
    """Return what to try next, most promising first; nothing for a PASS.

    A failed limit, a task's too, is a matter of accuracy, so the advice is finer groups, a better
    method and more bits for the three worst layers. A failure without a failed limit (an artifact
    that is not finite, a worker that died) gets none: no setting of the recipe mends it. Nor do
    more windows decide anything where a limit is broken already.
    """
    if report.comparison:
        return ()
    if report.verdict == "UNJUDGED":
        return (_judge_it(report),)
    checks = _checks(report)
    found: list[Suggestion] = []
    tasks = [row.verdict for row in _judged_tasks(report)]
    if "FAIL" in [*(check.verdict for check in checks), *tasks]:
        if any(map(is_encoder, report.artifacts)):
            kept = report.evidence.get("encoder", {}).get("float_layers", ())
            found += _better_encoder(report.layers, len(kept))
        else:
            found += _better_rounding(report.layers)
            found += _find_the_guilty(report)
    is_open = any(check.verdict == "INCONCLUSIVE" for check in checks)
    if is_open and report.verdict == "INCONCLUSIVE":
        found.append(_more_windows(report))
    return tuple(found)


def _judge_it(report: Report) -> Suggestion:
    baseline, where = _name_baseline(report)
    paths = [shlex.quote(artifact.path) for artifact in report.artifacts]
    return Suggestion(
        f"Judge it against its baseline; OUTPUT is the folder of the job that made it{where}.",
        "\n".join(f"quantkit gate OUTPUT/{path} --baseline {baseline}" for path in paths),
    )


def _name_baseline(report: Report) -> tuple[str, str]:
    """Return the original for a command, and what has to be said about it."""
    if report.model.startswith(IN_MEMORY):
        return "MODEL", "; MODEL is the folder that you save the model into"
    return shlex.quote(report.model), ""


def _find_the_guilty(report: Report) -> list[Suggestion]:
    """The command that tells a defect from a budget, for formats that it reads."""
    failed = [
        artifact
        for artifact in report.artifacts
        if artifact.format != ONNX
        and any(check.verdict == "FAIL" for check in artifact.judgement.checks)
    ]
    if not failed:
        return []
    # A job knows its artifacts by their place in its output, a gate as they were given to it.
    is_job = "recipe" in report.evidence
    baseline, saved = _name_baseline(report)
    paths = [f"OUTPUT/{artifact.path}" if is_job else artifact.path for artifact in failed]
    where = ("; OUTPUT is the folder of the job" if is_job else "") + saved
    return [
        Suggestion(
            f"Let bisect find the layers that cost most, and what would make it pass{where}.",
            "\n".join(
                f"quantkit bisect {shlex.quote(path)} --baseline {baseline}" for path in paths
            ),
        )
    ]


def _checks(report: Report) -> list[Check]:
    return [check for artifact in report.artifacts for check in artifact.judgement.checks]


def _of(some: int, total: int, noun: str) -> str:
    if some == total:
        return f"the only {noun}" if total == 1 else f"all {total} {noun}s"
    return f"{some} of {total} {noun}s"


def _better_rounding(layers: Sequence[LayerRecord]) -> list[Suggestion]:
    quantized = [layer for layer in layers if layer.scheme != "none" and not layer.file_type]
    narrow = [layer for layer in quantized if layer.bits_per_weight < 8]
    found: list[Suggestion] = []
    if any(layer.method != "awq+gptq" for layer in narrow):
        found.append(
            Suggestion(
                "Let the calibration data choose both the scaling and the rounding.",
                "quantize:\n  method: awq+gptq",
            )
        )
    smaller = _smaller_group(narrow)
    if smaller is not None:
        size, cost = smaller
        found.append(
            Suggestion(
                f"Smaller groups follow the weights more closely, for {cost:.3g} bits more per "
                "weight.",
                f"quantize:\n  group_size: {size}",
            )
        )
    worst = worst_layers(narrow)
    if worst:
        found.append(_more_bits(worst))
    return found


def _better_encoder(layers: Sequence[LayerRecord], kept: int) -> list[Suggestion]:
    """What brings an INT8 encoder closer: better codes, scales of each batch, layers in float.

    Args:
        layers: those that are quantized.
        kept: how many more the job left in float because they are sensitive.
    """
    quantized = [layer for layer in layers if layer.scheme != "none"]
    found: list[Suggestion] = []
    if not all(layer.method.startswith("smoothquant+gptq") for layer in quantized):
        found.append(
            Suggestion(
                "Let the calibration data choose both the smoothing and the rounding.",
                "quantize:\n  method: smoothquant+gptq",
            )
        )
    if any(layer.scheme == "w8a8_static" for layer in quantized):
        found.append(
            Suggestion(
                "Scales of the inputs that follow each batch are closer than those of calibration, "
                "and take a little longer.",
                "quantize:\n  scheme: w8a8",
            )
        )
    worst = worst_layers(quantized)
    if worst:
        names = ", ".join(f"{layer.name} ({format_percent(layer_error(layer))})" for layer in worst)
        found.append(
            Suggestion(
                f"Leave more of the most sensitive layers in float. The largest error: {names}.",
                f"export:\n  - {{format: onnx, float_layers: {kept + len(worst)}}}",
            )
        )
    return found


def _smaller_group(layers: Sequence[LayerRecord]) -> tuple[int, float] | None:
    """The next smaller group size than the layers' largest, and its cost in bits per weight."""
    if not layers:
        return None
    sizes = [layer.group_size or math.inf for layer in layers]
    largest = max(sizes)
    size = max((size for size in GROUP_SIZES if size < largest), default=None)
    return None if size is None else (size, 16 / size - 16 / largest)


def _more_bits(worst: Sequence[LayerRecord]) -> Suggestion:
    names = ", ".join(f"{layer.name} ({format_percent(layer_error(layer))})" for layer in worst)
    which = f"the {len(worst)} layers" if len(worst) > 1 else "the layer"
    why = f"Give 8 bits to {which} with the largest error: {names}."
    patterns = list(dict.fromkeys(name for layer in worst for name in _fused_names(layer.name)))
    if len(patterns) > len(worst):
        why += " Layers that vLLM fuses with one of them change together with it."
    rows = [f"    - {{match: {_quote(name)}, scheme: w8a16}}" for name in patterns]
    return Suggestion(why, "\n".join(["quantize:", "  overrides:", *rows]))


def _quote(text: str) -> str:
    """A JSON string is a quoted YAML scalar too, whatever is in it."""
    return json.dumps(text, ensure_ascii=False)


def _fused_names(name: str) -> list[str]:
    """The names of the layers that share a scheme with `name`, itself included."""
    parent, _, last = name.rpartition(".")
    return [f"{parent}.{member}" if parent else member for member in _FUSED.get(last, (last,))]


def _more_windows(report: Report) -> Suggestion:
    """As many windows as the reasons ask for, measured at once."""
    of_encoder = any(map(is_encoder, report.artifacts))
    what = "texts" if of_encoder else "windows"
    found = [_needed_windows(each) for each in report.artifacts]
    needed = max((number for number in found if number is not None), default=0)
    if None in found or not needed:
        return Suggestion(
            f"The value lies so near its limit that more {what} will hardly decide. Take a "
            "better method or more bits, or set the limit that you can live with.",
            "",
        )
    windows = max(artifact.judgement.windows for artifact in report.artifacts)
    # A number for both keys: it is valid whatever the recipe has, and one look at all of them has
    # narrower intervals than the last one of several.
    keys = ("samples",) if of_encoder else ("samples", "max_samples")
    return Suggestion(
        f"Measure more: there were {windows} {what}, and by their spread at least {needed} are "
        "needed. The evaluation data must hold as many.",
        "\n".join(["gate:", *(f"  {key}: {needed}" for key in keys)]),
    )


def _needed_windows(artifact: ArtifactReport) -> int | None:
    """How many windows would decide its open checks; 0 without any, None where hardly any do."""
    judgement = artifact.judgement
    open_checks = [check for check in judgement.checks if check.verdict == "INCONCLUSIVE"]
    if not open_checks:
        return 0
    unbounded = [
        check
        for check in open_checks
        if check.name == "min_cosine_p1" and check.low == LOWEST_COSINE
    ]
    others = [check for check in open_checks if check not in unbounded]
    needed = estimate_windows(others, judgement.windows)
    if needed is None:
        return None
    texts = texts_for_percentile(judgement.confidence) if unbounded else 0
    return max(needed, texts, MIN_WINDOWS)
