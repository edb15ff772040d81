"""What can be done with artifacts that exist, ours or anybody's."""

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
from quantkit.checkpoint.source import resolve_source
from quantkit.conversion import loadable, note_loading
from quantkit.describe import Stopwatch
from quantkit.encoder_pipeline.gate import time_encoder
from quantkit.evidence import JudgedArtifact, build_gate_report, read_evidence
from quantkit.formats.inspect import inspect_artifact
from quantkit.formats.inspected import Inspection
from quantkit.formats.verify import Verification, verify_artifact
from quantkit.gating import (
    add_decoder_speed,
    check_recorded_files,
    check_side_files,
    find_gate_spec,
    recorded_gate,
)
from quantkit.inputs import RecipeLike, check_gate_inputs
from quantkit.judging.custom_checks import GateCheck
from quantkit.recipe import Overrides
from quantkit.records import Progress, Report, TextRows
from quantkit.report import write_reports
from quantkit.running import memory_errors, silent, staged
from quantkit.schemes import ONNX
from quantkit.staging import commit, gate_output


def inspect(artifact: str | os.PathLike[str]) -> Inspection:
    """Say what is in an artifact or checkpoint, from its headers.

    Raises:
        ArtifactError: there is nothing that can be read.
    """
    return inspect_artifact(Path(artifact))


def verify(
    artifact: str | os.PathLike[str], *, against: str | os.PathLike[str] | None = None
) -> Verification:
    """Say whether an artifact is well-formed, complete and finite, and which runtimes serve it.

    Reads every tensor. Where quantkit.json lies beside, its hashes are computed again.

    Args:
        artifact: an output of `quantize`, a compressed-tensors folder, a checkpoint, or a GGUF
            file.
        against: folder, Hub id or id@revision of the original, to compare with.

    Raises:
        ArtifactError: there is nothing that can be read.
        CheckpointError: the original cannot be read, or is quantized itself.
    """
    found = verify_artifact(Path(artifact), None if against is None else os.fspath(against))
    file = None if found.file is None else found.file.name
    changed = check_recorded_files(read_evidence(found.folder), found.folder, file)
    sides: tuple[str, ...] = ()
    if against is not None:
        base = resolve_source(os.fspath(against)).folder
        sides = check_side_files(base, inspect_artifact(Path(artifact)))
    return replace(found, problems=(*found.problems, *changed, *sides))


@tracing.job("gate")
def gate(
    artifact: str | os.PathLike[str],
    *,
    baseline: str | os.PathLike[str],
    recipe: RecipeLike | None = None,
    data: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    overrides: Overrides = (),
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    checks: Sequence[GateCheck] = (),
) -> Report:
    """Judge an artifact that exists, ours or anybody's, against its 16-bit baseline.

    Args:
        artifact: an output of `quantize`, a folder that transformers can load, a GGUF or an ONNX
            file.
        baseline: folder, Hub id or id@revision of the original.
        recipe: where the limits and the data come from; by default the recipe in the artifact's
            own evidence, else the default limits.
        data: evaluation text; replaces the recipe's.
        output: folder for the reports; by default `<artifact>.gate`.
        overrides: `gate.KEY=VALUE` pairs.
        device: `auto`, `cpu` or `cuda`.
        overwrite: replace reports that exist.
        progress: called after each step.
        checks: functions of your own that ask both models; one that fails, fails the artifact.

    Raises:
        InputError: something that was given cannot be used.
    """
    tell = progress or silent
    watch = Stopwatch()
    target = gate_output(artifact, output)
    check_gate_inputs(target, baseline, data, overwrite=overwrite)
    with staged(target, overwrite=overwrite, tell=tell) as partial, memory_errors():
        candidate = open_candidate(artifact, _own_name(artifact))
        spec = find_gate_spec(recipe, candidate.recorded, data, overrides)
        bench = prepare_bench(os.fspath(baseline), spec, [candidate], device, checks)
        notes = [*candidate.found.problems, *bench.notes]
        notes += note_loading(bench.folder, "the baseline", bench.runtime)
        notes += note_loading(candidate.location, "the artifact", candidate.runtime(spec))
        if recipe is None and recorded_gate(candidate.recorded):
            notes.append("the limits are those that the artifact's own quantkit.json names")
        with (
            watch.time("gate"),
            unchanged([candidate]),
            loadable(bench.folder, bench.runtime, partial) as baseline_folder,
        ):
            judged = judge_candidate(candidate, bench, baseline_folder, partial, tell)
            judged = _add_speed(judged, candidate, bench, partial, tell)
        report = build_gate_report(
            [judged], bench.checkpoint, bench.evaluation, spec, watch, notes, task=bench.task
        )
        write_reports(report, partial)
        commit(partial, target, overwrite=overwrite)
    return report


def _add_speed(
    judged: JudgedArtifact, candidate: Candidate, bench: Bench, scratch: Path, tell: Progress
) -> JudgedArtifact:
    """Time what runs in ONNX Runtime beside its float graph, which is written to `scratch`."""
    if candidate.found.format != ONNX:
        return judged
    judgement, path = judged.judgement, candidate.location
    if isinstance(bench.evaluation, TextRows):
        assert bench.info is not None
        judgement = time_encoder(
            judgement,
            bench.checkpoint,
            path,
            bench.evaluation,
            bench.info,
            bench.spec,
            scratch,
            tell,
        )
    else:
        judgement = add_decoder_speed(judgement, bench.checkpoint, path, bench.spec, tell)
    return replace(judged, judgement=judgement)


def _own_name(artifact: str | os.PathLike[str]) -> str:
    return Path(os.path.abspath(artifact)).name
