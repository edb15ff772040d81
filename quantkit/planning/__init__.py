"""Recipe + checkpoint headers -> Plan, or one error that lists every problem.

No weight is read: the config and the headers tell it all.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import build_skeleton, summarize_names, unknown_tensors
from quantkit.checkpoint.structure import Structure, find_groups
from quantkit.errors import PlanError, ResourceError
from quantkit.planning.assignment import Assignment, assign
from quantkit.planning.checks import find_notes, find_problems
from quantkit.planning.sizes import Sizes, choose_scale_dtype, measure_sizes
from quantkit.recipe import Recipe
from quantkit.records import BlockPlan, GroupPlan, Plan

__all__ = ["make_plan"]


def make_plan(recipe: Recipe, checkpoint: Checkpoint, *, gate: bool = True) -> Plan:
    """Say what a job will do, what it will take, and everything that stands in its way.

    Args:
        recipe: a validated recipe.
        checkpoint: opened; its weights are not read.
        gate: whether the artifact is to be judged, for which the recipe must have a gate.

    Raises:
        PlanError: the recipe does not fit the checkpoint; every problem is listed.
        CheckpointError: the model cannot be built, or its tensors do not fit its config.
        ResourceError: there is too little space where the recipe's output shall go.
    """
    skeleton = build_skeleton(checkpoint)
    structure = find_groups(checkpoint, skeleton)
    assignment = assign(recipe.quantize, skeleton, structure)
    problems = [
        *assignment.problems,
        *find_problems(recipe, checkpoint, skeleton, structure, assignment, gate=gate),
    ]
    if problems:
        raise PlanError(problems)
    blocks = _plan_blocks(structure, assignment)
    scale_dtype = choose_scale_dtype(checkpoint, assignment.linears.values())
    sizes = measure_sizes(recipe, checkpoint, skeleton, blocks, scale_dtype)
    if recipe.output is not None:
        _check_disk(Path(recipe.output), sizes.disk_bytes)
    notes = [
        *assignment.notes,
        *find_notes(recipe, assignment),
        *_note_unplanned(checkpoint, skeleton, structure, assignment),
    ]
    return _build(checkpoint, structure, blocks, notes, scale_dtype, sizes)


def _plan_blocks(structure: Structure, assignment: Assignment) -> tuple[BlockPlan, ...]:
    return tuple(
        BlockPlan(
            index,
            block.prefix,
            tuple(
                GroupPlan(tuple(assignment.linears[name] for name in group.linears), group.fold)
                for group in block.groups
            ),
        )
        for index, block in enumerate(structure.blocks)
    )


def _note_unplanned(
    checkpoint: Checkpoint, skeleton: nn.Module, structure: Structure, assignment: Assignment
) -> Iterable[str]:
    """What stays as it is without the recipe asking for it."""
    yield from structure.notes
    unknown = unknown_tensors(checkpoint, skeleton)
    if unknown:
        yield (
            f"{len(unknown)} tensors of the checkpoint have no place in the model and are copied "
            f"as they are: {', '.join(summarize_names(unknown)[:3])}"
        )
    if not any(linear.quantized for linear in assignment.linears.values()):
        yield "nothing will be quantized: every layer is ignored or has the scheme none"


def _check_disk(output: Path, needed: int) -> None:
    """Compare the free space with what the job needs.

    Raises:
        ResourceError: it is too little.
    """
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ResourceError(
            f"the job needs {_megabytes(needed)} MB at {output}, and {place} has "
            f"{_megabytes(free)} MB left: free some space or choose another --output"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f}"


def _build(
    checkpoint: Checkpoint,
    structure: Structure,
    blocks: tuple[BlockPlan, ...],
    notes: Sequence[str],
    scale_dtype: str,
    sizes: Sizes,
) -> Plan:
    return Plan(
        model=checkpoint.source.name,
        family=structure.family,
        blocks=blocks,
        notes=tuple(dict.fromkeys(notes)),
        scale_dtype=scale_dtype,
        parameters=sizes.parameters,
        baseline_bytes=sizes.baseline_bytes,
        artifact_bytes=sizes.artifact_bytes,
        bits_per_weight=8 * sizes.artifact_bytes / sizes.parameters,
        block_bytes=sizes.block_bytes,
        activation_bytes=sizes.activation_bytes,
        statistics_bytes=sizes.statistics_bytes,
        disk_bytes=sizes.disk_bytes,
    )
