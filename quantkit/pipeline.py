"""The whole product as readable functions: plan, quantize, gate.

Only this module knows the order of the stages.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quantkit.blocks import Draft, finish_block, replay_input_group, solve_input_group
from quantkit.calibration.compute import choose_device
from quantkit.calibration.data import load_tokenizer
from quantkit.calibration.walk import walk
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, read_tensor
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.checkpoint.source import resolve_source
from quantkit.describe import Stopwatch, describe_model, describe_windows, package_versions
from quantkit.errors import InputError, RecipeError, ResourceError
from quantkit.evidence import build_report, write_evidence
from quantkit.formats.compressed_tensors import write_compressed_tensors
from quantkit.formats.inspect import Inspection, inspect_artifact
from quantkit.gating import find_gate_spec, judge_artifact, judge_files
from quantkit.job import (
    Job,
    RecipeLike,
    depends_on,
    load,
    load_evaluation,
    needs_calibration,
    prepare,
)
from quantkit.planning import make_plan
from quantkit.records import (
    Artifact,
    ArtifactReport,
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
from quantkit.staging import check_output, commit, discard, partial_of
from quantkit.workspace import (
    Workspace,
    load_block,
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
    if loaded.recipe.output is not None:
        check_output(loaded.output, overwrite=overwrite)
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
        InputError: something that was given cannot be used; nothing is left behind.
        ResourceError: memory or disk ran out; the solved blocks are kept.
    """
    tell = progress or _silent
    watch = Stopwatch()
    with watch.time("prepare"):
        tell(Event("prepare", 0, 1, "reading the recipe, the checkpoint's headers and the data"))
        loaded = load(recipe, model, output, overrides)
        job = prepare(loaded, device=device, overwrite=overwrite, gate=gate)
        tell(Event("prepare", 1, 1))
    with _staged(loaded.output) as partial, _memory_errors():
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
        tell(_solved(block, job.plan, draft))


def _solve_in_walk(job: Job, workspace: Workspace, stored: frozenset[int], tell: Progress) -> None:
    """The sequential loop: capture, solve, store, replace, advance."""
    if job.calibration is None:
        raise RecipeError("the method needs calibration data: write `calibration:` in the recipe")
    stops = walk(
        build_skeleton(job.checkpoint),
        job.plan.blocks,
        lambda block: _read_block(job.checkpoint, block),
        lambda: _read_outside(job.checkpoint, job.plan),
        job.calibration,
        device=job.device,
        dtype=job.dtype,
        needs_stats=lambda block, group: block.index not in stored,
    )
    for stop in stops:
        groups = _quantized_groups(stop.block)
        if stop.group is groups[0]:
            known = load_block(workspace, stop.block.index) if stop.block.index in stored else None
            draft = Draft()
        if known is not None:
            live = replay_input_group(stop.group, known)
        else:
            live = solve_input_group(stop.group, stop.stats, stop.tensors, draft, job.scale_dtype)
        for name, weight in live.items():
            stop.replace(name, weight)
        if stop.group is groups[-1]:
            if known is None:
                store_block(workspace, finish_block(stop.block, draft))
            tell(_solved(stop.block, job.plan, draft))


def _quantized_groups(block: BlockPlan) -> list[GroupPlan]:
    return [group for group in block.groups if any(linear.quantized for linear in group.linears)]


def _solved(block: BlockPlan, whole: Plan, draft: Draft) -> Event:
    errors = [
        record.relative_error for record in draft.records if record.relative_error is not None
    ]
    message = block.prefix
    if errors:
        message += f", output error {sum(errors) / len(errors):.2%}"
    return Event("quantize", block.index + 1, len(whole.blocks), message)


def _read_block(checkpoint: Checkpoint, block: BlockPlan) -> Mapping[str, Tensor]:
    names = [name for name in checkpoint.tensors if name.startswith(f"{block.prefix}.")]
    return {name: read_tensor(checkpoint, name) for name in names}


def _read_outside(checkpoint: Checkpoint, whole: Plan) -> Mapping[str, Tensor]:
    """The tensors that belong to no block and are not the head."""
    prefixes = tuple(f"{block.prefix}." for block in whole.blocks)
    names = [
        name
        for name in checkpoint.tensors
        if not name.startswith(prefixes) and not name.startswith("lm_head.")
    ]
    return {name: read_tensor(checkpoint, name) for name in names}


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
    target = Path(output) if output is not None else folder.with_name(f"{folder.name}.gate")
    check_output(target, overwrite=overwrite)
    found = inspect_artifact(folder)
    spec = find_gate_spec(recipe, folder, data, overrides)
    checkpoint = open_checkpoint(resolve_source(os.fspath(baseline)))
    windows = load_evaluation(spec, load_tokenizer(checkpoint.source.folder))
    with _staged(target) as partial, _memory_errors():
        with watch.time("gate"):
            judgement = judge_files(
                checkpoint.source.folder,
                found.folder,
                windows,
                spec,
                device=choose_device(device).type,
                suspicions=(),
                progress=tell,
            )
        row = ArtifactReport(
            name=folder.name,
            path=str(folder),
            format=found.format,
            scheme=found.scheme,
            size_bytes=found.tensor_bytes,
            bits_per_weight=found.bits_per_weight,
            runtime="transformers",
            judgement=judgement,
        )
        evidence = {
            "model": describe_model(checkpoint.source, {}),
            "gate": spec.model_dump(mode="json"),
            "evaluation": describe_windows(windows),
            "versions": package_versions(),
            "timings": {"seconds": dict(watch.seconds)},
        }
        baseline_bytes = sum(tensor.size for tensor in checkpoint.tensors.values())
        report = Report(
            checkpoint.source.name,
            baseline_bytes,
            (row,),
            judgement.verdict,
            (),
            windows.notes,
            evidence,
        )
        write_reports(report, partial)
        commit(partial, target)
    return report


def _layer_records(whole: Plan, workspace: Workspace) -> list[LayerRecord]:
    stored = stored_blocks(workspace)
    return [
        record
        for block in whole.blocks
        if block.index in stored
        for record in load_block(workspace, block.index).records
    ]


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """Fill `<output>.partial` under its lock; keep it only where a job can go on from it."""
    partial = partial_of(output)
    existed = partial.exists()
    with locked(partial):
        try:
            yield partial
        except BaseException as error:
            resumable = any((partial / "workspace").glob("block-*")) and (
                existed or not isinstance(error, InputError)
            )
            if not resumable:
                discard(partial)
            raise


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Say what to do when memory runs out."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(
            "not enough memory: lower calibration.samples or calibration.sequence_length "
            f"({str(error).splitlines()[0] if str(error) else 'allocation refused'})"
        ) from error


def _silent(_: Event) -> None:
    """Progress that nobody watches."""
