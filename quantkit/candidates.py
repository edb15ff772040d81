"""Artifacts that exist, opened to be judged, and what they are measured against."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from stat import S_ISREG
from typing import Any

from quantkit import tracing
from quantkit.calibration.compute import choose_device
from quantkit.calibration.data import load_tokenizer
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.conversion import loadable
from quantkit.encoder_pipeline.gate import judge_graph
from quantkit.encoder_pipeline.job import load_evaluation_rows
from quantkit.encoders.architectures import is_encoder
from quantkit.encoders.model import describe_encoder
from quantkit.errors import ArtifactError, InputError, QuantkitError
from quantkit.evidence import JudgedArtifact, find_runtime, read_evidence
from quantkit.formats.inspect import inspect_artifact
from quantkit.formats.inspected import Inspection
from quantkit.gating import (
    GateTools,
    check_interpreter,
    check_recorded_files,
    check_side_files,
    check_weights,
    judge_files,
    prepare_tools,
)
from quantkit.job_windows import load_evaluation
from quantkit.judging.custom_checks import CHECKS_ASK_DECODERS, GateCheck, read_checks
from quantkit.judging.places import find_baseline_runtime
from quantkit.recipe import GateSpec
from quantkit.records import EncoderInfo, Judgement, Progress, TextRows, TokenWindows
from quantkit.schemes import ONNX


@dataclass(frozen=True)
class Candidate:
    """An artifact to be judged. recorded: its own evidence, empty where it has none."""

    name: str
    path: str
    found: Inspection
    recorded: Mapping[str, Any]
    stamps: Mapping[Path, tuple[int, int]] = field(default_factory=dict)
    """Its files -> size and time of the last change, when it was opened."""

    @property
    def location(self) -> Path:
        """What its runtime loads: a GGUF or ONNX file, else a folder."""
        return self.found.file or self.found.folder

    def runtime(self, spec: GateSpec) -> str:
        """What judges it."""
        return find_runtime(spec, self.found.format)


@dataclass(frozen=True)
class Bench:
    """What every candidate is measured against."""

    checkpoint: Checkpoint
    evaluation: TokenWindows | TextRows
    spec: GateSpec
    runtime: str
    """What the baseline runs in."""
    device: str
    info: EncoderInfo | None = None
    """What the model is, if it is an encoder."""
    tools: GateTools = field(default_factory=GateTools)

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


def open_candidate(artifact: str | os.PathLike[str], name: str) -> Candidate:
    """Read the headers of an artifact, which reports shall call `name`.

    Raises:
        ArtifactError: there is nothing that can be read.
        CheckpointError: its evidence is damaged.
    """
    found = inspect_artifact(Path(artifact))
    files = [found.file] if found.file else sorted(found.folder.iterdir())
    stamps = {file: stamp for file in files if (stamp := _stamp(file)) is not None}
    return Candidate(name, os.fspath(artifact), found, read_evidence(found.folder), stamps)


def _stamp(file: Path) -> tuple[int, int] | None:
    """Size and time of the last change of a file; None where it is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return (found.st_size, found.st_mtime_ns) if S_ISREG(found.st_mode) else None


@contextmanager
def unchanged(candidates: Sequence[Candidate]) -> Iterator[None]:
    """Let artifacts be judged inside, unless they change meanwhile: as when a job replaces them.

    Raises:
        ArtifactError: one has changed. What failed inside may have failed for that.
    """
    try:
        yield
    except QuantkitError as error:
        _refuse_changed(candidates, error)
        raise
    _refuse_changed(candidates, None)


def _refuse_changed(candidates: Sequence[Candidate], error: QuantkitError | None) -> None:
    for candidate in candidates:
        changed = [file for file, stamp in candidate.stamps.items() if _stamp(file) != stamp]
        if changed:
            raise ArtifactError(
                f"{changed[0]} was replaced or changed while it was judged: judge it again when "
                f"no other job writes it"
            ) from error


def prepare_bench(
    baseline: str,
    spec: GateSpec,
    candidates: Sequence[Candidate],
    device: str,
    checks: Sequence[GateCheck] = (),
) -> Bench:
    """Open the baseline and read the evaluation data with its tokenizer.

    Args:
        checks: the user's own.

    Raises:
        InputError: what is given does not fit together, or cannot be used.
    """
    own = read_checks(checks)
    for candidate in candidates:
        check_interpreter(spec, candidate.found.format)
    runtime = find_baseline_runtime(candidates[0].runtime(spec))
    checkpoint = open_checkpoint(resolve_source(baseline))
    tokenizer = load_tokenizer(checkpoint.source.folder)
    chosen = choose_device(device).type
    if not is_encoder(checkpoint.config):
        windows = load_evaluation(spec, tokenizer, checkpoint)
        tools = replace(prepare_tools(spec, windows, checkpoint), checks=own)
        return Bench(checkpoint, windows, spec, runtime, chosen, tools=tools)
    if own:
        raise InputError(f"{baseline} is an encoder, {CHECKS_ASK_DECODERS}")
    for candidate in candidates:
        if candidate.found.format != ONNX:
            raise InputError(
                f"{baseline} is an encoder, and {candidate.path} is {candidate.found.format}: "
                "encoders are judged as ONNX files"
            )
    info = describe_encoder(checkpoint)
    rows = load_evaluation_rows(spec, tokenizer, checkpoint, info)
    return Bench(checkpoint, rows, spec, runtime, chosen, info)


def judge_candidate(
    candidate: Candidate, bench: Bench, baseline: Path, scratch: Path, tell: Progress
) -> JudgedArtifact:
    """Judge a candidate; what transformers does not load is dequantized in `scratch` first."""
    with tracing.judging(candidate.name, candidate.found.format) as found:
        judged = _judge_candidate(candidate, bench, baseline, scratch, tell)
        found(judged.judgement)
    return judged


def _judge_candidate(
    candidate: Candidate, bench: Bench, baseline: Path, scratch: Path, tell: Progress
) -> JudgedArtifact:
    found = candidate.found
    file = None if found.file is None else found.file.name
    suspicions = check_recorded_files(candidate.recorded, found.folder, file)
    weights = check_weights(bench.checkpoint, candidate.location, bench.spec, tell)
    suspicions = (*suspicions, *weights.suspicions)
    sides = check_side_files(bench.folder, found)
    if bench.spec.tokenizer == "fail":
        suspicions, sides = (*suspicions, *sides), ()
    notes = (*weights.notes, *sides)
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
        return _describe(candidate, judgement, notes)
    with loadable(candidate.location, candidate.runtime(bench.spec), scratch) as loaded:
        judgement = judge_files(
            baseline,
            loaded,
            bench.evaluation,
            bench.spec,
            tools=bench.tools,
            written=found.format,
            device=bench.device,
            suspicions=suspicions,
            progress=tell,
        )
    return _describe(candidate, judgement, notes)


def _describe(candidate: Candidate, judgement: Judgement, notes: Sequence[str]) -> JudgedArtifact:
    judgement = replace(judgement, notes=(*judgement.notes, *notes))
    return JudgedArtifact(candidate.name, candidate.path, candidate.found, judgement)
