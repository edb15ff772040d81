"""Artifacts of one model side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantkit import tracing
from quantkit.candidates import (
    Bench,
    Candidate,
    judge_candidate,
    open_candidate,
    prepare_bench,
    unchanged,
)
from quantkit.conversion import loadable, note_loading
from quantkit.describe import Stopwatch
from quantkit.environments.places import find_python
from quantkit.errors import InputError, ResourceError, WorkerError
from quantkit.evidence import JudgedArtifact, build_gate_report
from quantkit.gating import find_gate_spec
from quantkit.inputs import RecipeLike, check_gate_inputs
from quantkit.judging.custom_checks import GateCheck
from quantkit.judging.differences import find_differences
from quantkit.judging.footprint import measure_footprint
from quantkit.recipe import Overrides
from quantkit.records import Event, Footprint, Progress, Report, TextRows
from quantkit.report import write_reports
from quantkit.running import memory_errors, silent, staged
from quantkit.staging import commit


@tracing.job("compare")
def compare(
    baseline: str | os.PathLike[str],
    artifacts: Sequence[str | os.PathLike[str]],
    *,
    recipe: RecipeLike | None = None,
    data: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] = "comparison",
    overrides: Overrides = (),
    device: str = "auto",
    overwrite: bool = False,
    footprint: bool = True,
    progress: Progress | None = None,
    checks: Sequence[GateCheck] = (),
) -> Report:
    """Measure artifacts of one model side by side, on the same tokens, in one report.

    Each runs in the runtime that its format is for. The report's verdict is the best that any of
    them got: PASS means that there is one to ship.

    Args:
        baseline: folder, Hub id or id@revision of the 16-bit original.
        artifacts: what to compare, at least one; as for `gate`.
        recipe: where the limits and the data come from; by default the default limits.
        data: evaluation text; replaces the recipe's.
        output: folder for the reports.
        overrides: `gate.KEY=VALUE` pairs.
        device: `auto`, `cpu` or `cuda`.
        overwrite: replace reports that exist.
        footprint: whether load time, memory and speed of each are measured, which loads it again.
        progress: called after each step.
        checks: functions of your own that ask both models; one that fails, fails the artifact.

    Raises:
        InputError: something that was given cannot be used.
    """
    tell = progress or silent
    watch = Stopwatch()
    target = Path(output)
    if not artifacts:
        raise InputError("nothing to compare: name at least one artifact after the baseline")
    check_gate_inputs(target, baseline, data, overwrite=overwrite)
    with staged(target, overwrite=overwrite, tell=tell) as partial, memory_errors():
        names = _distinct_names(artifacts)
        candidates = [
            open_candidate(path, name) for path, name in zip(artifacts, names, strict=True)
        ]
        spec = find_gate_spec(recipe, {}, data, overrides)
        bench = prepare_bench(os.fspath(baseline), spec, candidates, device, checks)
        notes = [*bench.notes, *note_loading(bench.folder, "the baseline", bench.runtime)]
        for candidate in candidates:
            notes += [f"{candidate.name}: {problem}" for problem in candidate.found.problems]
            notes += note_loading(candidate.location, candidate.name, candidate.runtime(spec))
        judged = []
        with unchanged(candidates):
            with loadable(bench.folder, bench.runtime, partial) as baseline_folder:
                for number, candidate in enumerate(candidates):
                    tell(Event("compare", number, len(candidates), candidate.name))
                    with watch.time(f"gate {candidate.name}"):
                        judged.append(
                            judge_candidate(candidate, bench, baseline_folder, partial, tell)
                        )
            tell(Event("compare", len(candidates), len(candidates)))
            own: Footprint | None = None
            if footprint:
                with watch.time("footprints"):
                    judged, own, problems = _add_footprints(
                        judged, candidates, bench, partial, tell
                    )
                notes += problems
        report = build_gate_report(
            judged,
            bench.checkpoint,
            bench.evaluation,
            spec,
            watch,
            notes,
            task=bench.task,
            comparison=True,
            differences=find_differences({each.name: each.judgement for each in judged}),
        )
        report = replace(report, baseline_footprint=own)
        write_reports(report, partial)
        commit(partial, target, overwrite=overwrite)
    return report


def _add_footprints(
    judged: Sequence[JudgedArtifact],
    candidates: Sequence[Candidate],
    bench: Bench,
    scratch: Path,
    tell: Progress,
) -> tuple[list[JudgedArtifact], Footprint | None, list[str]]:
    """Take the footprints of what was judged and of the baseline, one worker after the other.

    Returns:
        the artifacts, what the baseline has, and notes on what could not be measured.
    """
    if isinstance(bench.evaluation, TextRows):
        return list(judged), None, ["load time, memory and speed of encoders are not compared"]
    notes = []

    def measure(
        number: int, name: str, location: Path, runtime: str, role: str, *, quantized: bool
    ) -> Footprint | None:
        tell(Event("footprint", number, 1 + len(judged), name))
        try:
            with loadable(location, runtime, scratch) as loaded:
                return measure_footprint(
                    loaded,
                    runtime,
                    quantized=quantized,
                    role=role,
                    device=bench.device,
                    python=find_python(runtime, bench.spec.python),
                    timeout_seconds=bench.spec.timeout_seconds,
                )
        except (InputError, ResourceError, WorkerError) as error:
            notes.append(f"{name}: load time, memory and speed were not measured: {error}")
            return None

    stored = bool(note_loading(bench.folder, "the baseline", bench.runtime))
    own = measure(0, "the baseline", bench.folder, bench.runtime, "baseline", quantized=stored)
    rows = []
    for number, (each, candidate) in enumerate(zip(judged, candidates, strict=True), start=1):
        if each.judgement.kl is None:
            notes.append(f"{each.name}: it could not be judged, and was not timed")
            rows.append(each)
            continue
        runtime = candidate.runtime(bench.spec)
        quantized = candidate.found.scheme != "none"
        found = measure(
            number, each.name, candidate.location, runtime, "candidate", quantized=quantized
        )
        rows.append(replace(each, judgement=replace(each.judgement, footprint=found)))
    tell(Event("footprint", 1 + len(judged), 1 + len(judged)))
    return rows, own, notes


def _distinct_names(artifacts: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Call each artifact by as many of the last parts of its path as tell it from the others.

    Raises:
        InputError: one is named twice.
    """
    parts = [Path(os.path.abspath(artifact)).parts for artifact in artifacts]
    if len(set(parts)) < len(parts):
        twice = next(
            path for path, each in zip(artifacts, parts, strict=True) if parts.count(each) > 1
        )
        raise InputError(f"{os.fspath(twice)} is named twice: compare different artifacts")
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = next(
            n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others)
        )
        names.append("/".join(own[-length:]))
    return names
