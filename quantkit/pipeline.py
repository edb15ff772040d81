"""The whole product as readable functions: plan, quantize, gate.

Only this module knows the order of the stages.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.blocks import Draft, finish_block, replay_input_group, solve_input_group
from quantkit.calibration.compute import choose_device
from quantkit.calibration.data import load_tokenizer
from quantkit.calibration.walk import GroupStop, walk
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, read_tensor
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.checkpoint.source import resolve_source
from quantkit.checkpoint.structure import output_embedding_name
from quantkit.describe import Stopwatch
from quantkit.errors import CheckpointError, RecipeError, ResourceError, is_out_of_memory
from quantkit.evidence import build_gate_report, build_report, read_evidence, write_evidence
from quantkit.formats.compressed_tensors import write_compressed_tensors
from quantkit.formats.inspect import Inspection, inspect_artifact
from quantkit.gating import (
    check_recorded_files,
    check_runtime,
    find_gate_spec,
    judge_artifact,
    judge_files,
    recorded_gate,
)
from quantkit.inputs import RecipeLike, check_gate_inputs, check_inputs, load
from quantkit.job import Job, depends_on, load_evaluation, needs_calibration, prepare
from quantkit.planning import make_plan
from quantkit.records import (
    Artifact,
    BlockPlan,
    Event,
    GroupPlan,
    LayerRecord,
    Plan,
    Progress,
    Report,
    Result,
    SolvedBlock,
)
from quantkit.report import write_model_card, write_reports
from quantkit.staging import check_output, commit, discard, gate_output, partial_of
from quantkit.workspace import (
    Workspace,
    load_block,
    load_records,
    locked,
    open_workspace,
    store_block,
    stored_blocks,
)


def plan(
    recipe: RecipeLike,
    *,
    model: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
) -> Plan:
    """Say what a job would do, from the recipe, the config and the headers alone.

    Data is looked for and not read.

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
    return make_plan(loaded.recipe, open_checkpoint(resolve_source(loaded.model)))


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
    leaves its solved blocks in `<output>.partial`; the same call goes on from there.

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
    tell = progress or _silent
    watch = Stopwatch()
    with watch.time("prepare"):
        tell(Event("prepare", 0, 1, "reading the recipe, the checkpoint's headers and the data"))
        loaded = load(recipe, model, output, overrides)
        job = prepare(loaded, device=device, overwrite=overwrite, gate=gate)
        check_runtime(job)
        tell(Event("prepare", 1, 1))
    with _staged(loaded.output, overwrite=overwrite) as partial, _memory_errors():
        workspace = open_workspace(partial, depends_on(job), restart=overwrite)
        with watch.time("quantize"):
            _solve(job, workspace, tell)
        with watch.time("write"):
            artifacts = _write(job, workspace, partial, tell)
        with watch.time("gate"):
            judgements = [judge_artifact(job, artifact, tell) for artifact in artifacts]
        layers = _layer_records(job.plan, workspace)
        report = build_report(job, artifacts, judgements, layers, watch, partial)
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


def inspect(artifact: str | os.PathLike[str]) -> Inspection:
    """Say what is in an artifact or checkpoint, from its headers.

    Raises:
        ArtifactError: there is nothing that can be read.
    """
    return inspect_artifact(Path(artifact))


def _solve(job: Job, workspace: Workspace, tell: Progress) -> None:
    """Bring every block into the workspace."""
    stored = stored_blocks(workspace)
    todo = [block for block in job.plan.blocks if _quantized_groups(block)]
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
        for group in _quantized_groups(block):
            solve_input_group(group, None, tensors, draft, job.scale_dtype)
        store_block(workspace, finish_block(block, draft))
        tell(_solved(block, todo, draft))


def _solve_in_walk(job: Job, workspace: Workspace, stored: frozenset[int], tell: Progress) -> None:
    """The sequential loop: capture, solve, store, replace, advance."""
    if job.calibration is None:
        raise RecipeError("the method needs calibration data: write `calibration:` in the recipe")
    skeleton = build_skeleton(job.checkpoint)
    todo = [block for block in job.plan.blocks if _quantized_groups(block)]
    stops = walk(
        skeleton,
        job.plan.blocks,
        lambda block: _read_block(job.checkpoint, block),
        lambda: _read_outside(job.checkpoint, job.plan, skeleton),
        job.calibration,
        device=job.device,
        dtype=job.dtype,
        needs_stats=lambda block, group: block.index not in stored,
    )
    draft, known = Draft(), None
    with closing(stops):
        for stop in stops:
            groups = _quantized_groups(stop.block)
            if stop.group is groups[0] and stop.block.index in stored:
                known = load_block(workspace, stop.block.index)
            _settle(stop, known, draft, job.scale_dtype)
            if stop.group is groups[-1]:
                if known is None:
                    store_block(workspace, finish_block(stop.block, draft))
                tell(_solved(stop.block, todo, draft))
                draft, known = Draft(), None
            # Held on to, it would keep this block in memory while the next one is read.
            del stop


def _settle(
    stop: GroupStop, known: SolvedBlock | None, draft: Draft, scale_dtype: torch.dtype
) -> None:
    """Let the walk go on with a group's quantized weights, solved now or in an earlier run."""
    if known is None:
        live = solve_input_group(stop.group, stop.stats, stop.tensors, draft, scale_dtype)
    else:
        live = replay_input_group(stop.group, known)
    for name, weight in live.items():
        stop.replace(name, weight)


def _quantized_groups(block: BlockPlan) -> list[GroupPlan]:
    return [group for group in block.groups if group.quantized]


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
    exports = job.loaded.recipe.export
    stored = stored_blocks(workspace)

    def block(index: int) -> SolvedBlock:
        return load_block(workspace, index) if index in stored else SolvedBlock(index, (), {}, ())

    artifacts = []
    for number, export in enumerate(exports):
        tell(Event("write", number, len(exports), export.format))
        folder = partial / export.format
        shutil.rmtree(folder, ignore_errors=True)
        artifacts.append(
            write_compressed_tensors(
                job.checkpoint, job.plan, block, folder, export.max_shard_bytes
            )
        )
    tell(Event("write", len(exports), len(exports)))
    return artifacts


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
        artifact: an output of `quantize`, or a folder that transformers can load.
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
    tell = progress or _silent
    watch = Stopwatch()
    folder = Path(artifact)
    target = gate_output(artifact, output)
    check_gate_inputs(target, os.fspath(baseline), data, overwrite=overwrite)
    found = inspect_artifact(folder)
    recorded = read_evidence(found.folder)
    spec = find_gate_spec(recipe, recorded, data, overrides)
    checkpoint = open_checkpoint(resolve_source(os.fspath(baseline)))
    tokenizer = load_tokenizer(checkpoint.source.folder)
    windows = load_evaluation(spec, tokenizer, checkpoint)
    notes = (*found.problems, *windows.notes)
    if recipe is None and recorded_gate(recorded):
        notes = (*notes, "the limits are those that the artifact's own quantkit.json names")
    with _staged(target, overwrite=overwrite) as partial, _memory_errors():
        with watch.time("gate"):
            judgement = judge_files(
                checkpoint.source.folder,
                found.folder,
                windows,
                spec,
                device=choose_device(device).type,
                suspicions=check_recorded_files(recorded, found.folder),
                progress=tell,
            )
        report = build_gate_report(
            folder, found, checkpoint, windows, spec, judgement, watch, notes
        )
        write_reports(report, partial)
        commit(partial, target)
    return report


def _layer_records(whole: Plan, workspace: Workspace) -> list[LayerRecord]:
    return [
        record
        for block in whole.blocks
        if _quantized_groups(block)
        for record in load_records(workspace, block.index)
    ]


@contextmanager
def _staged(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Fill `<output>.partial` under its lock; keep it only where a job can go on from it."""
    partial = partial_of(output)
    existed = partial.exists()
    with locked(partial):
        try:
            # Another job may have finished the same output in the meantime.
            check_output(output, overwrite=overwrite)
            yield partial
        except BaseException as error:
            # Only a damaged checkpoint makes solved blocks worthless: its files have to change.
            resumable = any((partial / "workspace").glob("block-*")) and (
                existed or not isinstance(error, CheckpointError)
            )
            if not resumable:
                discard(partial)
            raise


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Say what to do when memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            "not enough memory: lower calibration.samples or calibration.sequence_length "
            f"({str(error).splitlines()[0] if str(error) else 'allocation refused'})"
        ) from error


def _silent(_: Event) -> None:
    """Progress that nobody watches."""
