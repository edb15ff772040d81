"""The whole product as readable functions: plan, quantize, gate.

Only this module knows the order of the stages.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn

from quantkit import tracing
from quantkit.allocation import allocate, load_allocation, store_allocation
from quantkit.block_loop import blocks_to_solve, solve_blocks
from quantkit.capacity import read_memory
from quantkit.checkpoint.outline import outline_source
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.describe import Stopwatch
from quantkit.encoder_pipeline import plan_encoder, quantize_encoder
from quantkit.encoders.architectures import is_encoder
from quantkit.errors import InputError, RecipeError
from quantkit.evidence import build_report, write_evidence
from quantkit.exports import write_exports
from quantkit.gating import GateTools, judge_artifact, prepare_job_tools
from quantkit.inputs import LoadedRecipe, RecipeLike, check_inputs, load, refuse_object
from quantkit.job import Job, agree, depends_on, go_on, plan_job, prepare, settle
from quantkit.judging.custom_checks import CHECKS_ASK_DECODERS, GateCheck, read_checks
from quantkit.materials import (
    check_materials,
    gather_materials,
    opened_model,
    refuse_encoder,
    refuse_sharing,
)
from quantkit.numerics.onednn import quick_float32
from quantkit.publishing.of_recipe import check_publishing, publish_result
from quantkit.ranks import Ranks, from_first, join_ranks
from quantkit.recipe import GivenSolver, Overrides
from quantkit.records import (
    Allocation,
    Artifact,
    EncoderPlan,
    Event,
    KvRecord,
    LayerRecord,
    OpenChoice,
    Plan,
    Progress,
    Result,
    SolvedBlock,
)
from quantkit.report import write_model_card, write_reports
from quantkit.running import memory_errors, silent, staged_by_first
from quantkit.schemes import METHODS
from quantkit.staging import check_output, commit, partial_of
from quantkit.workspace import (
    Workspace,
    load_block,
    load_kv_record,
    load_records,
    open_workspace,
    read_begun,
    stored_blocks,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@quick_float32()
def plan(
    recipe: RecipeLike,
    *,
    model: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    overrides: Overrides = (),
    device: str = "auto",
    memory: int | str | None = None,
    overwrite: bool = False,
    solvers: Mapping[str, GivenSolver] = MappingProxyType({}),
) -> Plan | EncoderPlan:
    """Say what a job would do and take, from the recipe, the config, the headers and a probe.

    Of a model on the Hub the headers of the weights are read there, and no weight is downloaded.
    This machine is probed for about a second where the model is a decoder, which its architecture
    decides. Data is looked for and not read.

    Args:
        recipe: a `Recipe`, the path of one, or the name of a shipped one.
        model: replaces the recipe's model.
        output: replaces the recipe's output.
        overrides: `KEY=VALUE` pairs as of `--set`; only for recipes from files.
        device: `auto`, `cpu` or `cuda`, for which time and memory are predicted.
        memory: as for `quantize`.
        overwrite: accept an output that exists.
        solvers: as for `quantize`.

    Raises:
        PlanError: the recipe does not fit the checkpoint; every problem is listed.
        InputError: the recipe, the checkpoint or the output cannot be used.
        ResourceError: the disk is too small.
    """
    refuse_object("model", model)
    most = read_memory(memory)
    loaded = load(recipe, model, output, overrides, solvers)
    check_inputs(loaded, overwrite=overwrite, output_needed=False)
    with outline_source(loaded.model) as outline:
        checkpoint = open_checkpoint(outline.source)
        planned: Plan | EncoderPlan
        if is_encoder(checkpoint.config):
            _refuse_own(loaded, (), most)
            planned = plan_encoder(loaded, checkpoint)
        else:
            planned = plan_job(
                loaded.recipe, checkpoint, device=device, memory=most, methods=loaded.methods
            )
    if not outline.absent_bytes:
        return planned
    note = (
        f"the weights are on the Hub alone: the job downloads their {outline.absent_bytes:,} bytes "
        f"first, for which neither time nor disk is counted here"
    )
    return replace(planned, notes=(*planned.notes, note))


@tracing.job("quantize")
@quick_float32()
def quantize(
    recipe: RecipeLike,
    *,
    model: str | os.PathLike[str] | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | os.PathLike[str] | None = None,
    overrides: Overrides = (),
    device: str = "auto",
    memory: int | str | None = None,
    overwrite: bool = False,
    gate: bool = True,
    progress: Progress | None = None,
    calibration: Iterable[object] | None = None,
    statistics: str | os.PathLike[str] | None = None,
    checks: Sequence[GateCheck] = (),
    solvers: Mapping[str, GivenSolver] = MappingProxyType({}),
) -> Result:
    """Do the whole job: plan, calibrate, solve, write, gate, report.

    The output folder appears when all of it is done, whatever the verdict. An interrupted job
    leaves its solved blocks in `<output>.partial`; the same call goes on from there. (The job of an
    encoder takes minutes, and begins anew.)

    All processes of a `torchrun` calibrate and solve together. The first one does the rest; the
    others end in this call as soon as they have nothing left to do.

    Args:
        recipe: a `Recipe`, the path of one, or the name of a shipped one.
        model: replaces the recipe's model: a name, or a model of transformers in memory, which is
            written beside the output while the job runs and is not changed.
        tokenizer: of a model in memory.
        output: replaces the recipe's output.
        overrides: `KEY=VALUE` pairs as of `--set`; only for recipes from files.
        device: `auto`, `cpu` or `cuda`.
        memory: that the job's process may hold, in bytes or as `2GB`, the gate's workers apart:
            activations that exceed it are parked in a file, and no byte of the artifact depends on
            it. None: all that it takes, as long as half of what is free is enough for them.
        overwrite: replace an output that exists, and an unfinished job that differs.
        gate: judge the artifact; without, its verdict is UNJUDGED.
        progress: called after each step.
        calibration: examples in place of the recipe's data, taken until the recipe's windows are
            full: texts, lists of token ids, rows with a text or chat `messages`, or batches with
            `input_ids`.
        statistics: a folder that `calibrate` wrote: blocks are solved from it without a walk.
        checks: functions of your own that ask both models; one that fails, fails the artifact.
        solvers: functions of your own that choose codes, by the names that the recipe has for them.

    Raises:
        InputError: something that was given cannot be used. What is found before the work leaves
            nothing behind.
        ResourceError: memory or disk ran out, or another process of the job died; the solved
            blocks are kept.
        SystemExit: in the processes behind the first, with 0 or the exit code of the error.
    """
    watch = Stopwatch()
    own_checks, most = read_checks(checks), read_memory(memory)
    refuse_sharing(model, statistics)
    with join_ranks() as ranks, ExitStack() as stack:
        tell = progress if progress is not None and ranks.leads else silent
        with watch.time("prepare"):
            tell(
                Event("prepare", 0, 1, "reading the recipe, the checkpoint's headers and the data")
            )
            materials = gather_materials(
                recipe,
                model=model,
                tokenizer=tokenizer,
                output=output,
                overrides=overrides,
                examples=calibration,
                statistics=statistics,
                solvers=solvers,
            )
            loaded = materials.loaded
            _refuse_unasked(own_checks, loaded, gate=gate)
            if ranks.leads:
                check_materials(materials, overwrite=overwrite, gate=gate)
                check_publishing(loaded.recipe.publish, tell)
        with staged_by_first(ranks, loaded.output, overwrite=overwrite, tell=tell) as partial:
            with watch.time("prepare"):
                checkpoint = stack.enter_context(opened_model(materials))
            tracing.tell({"model": checkpoint.source.name, "output": str(loaded.output)})
            if is_encoder(checkpoint.config):
                _refuse_many(ranks)
                refuse_encoder(materials)
                _refuse_own(loaded, own_checks, most)
                done = quantize_encoder(
                    loaded,
                    checkpoint,
                    partial,
                    device=device,
                    overwrite=overwrite,
                    gate=gate,
                    watch=watch,
                    tell=tell,
                )
            else:
                with watch.time("prepare"):
                    job = prepare(
                        loaded,
                        checkpoint,
                        device=device,
                        gate=gate,
                        memory=most,
                        examples=materials.examples,
                        statistics=materials.statistics,
                    )
                    job = agree(go_on(job, read_begun(partial)), ranks)
                    if not ranks.leads:
                        _help(job, ranks)
                    tools = replace(prepare_job_tools(job), checks=own_checks)
                    tell(Event("prepare", 1, 1))
                done = _lead(job, partial, tools, ranks, watch, tell, overwrite=overwrite)
    return publish_result(loaded.recipe.publish, done, tell)


def _refuse_unasked(checks: Sequence[GateCheck], loaded: LoadedRecipe, *, gate: bool) -> None:
    if checks and (not gate or loaded.recipe.gate is None):
        raise InputError("checks are part of the gate, and this job has none: leave out one of two")


def _refuse_own(loaded: LoadedRecipe, checks: Sequence[GateCheck], memory: int | None) -> None:
    if checks:
        raise InputError(f"{loaded.model} is an encoder, {CHECKS_ASK_DECODERS}")
    if loaded.methods is not METHODS:
        raise InputError(
            f"{loaded.model} is an encoder, and solvers of your own are for decoders: use a method "
            f"of quantkit"
        )
    if memory is not None:
        raise InputError(
            f"{loaded.model} is an encoder, whose job parks nothing: leave out memory, and lower "
            f"calibration.samples where it is short"
        )


def _refuse_many(ranks: Ranks) -> None:
    if ranks.size > 1:
        raise InputError(
            f"the job of an encoder takes minutes and one process: start it without torchrun, "
            f"which has started {ranks.size}"
        )


def _help(job: Job, ranks: Ranks) -> NoReturn:
    """Do the share of a rank behind the first, and end.

    Raises:
        SystemExit: it is done.
    """
    elsewhere = Workspace(partial_of(job.loaded.output) / "workspace")
    with memory_errors():
        _solve(job, elsewhere, ranks, Stopwatch(), silent)
    raise SystemExit(0)


def _lead(
    job: Job,
    partial: Path,
    tools: GateTools,
    ranks: Ranks,
    watch: Stopwatch,
    tell: Progress,
    *,
    overwrite: bool,
) -> Result:
    """Do what the first rank does: solve with the others, write, judge, report."""
    output = job.loaded.output
    # Something may have appeared there while the job was prepared.
    check_output(output, overwrite=overwrite)
    with memory_errors():
        workspace = open_workspace(partial, depends_on(job), restart=overwrite)
        job = _solve(job, workspace, ranks, watch, tell)
        with watch.time("write"):
            artifacts = _write(job, workspace, partial, tell)
        with watch.time("gate"):
            judgements = [judge_artifact(job, artifact, tools, tell) for artifact in artifacts]
        layers = _layer_records(job.plan, workspace)
        kv_cache = _kv_records(job.plan, workspace)
        report = build_report(job, artifacts, judgements, layers, kv_cache, watch, partial)
        write_evidence(report.evidence, partial)
        write_reports(report, partial / "report")
        for artifact, row in zip(artifacts, report.artifacts, strict=True):
            write_model_card(report, row, artifact.folder, job.checkpoint.source.folder)
        commit(partial, output, overwrite=overwrite)
    moved = tuple(
        replace(artifact, folder=output / artifact.folder.relative_to(partial))
        for artifact in artifacts
    )
    return Result(output, report.verdict, job.plan, moved, report)


def _solve(job: Job, workspace: Workspace, ranks: Ranks, watch: Stopwatch, tell: Progress) -> Job:
    """Solve all blocks; return the job with what its recipe leaves open chosen."""
    choice, undecided = job.plan.choice, job
    if choice is not None:
        with watch.time("allocate"):
            chosen = from_first(ranks, lambda: _choose_schemes(undecided, choice, workspace, tell))
            job = settle(job, chosen)
    with watch.time("quantize"):
        solve_blocks(job, workspace, watch, tell, ranks)
    return job


def _choose_schemes(
    job: Job, choice: OpenChoice, workspace: Workspace, tell: Progress
) -> Allocation:
    """Choose what the recipe leaves open, or take the choice of an earlier run."""
    allocation = load_allocation(workspace)
    if allocation is not None:
        tell(Event("allocate", 1, 1, "resumed with the schemes chosen before"))
        return allocation
    if job.calibration is None:
        raise RecipeError("auto needs calibration data: write `calibration:` in the recipe")
    allocation = allocate(
        job.checkpoint, job.plan, choice, job.calibration, device=job.device, tell=tell
    )
    store_allocation(workspace, allocation)
    return allocation


def _write(job: Job, workspace: Workspace, partial: Path, tell: Progress) -> list[Artifact]:
    """Write every export of the recipe."""
    stored = stored_blocks(workspace)

    def block(index: int) -> SolvedBlock:
        return load_block(workspace, index) if index in stored else SolvedBlock(index, (), {}, ())

    exports = job.loaded.recipe.export
    return write_exports(job.checkpoint, job.plan, exports, block, partial, tell, job.calibration)


def _layer_records(whole: Plan, workspace: Workspace) -> list[LayerRecord]:
    return [
        record
        for block in blocks_to_solve(whole)
        for record in load_records(workspace, block.index)
    ]


def _kv_records(whole: Plan, workspace: Workspace) -> list[KvRecord]:
    if whole.kv_cache is None:
        return []
    found = (load_kv_record(workspace, block.index) for block in whole.blocks)
    return [record for record in found if record is not None]
