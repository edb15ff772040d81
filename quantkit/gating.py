"""The gate around a job or an artifact: which limits, which data, what comes of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantkit import tracing
from quantkit.checkpoint.reader import Checkpoint
from quantkit.conversion import loadable, note_loading
from quantkit.environments.places import check_is_found, find_python
from quantkit.errors import InputError, RecipeError, ResourceError, WorkerError
from quantkit.evidence import find_graph_plan, find_runtime
from quantkit.formats.gguf.container import open_gguf
from quantkit.formats.inspected import Inspection
from quantkit.formats.onnx.inspection import list_folders
from quantkit.ggml_types import GGUF
from quantkit.inputs import RecipeLike, load
from quantkit.job import Job
from quantkit.judging.baseline.remembering import start_with
from quantkit.judging.baseline.store import AnswerStore, open_store
from quantkit.judging.checks import UNJUDGED, fail_worker, note_no_speed
from quantkit.judging.custom_checks import GateCheck
from quantkit.judging.decoder_speed import measure_decoder_speed
from quantkit.judging.evaluate import evaluate
from quantkit.judging.footprint import find_judging_footprint
from quantkit.judging.places import LLAMA_CPP, ONNX_RUNTIME, find_baseline_runtime
from quantkit.judging.probing.probes import check_prompts
from quantkit.judging.sampling import shuffle_windows
from quantkit.judging.side_files import compare_gguf_sides, compare_side_files
from quantkit.judging.suspicions import compare_bits_per_weight, compare_hashes
from quantkit.judging.tasks.loading import LoadedTask, load_tasks
from quantkit.judging.verdict import judge
from quantkit.judging.weights import WeightFindings, compare_weights
from quantkit.judging.worker import find_interpreter
from quantkit.recipe import GateSpec, Overrides, apply_overrides, read_overrides, validate
from quantkit.records import Artifact, EvalResult, Judgement, Progress, TokenWindows
from quantkit.schemes import MODELOPT, ONNX

_LOGIT_BYTES = 4

_FORMATS: Mapping[str, str] = MappingProxyType({LLAMA_CPP: GGUF, ONNX_RUNTIME: ONNX})
"""Runtime -> the only format that it loads, which no other runtime does."""


@dataclass(frozen=True)
class GateTools:
    """What the artifacts of a model are measured with, besides windows of text."""

    tasks: tuple[LoadedTask, ...] = ()
    store: AnswerStore | None = None
    """What its baseline has computed before; None: nothing is kept."""
    checks: tuple[GateCheck, ...] = ()
    """The user's own."""


def prepare_job_tools(job: Job) -> GateTools:
    """As `prepare_tools`, for the exports of a job; nothing where it has no gate.

    Raises:
        InputError: as `check_interpreter` and `load_tasks`.
    """
    spec = job.loaded.recipe.gate
    if spec is None or job.evaluation is None:
        return GateTools()
    for export in job.loaded.recipe.export:
        check_interpreter(spec, export.format)
    return prepare_tools(spec, job.evaluation, job.checkpoint)


def prepare_tools(spec: GateSpec, windows: TokenWindows, baseline: Checkpoint) -> GateTools:
    """Load the tasks and open the store: what can be refused is, before any work.

    Raises:
        InputError: as `load_tasks`, `open_store` and `check_prompts`.
    """
    if spec.probes is not None:
        check_prompts(spec.probes.prompts)
    store = open_store(spec.reuse_baseline)
    vocabulary = baseline.config.get("vocab_size")
    if store is not None and isinstance(vocabulary, int):
        first_look = windows.ids[: spec.samples]
        store.expect(_LOGIT_BYTES * first_look.size * vocabulary)
    return GateTools(load_tasks(spec.tasks), store)


def check_interpreter(spec: GateSpec, written: str) -> None:
    """Refuse a runtime that does not load the format `written`, or has no interpreter.

    Raises:
        InputError: it does not; or the recipe names a program that is not there, or none for a
            runtime that neither this interpreter nor an environment of its own has.
    """
    runtime = find_runtime(spec, written)
    only = _FORMATS.get(runtime)
    if only != written and (only is not None or written in _FORMATS.values()):
        raise InputError(
            f"gate.runtime {runtime} does not load {written}: set gate.runtime to auto, which is "
            f"{find_runtime(None, written)} for {written}"
        )
    for name in {runtime, find_baseline_runtime(runtime)}:
        find_interpreter(find_python(name, spec.python))
    check_is_found(runtime, spec.python)


def judge_artifact(job: Job, artifact: Artifact, tools: GateTools, tell: Progress) -> Judgement:
    """Judge what a job wrote; without a gate it stays UNJUDGED."""
    with tracing.judging(artifact.name, artifact.format) as found:
        return found(_judge_artifact(job, artifact, tools, tell))


def _judge_artifact(job: Job, artifact: Artifact, tools: GateTools, tell: Progress) -> Judgement:
    spec = job.loaded.recipe.gate
    if spec is None or job.evaluation is None:
        return UNJUDGED
    weights = check_weights(job.checkpoint, artifact.path, spec, tell)
    runtime = find_runtime(spec, artifact.format)
    notes = (*weights.notes, *note_loading(artifact.path, "the artifact", runtime))
    with loadable(artifact.path, runtime, artifact.folder.parent) as loaded:
        judgement = judge_files(
            job.checkpoint.source.folder,
            loaded,
            job.evaluation,
            spec,
            tools=tools,
            written=artifact.format,
            device=job.device.type,
            suspicions=(
                *compare_bits_per_weight(artifact.bits_per_weight, _planned_bits(job, artifact)),
                *compare_hashes(artifact.folder, artifact.files),
                *weights.suspicions,
            ),
            progress=tell,
        )
    judgement = replace(judgement, notes=(*judgement.notes, *notes))
    if artifact.format != ONNX:
        return judgement
    return add_decoder_speed(judgement, job.checkpoint, artifact.path, spec, tell)


def check_weights(
    baseline: Checkpoint, artifact: Path, spec: GateSpec, tell: Progress
) -> WeightFindings:
    """Compare the weights of an artifact with its original's, unless the recipe says not to."""
    if spec.weights == "skip":
        note = "its weights were not compared with the original's: gate.weights is skip"
        return WeightFindings(notes=(note,))
    return compare_weights(baseline, artifact, tell)


def add_decoder_speed(
    judgement: Judgement, checkpoint: Checkpoint, artifact: Path, spec: GateSpec, tell: Progress
) -> Judgement:
    """Time an ONNX artifact of a decoder; where that cannot be done, a note says why.

    Args:
        checkpoint: its original.
        artifact: its folder or file.
    """
    if judgement.kl is None:
        return judgement
    try:
        speed = measure_decoder_speed(
            checkpoint,
            artifact,
            python=find_python(ONNX_RUNTIME, spec.python),
            timeout_seconds=spec.timeout_seconds,
            progress=tell,
        )
    except (InputError, ResourceError, WorkerError) as error:
        return note_no_speed(judgement, str(error))
    return replace(judgement, speed=speed)


def _planned_bits(job: Job, artifact: Artifact) -> float:
    """Bits per weight that the plan promised for an artifact."""
    for file in job.plan.gguf:
        if file.type == artifact.file_type:
            return artifact.bits_per_weight * file.tensor_bytes / artifact.tensor_bytes
    graph = find_graph_plan(job.plan, artifact)
    if artifact.format == MODELOPT and job.plan.modelopt is not None:
        return 8 * job.plan.modelopt.tensor_bytes / job.plan.parameters
    if graph is not None:
        return 8 * graph.tensor_bytes / job.plan.parameters
    return job.plan.bits_per_weight


def judge_files(
    baseline: Path,
    candidate: Path,
    windows: TokenWindows,
    spec: GateSpec,
    *,
    tools: GateTools,
    written: str,
    device: str,
    suspicions: Sequence[str],
    progress: Progress,
) -> Judgement:
    """Run both models in worker processes and judge; a worker that fails is a FAIL.

    Windows are taken in a random order, and more than `spec.samples` of them while the verdict is
    INCONCLUSIVE.

    Args:
        windows: all that may be measured.
        tools: the tasks, and what is known of the baseline.
        written: format of the candidate, a folder or a file.
    """
    runtime = find_runtime(spec, written)

    def is_undecided(result: EvalResult) -> bool:
        judgement = judge(result, spec, suspicions=suspicions)
        return judgement.verdict == "INCONCLUSIVE" and bool(judgement.checks)

    try:
        result = evaluate(
            baseline,
            candidate,
            shuffle_windows(windows, spec.seed),
            samples=spec.samples,
            is_undecided=is_undecided,
            probes=spec.probes,
            tasks=tools.tasks,
            task_confidence=spec.confidence,
            checks=tools.checks,
            start_baseline=start_with(tools.store, spec.timeout_seconds),
            python=find_python(runtime, spec.python),
            baseline_python=find_python(find_baseline_runtime(runtime), spec.python),
            runtime=runtime,
            timeout_seconds=spec.timeout_seconds,
            device=device,
            progress=progress,
        )
    except WorkerError as error:
        judgement = fail_worker(error, spec.confidence, suspicions)
    else:
        judgement = judge(result, spec, suspicions=suspicions)
        judgement = replace(judgement, footprint=find_judging_footprint(result))
    # Taken here in any case: else the next artifact's report would have them.
    kept = () if tools.store is None else tools.store.take_notes()
    return replace(judgement, notes=(*judgement.notes, *kept))


def find_gate_spec(
    recipe: RecipeLike | None,
    evidence: Mapping[str, Any],
    data: str | os.PathLike[str] | None,
    overrides: Overrides,
) -> GateSpec:
    """Limits and data: the recipe's, else those in the artifact's own evidence, else the defaults.

    Raises:
        InputError: no evaluation data is named, or an override is wrong.
    """
    pairs = read_overrides(overrides)
    for pair in pairs:
        if not pair.startswith("gate."):
            raise RecipeError(f"--set {pair!r}: only keys below `gate` matter here: gate.KEY=VALUE")
    if recipe is not None:
        spec = load(recipe, None, None, pairs).recipe.gate
    else:
        tree = {"version": 1, "gate": recorded_gate(evidence) or {"data": ""}}
        spec = validate(tree, places=apply_overrides(tree, pairs)).gate
    spec = spec or GateSpec(data="")
    if data is not None:
        spec = spec.model_copy(update={"data": os.fspath(data)})
    if not spec.data:
        raise InputError("no evaluation data: pass --data FILE, or a --recipe with a gate")
    return spec


def check_recorded_files(
    evidence: Mapping[str, Any], folder: Path, file: str | None = None
) -> tuple[str, ...]:
    """Compare the files in `folder` with those that its own evidence names; return suspicions.

    Args:
        file: name of the GGUF file that is meant, where the folder may hold others.
    """
    rows = evidence.get("artifacts")
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, dict) or not _is_of(row.get("path"), folder):
            continue
        files = row.get("files")
        if isinstance(files, dict) and (file is None or file in files):
            return compare_hashes(folder, {name: str(digest) for name, digest in files.items()})
    return ()


def check_side_files(baseline: Path, found: Inspection) -> tuple[str, ...]:
    """Compare what lies beside the weights of an artifact, or in them, with the original's files.

    Args:
        baseline: folder of the original.
        found: the artifact.

    Raises:
        CheckpointError: a file is damaged.
    """
    if found.format != GGUF or found.file is None:
        return compare_side_files(
            baseline, [found.folder] if found.file is None else list_folders(found.file)
        )
    metadata = open_gguf(found.file)
    if metadata.find("general.type") not in (None, "model"):
        return ()
    template, end = (
        metadata.find(f"tokenizer.{key}") for key in ("chat_template", "ggml.eos_token_id")
    )
    return compare_gguf_sides(
        baseline,
        template if isinstance(template, str) else None,
        end if type(end) is int else None,
    )


def _is_of(path: object, folder: Path) -> bool:
    """Whether a recorded path, which is relative to the folder of the evidence, is `folder`'s.

    What was published has its evidence beside it, and the path is then a dot.
    """
    last = str(path).rpartition("/")[2]
    return last == folder.absolute().name or (last == "." and (folder / "quantkit.json").is_file())


def recorded_gate(evidence: Mapping[str, Any]) -> Any:
    """The gate of the recipe that made the artifact, still to be validated.

    Without its interpreters: what to run on this machine is not for an artifact to say.
    """
    found: Any = evidence
    for key in ("recipe", "resolved", "gate"):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        return found
    return {key: value for key, value in found.items() if key != "python"}
