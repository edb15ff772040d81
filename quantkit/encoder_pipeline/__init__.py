"""The job of an encoder as readable functions: plan, observe, solve, write, gate, report.

`quantkit.pipeline` hands over to it what it was given, once the checkpoint turns out to hold an
encoder.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from quantkit import tracing
from quantkit.checkpoint.reader import Checkpoint
from quantkit.describe import Stopwatch
from quantkit.encoder_pipeline.gate import add_speed, judge_graph
from quantkit.encoder_pipeline.job import INT8, EncoderJob, depends_on, layers_of, prepare_encoder
from quantkit.encoder_pipeline.report import build_encoder_report
from quantkit.encoders.model import load_encoder
from quantkit.encoders.observing import observe
from quantkit.encoders.planning import make_encoder_plan, settle_plan
from quantkit.encoders.solving import solve_encoder
from quantkit.evidence import write_evidence
from quantkit.exports import name_model
from quantkit.formats.onnx.encoder import write_encoder, write_float_encoder
from quantkit.formats.onnx.names import GRAPH
from quantkit.gating import check_weights
from quantkit.inputs import LoadedRecipe
from quantkit.judging.checks import UNJUDGED
from quantkit.judging.suspicions import compare_bits_per_weight, compare_hashes
from quantkit.records import (
    Artifact,
    EncoderPlan,
    Event,
    Judgement,
    Progress,
    Result,
    SolvedEncoder,
)
from quantkit.report import write_model_card, write_reports
from quantkit.running import memory_errors
from quantkit.schemes import ONNX
from quantkit.staging import commit
from quantkit.workspace import open_workspace

__all__ = ["plan_encoder", "quantize_encoder"]

_FLOAT_ONLY = SolvedEncoder((), (), (), ())
"""What is solved for fp16 and fp32."""


def plan_encoder(loaded: LoadedRecipe, checkpoint: Checkpoint) -> EncoderPlan:
    """Say what a job would do with an encoder; see `quantkit.plan`.

    Raises:
        InputError, ResourceError: as `make_encoder_plan`.
    """
    return make_encoder_plan(loaded.recipe, checkpoint)


def quantize_encoder(
    loaded: LoadedRecipe,
    checkpoint: Checkpoint,
    partial: Path,
    *,
    device: str,
    overwrite: bool,
    gate: bool,
    watch: Stopwatch,
    tell: Progress,
) -> Result:
    """Do the whole job with an encoder; see `quantkit.quantize`.

    It takes minutes at the most and is not resumed: an interrupted one leaves nothing.

    Args:
        loaded: the recipe, whose inputs are checked.
        checkpoint: opened, of an encoder.
        partial: folder that becomes the output, whose lock is held.
        device: of the gate; all else is done on the CPU.
        overwrite: replace an output that exists.
        gate: judge the artifacts; without, their verdict is UNJUDGED.
        watch: takes the seconds of each stage.
        tell: called after each step.

    Raises:
        InputError: something that was given cannot be used.
        ResourceError: memory or disk ran out.
    """
    with watch.time("prepare"):
        job = prepare_encoder(loaded, checkpoint, device=device, gate=gate)
        tell(Event("prepare", 1, 1))
    with memory_errors():
        open_workspace(partial, depends_on(job), restart=overwrite)
        with watch.time("quantize"):
            model, solved = _solve(job, tell)
        job = _settle(job, solved)
        with tempfile.TemporaryDirectory(prefix=".float-", dir=partial) as scratch:
            with watch.time("write"):
                artifacts = _write(job, model, solved, partial, Path(scratch), tell)
                float_graph = _find_float(job, model, artifacts, Path(scratch))
            # The gate's workers load models of their own.
            del model
            with watch.time("gate"):
                judgements = [
                    _judge(job, plan, artifact, float_graph, tell)
                    for plan, artifact in zip(job.plans, artifacts, strict=True)
                ]
        report = build_encoder_report(job, artifacts, judgements, solved, watch, partial)
        write_evidence(report.evidence, partial)
        write_reports(report, partial / "report")
        for artifact, row in zip(artifacts, report.artifacts, strict=True):
            write_model_card(report, row, artifact.folder, checkpoint.source.folder)
        commit(partial, loaded.output, overwrite=overwrite)
    moved = tuple(
        replace(artifact, folder=loaded.output / artifact.folder.relative_to(partial))
        for artifact in artifacts
    )
    return Result(loaded.output, report.verdict, job.plans[job.leading], moved, report)


def _solve(job: EncoderJob, tell: Progress) -> tuple[nn.Module, SolvedEncoder]:
    """Load the model and choose the codes of its layers."""
    recipe, plan = job.loaded.recipe, job.plans[job.leading]
    model = load_encoder(job.checkpoint, job.info)
    if plan.precision != INT8:
        return model, _FLOAT_ONLY
    rows, stats = job.calibration, None
    if rows is not None and any(linear.needs_statistics for linear in layers_of(plan)):
        tell(Event("quantize", 0, len(plan.groups), f"running {len(rows.ids)} texts"))
        stats = observe(model, plan, rows)
    export = recipe.export[job.leading]
    return model, solve_encoder(model, plan, stats, rows, export, recipe.calibration, tell)


def _settle(job: EncoderJob, solved: SolvedEncoder) -> EncoderJob:
    """Return the job with the sizes that follow from what was solved."""
    plans = tuple(
        settle_plan(plan, solved) if plan.precision == INT8 else plan for plan in job.plans
    )
    return replace(job, plans=plans)


def _write(
    job: EncoderJob,
    model: nn.Module,
    solved: SolvedEncoder,
    root: Path,
    scratch: Path,
    tell: Progress,
) -> Sequence[Artifact]:
    """Write every export of the recipe; several have folders of their own.

    The float graph that codes went into stays in `scratch`.
    """
    artifacts, count = [], len(job.plans)
    for done, (plan, export) in enumerate(zip(job.plans, job.loaded.recipe.export, strict=True)):
        tell(Event("write", done, count, f"{ONNX} {plan.precision}"))
        folder = root / ONNX / plan.precision if count > 1 else root / ONNX
        shutil.rmtree(folder, ignore_errors=True)
        codes = solved if plan.precision == INT8 else _FLOAT_ONLY
        rows = job.evaluation or job.calibration
        name = f"{name_model(job.checkpoint)}-{plan.precision}"
        with tracing.span("export", {"format": ONNX, "type": plan.precision}):
            artifact = write_encoder(
                job.checkpoint, plan, codes, export, folder, model, rows, scratch
            )
        artifacts.append(replace(artifact, name=name))
    tell(Event("write", count, count))
    return artifacts


def _find_float(
    job: EncoderJob, model: nn.Module, artifacts: Sequence[Artifact], scratch: Path
) -> Path | None:
    """Return the graph in float32 that others are timed beside, where anything is timed."""
    if job.evaluation is None or all(plan.precision == "fp32" for plan in job.plans):
        return None
    written = [
        artifact.folder
        for artifact, plan in zip(artifacts, job.plans, strict=True)
        if plan.precision == "fp32"
    ]
    kept = (written[0] if written else scratch) / GRAPH
    if kept.is_file():
        return kept
    opset = job.loaded.recipe.export[job.leading].opset
    return write_float_encoder(job.checkpoint, job.info, scratch, model, opset)


def _judge(
    job: EncoderJob, plan: EncoderPlan, artifact: Artifact, float_graph: Path | None, tell: Progress
) -> Judgement:
    """Judge what a job wrote; without a gate it stays UNJUDGED."""
    with tracing.judging(artifact.name, artifact.format) as found:
        return found(_judge_artifact(job, plan, artifact, float_graph, tell))


def _judge_artifact(
    job: EncoderJob, plan: EncoderPlan, artifact: Artifact, float_graph: Path | None, tell: Progress
) -> Judgement:
    spec = job.loaded.recipe.gate
    if spec is None or job.evaluation is None:
        return UNJUDGED
    weights = check_weights(job.checkpoint, artifact.path, spec, tell)
    judgement = judge_graph(
        job.checkpoint.source.folder,
        artifact.path,
        job.evaluation,
        job.info,
        spec,
        quantized=plan.precision == INT8,
        suspicions=(
            *compare_bits_per_weight(artifact.bits_per_weight, plan.bits_per_weight),
            *compare_hashes(artifact.folder, artifact.files),
            *weights.suspicions,
        ),
        device=job.device.type,
        tell=tell,
    )
    judgement = replace(judgement, notes=(*judgement.notes, *weights.notes))
    if float_graph is None or plan.precision == "fp32":
        return judgement
    graph = artifact.folder / float_graph.name
    return add_speed(judgement, float_graph, graph, job.evaluation, job.info, spec, tell)
