"""What can be done with artifacts that exist, ours or anybody's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.calibration.compute import choose_device
from quantkit.calibration.data import load_tokenizer
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.conversion import dequantized_folder, note_dequantized
from quantkit.describe import Stopwatch
from quantkit.encoder_pipeline.gate import judge_graph, time_encoder
from quantkit.encoder_pipeline.job import load_evaluation_rows
from quantkit.encoders.architectures import is_encoder
from quantkit.encoders.model import describe_encoder
from quantkit.errors import InputError
from quantkit.evidence import (
    JudgedArtifact,
    build_gate_report,
    find_runtime,
    read_evidence,
)
from quantkit.formats.inspect import inspect_artifact
from quantkit.formats.inspected import Inspection
from quantkit.formats.verify import Verification, verify_artifact
from quantkit.gating import (
    add_decoder_speed,
    check_interpreter,
    check_recorded_files,
    check_side_files,
    find_gate_spec,
    judge_files,
    recorded_gate,
)
from quantkit.inputs import RecipeLike, check_gate_inputs
from quantkit.job import load_evaluation
from quantkit.judging.evaluate import find_baseline_runtime
from quantkit.recipe import GateSpec
from quantkit.records import (
    EncoderInfo,
    Event,
    Judgement,
    Progress,
    Report,
    TextRows,
    TokenWindows,
)
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


def gate(
    artifact: str | os.PathLike[str],
    *,
    baseline: str | os.PathLike[str],
    recipe: RecipeLike | None = None,
    data: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
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

    Raises:
        InputError: something that was given cannot be used.
    """
    tell = progress or silent
    watch = Stopwatch()
    target = gate_output(artifact, output)
    check_gate_inputs(target, os.fspath(baseline), data, overwrite=overwrite)
    candidate = _open(artifact, _own_name(artifact))
    spec = find_gate_spec(recipe, candidate.recorded, data, overrides)
    bench = _prepare(os.fspath(baseline), spec, [candidate], device)
    notes = [*candidate.found.problems, *bench.notes]
    notes += _note_loading(bench.folder, "the baseline", bench.runtime)
    notes += _note_loading(candidate.location, "the artifact", candidate.runtime(spec))
    if recipe is None and recorded_gate(candidate.recorded):
        notes.append("the limits are those that the artifact's own quantkit.json names")
    with staged(target, overwrite=overwrite) as partial, memory_errors():
        with watch.time("gate"), _loadable(bench.folder, bench.runtime, partial) as baseline_folder:
            judged = _judge(candidate, bench, baseline_folder, partial, tell)
            judged = _add_speed(judged, candidate, bench, partial, tell)
        report = build_gate_report(
            [judged], bench.checkpoint, bench.evaluation, spec, watch, notes, task=bench.task
        )
        write_reports(report, partial)
        commit(partial, target)
    return report


def compare(
    baseline: str | os.PathLike[str],
    artifacts: Sequence[str | os.PathLike[str]],
    *,
    recipe: RecipeLike | None = None,
    data: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] = "comparison",
    overrides: Sequence[str] = (),
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Measure artifacts of one model side by side, on the same tokens, in one report.

    The report's verdict is the best that any of them got: PASS means that there is one to ship.

    Args:
        baseline: folder, Hub id or id@revision of the 16-bit original.
        artifacts: what to compare, at least one; as for `gate`.
        recipe: where the limits and the data come from; by default the default limits.
        data: evaluation text; replaces the recipe's.
        output: folder for the reports.
        overrides: `gate.KEY=VALUE` pairs.
        device: `auto`, `cpu` or `cuda`.
        overwrite: replace reports that exist.
        progress: called after each step.

    Raises:
        InputError: something that was given cannot be used.
    """
    tell = progress or silent
    watch = Stopwatch()
    target = Path(output)
    if not artifacts:
        raise InputError("nothing to compare: name at least one artifact after the baseline")
    check_gate_inputs(target, os.fspath(baseline), data, overwrite=overwrite)
    names = _distinct_names(artifacts)
    candidates = [_open(path, name) for path, name in zip(artifacts, names, strict=True)]
    spec = find_gate_spec(recipe, {}, data, overrides)
    bench = _prepare(os.fspath(baseline), spec, candidates, device)
    notes = [*bench.notes, *_note_loading(bench.folder, "the baseline", bench.runtime)]
    for candidate in candidates:
        notes += [f"{candidate.name}: {problem}" for problem in candidate.found.problems]
        notes += _note_loading(candidate.location, candidate.name, candidate.runtime(spec))
    with staged(target, overwrite=overwrite) as partial, memory_errors():
        judged = []
        with _loadable(bench.folder, bench.runtime, partial) as baseline_folder:
            for number, candidate in enumerate(candidates):
                tell(Event("compare", number, len(candidates), candidate.name))
                with watch.time(f"gate {candidate.name}"):
                    judged.append(_judge(candidate, bench, baseline_folder, partial, tell))
        tell(Event("compare", len(candidates), len(candidates)))
        report = build_gate_report(
            judged,
            bench.checkpoint,
            bench.evaluation,
            spec,
            watch,
            notes,
            task=bench.task,
            comparison=True,
        )
        write_reports(report, partial)
        commit(partial, target)
    return report


@dataclass(frozen=True)
class _Candidate:
    """An artifact to be judged. recorded: its own evidence, empty where it has none."""

    name: str
    path: str
    found: Inspection
    recorded: Mapping[str, Any]

    @property
    def location(self) -> Path:
        """What its runtime loads: a GGUF or ONNX file, else a folder."""
        return self.found.file or self.found.folder

    def runtime(self, spec: GateSpec) -> str:
        """What judges it."""
        return find_runtime(spec, self.found.format)


@dataclass(frozen=True)
class _Bench:
    """What every candidate is measured against."""

    checkpoint: Checkpoint
    evaluation: TokenWindows | TextRows
    spec: GateSpec
    runtime: str
    """What the baseline runs in."""
    device: str
    info: EncoderInfo | None = None
    """What the model is, if it is an encoder."""

    @property
    def folder(self) -> Path:
        """Of the baseline."""
        return self.checkpoint.source.folder

    @property
    def task(self) -> str | None:
        """Of an encoder."""
        return None if self.info is None else self.info.task

    @property
    def notes(self) -> tuple[str, ...]:
        """On the data and the model."""
        return (*self.evaluation.notes, *(() if self.info is None else self.info.notes))


def _open(artifact: str | os.PathLike[str], name: str) -> _Candidate:
    found = inspect_artifact(Path(artifact))
    return _Candidate(name, os.fspath(artifact), found, read_evidence(found.folder))


def _prepare(
    baseline: str, spec: GateSpec, candidates: Sequence[_Candidate], device: str
) -> _Bench:
    """Open the baseline and read the evaluation data with its tokenizer.

    Raises:
        InputError: what is given does not fit together, or cannot be used.
    """
    for candidate in candidates:
        check_interpreter(spec, candidate.found.format)
    runtime = find_baseline_runtime(candidates[0].runtime(spec))
    checkpoint = open_checkpoint(resolve_source(baseline))
    tokenizer = load_tokenizer(checkpoint.source.folder)
    chosen = choose_device(device).type
    if not is_encoder(checkpoint.config):
        windows = load_evaluation(spec, tokenizer, checkpoint)
        return _Bench(checkpoint, windows, spec, runtime, chosen)
    for candidate in candidates:
        if candidate.found.format != ONNX:
            raise InputError(
                f"{baseline} is an encoder, and {candidate.path} is {candidate.found.format}: "
                "encoders are judged as ONNX files"
            )
    info = describe_encoder(checkpoint)
    rows = load_evaluation_rows(spec, tokenizer, checkpoint, info)
    return _Bench(checkpoint, rows, spec, runtime, chosen, info)


def _judge(
    candidate: _Candidate, bench: _Bench, baseline: Path, scratch: Path, tell: Progress
) -> JudgedArtifact:
    """Judge a candidate; what transformers does not load is dequantized in `scratch` first."""
    found = candidate.found
    file = None if found.file is None else found.file.name
    suspicions = check_recorded_files(candidate.recorded, found.folder, file)
    sides = check_side_files(bench.folder, found)
    if bench.spec.tokenizer == "fail":
        suspicions, sides = (*suspicions, *sides), ()
    if isinstance(bench.evaluation, TextRows):
        assert bench.info is not None
        judgement = judge_graph(
            baseline,
            candidate.location,
            bench.evaluation,
            bench.info,
            bench.spec,
            quantized=found.scheme != "none",
            suspicions=suspicions,
            device=bench.device,
            tell=tell,
        )
        return _describe(candidate, judgement, sides)
    with _loadable(candidate.location, candidate.runtime(bench.spec), scratch) as loaded:
        judgement = judge_files(
            baseline,
            loaded,
            bench.evaluation,
            bench.spec,
            written=found.format,
            device=bench.device,
            suspicions=suspicions,
            progress=tell,
        )
    return _describe(candidate, judgement, sides)


def _describe(candidate: _Candidate, judgement: Judgement, notes: Sequence[str]) -> JudgedArtifact:
    judgement = replace(judgement, notes=(*judgement.notes, *notes))
    return JudgedArtifact(candidate.name, candidate.path, candidate.found, judgement)


def _add_speed(
    judged: JudgedArtifact, candidate: _Candidate, bench: _Bench, scratch: Path, tell: Progress
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


def _loadable(location: Path, runtime: str, scratch: Path) -> AbstractContextManager[Path]:
    """What the runtime loads: others have kernels for what transformers lacks."""
    if runtime != "transformers":
        return nullcontext(location)
    return dequantized_folder(location, scratch)


def _note_loading(location: Path, role: str, runtime: str) -> Sequence[str]:
    """What to say where the runtime loads something else than the files at `location`."""
    return note_dequantized(location, role) if runtime == "transformers" else ()


def _own_name(artifact: str | os.PathLike[str]) -> str:
    return Path(os.path.abspath(artifact)).name


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
