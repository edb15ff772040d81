"""The whole product as readable functions: plan, quantize, gate.

Only this module knows the order of the stages.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from quantkit.allocation import allocate, load_allocation, store_allocation
from quantkit.blocks import (
    Draft,
    encode_input_group,
    finish_block,
    replay_encoded_group,
    replay_input_group,
    solve_input_group,
    solve_kv_cache,
)
from quantkit.calibration.walk import BlockEnd, GroupStop, walk
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, read_tensor
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.checkpoint.source import resolve_source
from quantkit.checkpoint.structure import output_embedding_name
from quantkit.describe import Stopwatch
from quantkit.encoder_pipeline import plan_encoder, quantize_encoder
from quantkit.encoders.architectures import is_encoder
from quantkit.errors import RecipeError
from quantkit.evidence import build_report, write_evidence
from quantkit.exports import write_exports
from quantkit.fisher import measure_fisher
from quantkit.gating import judge_artifact, prepare_job_tools
from quantkit.inputs import RecipeLike, check_inputs, load
from quantkit.job import Job, depends_on, needs_calibration, plan_job, prepare, settle
from quantkit.records import (
    Artifact,
    BlockPlan,
    EncoderPlan,
    Event,
    GroupPlan,
    KvRecord,
    LayerRecord,
    LayerStats,
    OpenChoice,
    Plan,
    Progress,
    Result,
    SolvedBlock,
)
from quantkit.report import write_model_card, write_reports
from quantkit.running import memory_errors, silent, staged
from quantkit.staging import commit
from quantkit.workspace import (
    Workspace,
    load_block,
    load_kv_record,
    load_matrices,
    load_records,
    open_workspace,
    store_block,
    store_matrices,
    stored_blocks,
    stored_matrices,
)


def plan(
    recipe: RecipeLike,
    *,
    model: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
) -> Plan | EncoderPlan:
    """Say what a job would do, from the recipe, the config and the headers alone.

    Data is looked for and not read. The architecture of the model decides whether it is a decoder
    or an encoder.

    Args:
        recipe: a `Recipe`, the path of one, or the name of a shipped one.
        model: replaces the recipe's model.
        output: replaces the recipe's output.
        overrides: `KEY=VALUE` pairs as of `--set`; only for recipes from files.
        overwrite: accept an output that exists.

    Raises:
        PlanError: the recipe does not fit the checkpoint; every problem is listed.
        InputError: the recipe, the checkpoint or the output cannot be used.
        ResourceError: the disk is too small.
    """
    loaded = load(recipe, model, output, overrides)
    check_inputs(loaded, overwrite=overwrite, output_needed=False)
    checkpoint = open_checkpoint(resolve_source(loaded.model))
    if is_encoder(checkpoint.config):
        return plan_encoder(loaded, checkpoint)
    return plan_job(loaded.recipe, checkpoint)


def quantize(
    recipe: RecipeLike,
    *,
    model: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    overwrite: bool = False,
    gate: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Do the whole job: plan, calibrate, solve, write, gate, report.

    The output folder appears when all of it is done, whatever the verdict. An interrupted job
    leaves its solved blocks in `<output>.partial`; the same call goes on from there. (The job of an
    encoder takes minutes, and begins anew.)

    Args:
        recipe: a `Recipe`, the path of one, or the name of a shipped one.
        model: replaces the recipe's model.
        output: replaces the recipe's output.
        overrides: `KEY=VALUE` pairs as of `--set`; only for recipes from files.
        device: `auto`, `cpu` or `cuda`.
        overwrite: replace an output that exists, and an unfinished job that differs.
        gate: judge the artifact; without, its verdict is UNJUDGED.
        progress: called after each step.

    Raises:
        InputError: something that was given cannot be used. What is found before the work leaves
            nothing behind.
        ResourceError: memory or disk ran out; the solved blocks are kept.
    """
    tell = progress or silent
    watch = Stopwatch()
    with watch.time("prepare"):
        tell(Event("prepare", 0, 1, "reading the recipe, the checkpoint's headers and the data"))
        loaded = load(recipe, model, output, overrides)
        check_inputs(loaded, overwrite=overwrite, gate=gate)
        checkpoint = open_checkpoint(resolve_source(loaded.model))
    if is_encoder(checkpoint.config):
        return quantize_encoder(
            loaded,
            checkpoint,
            device=device,
            overwrite=overwrite,
            gate=gate,
            watch=watch,
            tell=tell,
        )
    with watch.time("prepare"):
        job = prepare(loaded, checkpoint, device=device, gate=gate)
        tools = prepare_job_tools(job)
        tell(Event("prepare", 1, 1))
    with staged(loaded.output, overwrite=overwrite) as partial, memory_errors():
        workspace = open_workspace(partial, depends_on(job), restart=overwrite)
        if job.plan.choice is not None:
            with watch.time("allocate"):
                job = _choose_schemes(job, job.plan.choice, workspace, tell)
        with watch.time("quantize"):
            _solve(job, workspace, tell)
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
        commit(partial, loaded.output)
    moved = tuple(
        replace(artifact, folder=loaded.output / artifact.folder.relative_to(partial))
        for artifact in artifacts
    )
    return Result(loaded.output, report.verdict, job.plan, moved, report)


def _choose_schemes(job: Job, choice: OpenChoice, workspace: Workspace, tell: Progress) -> Job:
    """Choose what the recipe leaves open, or take the choice of an earlier run."""
    allocation = load_allocation(workspace)
    if allocation is not None:
        tell(Event("allocate", 1, 1, "resumed with the schemes chosen before"))
        return settle(job, allocation)
    if job.calibration is None:
        raise RecipeError("auto needs calibration data: write `calibration:` in the recipe")
    allocation = allocate(
        job.checkpoint, job.plan, choice, job.calibration, device=job.device, tell=tell
    )
    store_allocation(workspace, allocation)
    return settle(job, allocation)


def _solve(job: Job, workspace: Workspace, tell: Progress) -> None:
    """Bring every block into the workspace."""
    stored = stored_blocks(workspace)
    todo = _blocks_to_solve(job.plan)
    if stored:
        tell(Event("quantize", len(stored), len(todo), f"resumed after {len(stored)} blocks"))
    if all(block.index in stored for block in todo):
        return
    if needs_calibration(job.plan):
        _solve_in_walk(job, workspace, stored, tell)
        return
    for block in todo:
        if block.index in stored:
            continue
        draft, tensors = Draft(), _read_block(job.checkpoint, block)
        for group in _solved_groups(block):
            _solve_group(job, group, None, tensors, draft, {})
        store_block(workspace, finish_block(block, draft))
        tell(_solved(block, todo, draft))


def _solve_in_walk(job: Job, workspace: Workspace, stored: frozenset[int], tell: Progress) -> None:
    """The sequential loop: capture, solve, store, replace, advance."""
    if job.calibration is None:
        raise RecipeError("the method needs calibration data: write `calibration:` in the recipe")
    _measure_fisher(job, workspace, stored, tell)
    skeleton = build_skeleton(job.checkpoint)
    todo = _blocks_to_solve(job.plan)
    stops = walk(
        skeleton,
        job.plan.blocks,
        lambda block: _read_block(job.checkpoint, block),
        lambda: _read_outside(job.checkpoint, job.plan, skeleton),
        job.calibration,
        device=job.device,
        dtype=job.dtype,
        needs_stats=lambda block, group: block.index not in stored,
        kv_cache=job.plan.kv_cache,
        follow_original=any(block.looks_at_whole_model for block in job.plan.blocks),
    )
    draft, known = Draft(), None
    fishers: Mapping[str, Tensor] = {}
    with closing(stops):
        for stop in stops:
            index = stop.block.index
            if isinstance(stop, GroupStop):
                if known is None and index in stored:
                    known = load_block(workspace, index)
                if known is None and not draft.records and stop.block.looks_at_whole_model:
                    fishers = load_matrices(workspace, index)
                _settle(job, stop, known, draft, fishers)
            elif job.plan.kv_cache is not None and index not in stored:
                solve_kv_cache(stop.block, job.plan.kv_cache, stop.kv, draft, job.scale_dtype)
            if _is_last(stop, job.plan):
                if index not in stored:
                    store_block(workspace, finish_block(stop.block, draft))
                tell(_solved(stop.block, todo, draft))
                draft, known, fishers = Draft(), None, {}
            # Held on to, it would keep this block in memory while the next one is read.
            del stop


def _measure_fisher(job: Job, workspace: Workspace, stored: frozenset[int], tell: Progress) -> None:
    """Bring the Fisher matrices of all blocks that need them into the workspace."""
    needed = {block.index for block in job.plan.blocks if block.looks_at_whole_model} - stored
    if needed <= stored_matrices(workspace) or job.calibration is None:
        return
    found = measure_fisher(job.checkpoint, job.plan, job.calibration, device=job.device, tell=tell)
    for block in found:
        store_matrices(workspace, block.index, block.matrices)


def _settle(
    job: Job,
    stop: GroupStop,
    known: SolvedBlock | None,
    draft: Draft,
    fishers: Mapping[str, Tensor],
) -> None:
    """Let the walk go on with a group's quantized weights, solved now or in an earlier run."""
    live: Mapping[str, Tensor] = {}
    if known is None:
        live = _solve_group(job, stop.group, stop.stats, stop.tensors, draft, fishers)
    elif job.plan.gguf_leads:
        live = replay_encoded_group(stop.group, known)
    elif stop.group.quantized:
        live = replay_input_group(stop.group, known)
    for name, tensor in live.items():
        stop.replace(name, tensor)


def _solve_group(
    job: Job,
    group: GroupPlan,
    stats: LayerStats | None,
    tensors: Mapping[str, Tensor],
    draft: Draft,
    fishers: Mapping[str, Tensor],
) -> Mapping[str, Tensor]:
    """Solve a group for every export; return the tensors of the one that leads the walk."""
    whole, live = job.plan, {}
    if group.quantized:
        live = solve_input_group(group, stats, tensors, draft, job.scale_dtype, fishers)
    encoded = encode_input_group(
        group, stats, tensors, draft, whole.gguf, fishers, leads=whole.gguf_leads
    )
    return {**live, **encoded}


def _is_last(stop: GroupStop | BlockEnd, whole: Plan) -> bool:
    """Whether nothing of the block is left to be solved after this stop."""
    if isinstance(stop, BlockEnd):
        return True
    return whole.kv_cache is None and stop.group is _solved_groups(stop.block)[-1]


def _blocks_to_solve(whole: Plan) -> list[BlockPlan]:
    """The blocks of which something is stored."""
    return [block for block in whole.blocks if whole.kv_cache is not None or _solved_groups(block)]


def _solved_groups(block: BlockPlan) -> list[GroupPlan]:
    return [group for group in block.groups if group.solved]


def _solved(block: BlockPlan, todo: Sequence[BlockPlan], draft: Draft) -> Event:
    errors = [
        record.relative_error for record in draft.records if record.relative_error is not None
    ]
    message = block.prefix
    if errors:
        message += f", output error {sum(errors) / len(errors):.2%}"
    return Event("quantize", todo.index(block) + 1, len(todo), message)


def _read_block(checkpoint: Checkpoint, block: BlockPlan) -> Mapping[str, Tensor]:
    names = [name for name in checkpoint.tensors if name.startswith(f"{block.prefix}.")]
    return {name: read_tensor(checkpoint, name) for name in names}


def _read_outside(checkpoint: Checkpoint, whole: Plan, skeleton: nn.Module) -> Mapping[str, Tensor]:
    """The tensors of the model that belong to no block and not to its head."""
    skipped = (
        *(f"{block.prefix}." for block in whole.blocks),
        f"{output_embedding_name(skeleton)}.",
    )
    names = sorted(checkpoint.tensors.keys() & skeleton.state_dict(keep_vars=True).keys())
    return {name: read_tensor(checkpoint, name) for name in names if not name.startswith(skipped)}


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
        for block in _blocks_to_solve(whole)
        for record in load_records(workspace, block.index)
    ]


def _kv_records(whole: Plan, workspace: Workspace) -> list[KvRecord]:
    if whole.kv_cache is None:
        return []
    found = (load_kv_record(workspace, block.index) for block in whole.blocks)
    return [record for record in found if record is not None]
