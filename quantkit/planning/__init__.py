"""Recipe + checkpoint headers -> Plan, or one error that lists every problem.

No weight is read: the config and the headers tell it all.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import build_skeleton, summarize_names, unknown_tensors
from quantkit.checkpoint.structure import Structure, find_groups
from quantkit.errors import PlanError, ResourceError
from quantkit.ggml_types import GGUF
from quantkit.planning.assignment import Assignment, assign
from quantkit.planning.auto import (
    bound_plan,
    find_chosen,
    find_open_units,
    find_slack,
    find_unreachable,
    plan_choice,
)
from quantkit.planning.checks import find_notes, find_problems
from quantkit.planning.files import assign_types, find_open_types, without_schemes
from quantkit.planning.kv import note_kv_runtimes, plan_kv_cache, scale_bytes
from quantkit.planning.modelopt import (
    find_modelopt_notes,
    find_modelopt_problems,
    plan_modelopt,
    share_scales,
)
from quantkit.planning.onnx import (
    find_onnx_notes,
    find_onnx_problems,
    finish_graph,
    has_schemes,
)
from quantkit.planning.sizes import Sizes, choose_scale_dtype, measure_sizes
from quantkit.recipe import Recipe
from quantkit.records import (
    Allocation,
    BlockPlan,
    GgufPlan,
    GroupPlan,
    KvCachePlan,
    OnnxPlan,
    Plan,
)
from quantkit.schemes import METHODS, MODELOPT, ONNX, Method
from quantkit.staging import existing_folder, held_bytes

__all__ = ["check_disk", "find_chosen", "make_plan"]


_OTHER_FORMATS = frozenset({GGUF, ONNX, MODELOPT})
"""All but compressed-tensors, whose size a plan tells first."""


@dataclass(frozen=True)
class _Files:
    """The files with formats of their own that a recipe writes."""

    gguf: tuple[GgufPlan, ...]
    onnx: tuple[OnnxPlan, ...]


def make_plan(
    recipe: Recipe,
    checkpoint: Checkpoint,
    *,
    gate: bool = True,
    allocation: Allocation | None = None,
    gguf: Sequence[GgufPlan] = (),
    onnx: Sequence[OnnxPlan] = (),
    methods: Mapping[str, Method] = METHODS,
) -> Plan:
    """Say what a job will do, what it will take, and everything that stands in its way.

    Args:
        recipe: a validated recipe.
        checkpoint: opened; its weights are not read.
        gate: whether the artifact is to be judged, for which the recipe must have a gate.
        allocation: the schemes chosen for the layers that `scheme: auto` leaves open, or the types
            of `type: auto`. Without it, the plan of such a recipe says what there is to choose.
        gguf: the GGUF files of the recipe, in its order.
        onnx: the ONNX graphs of the recipe, in its order, with no layer quantized yet.
        methods: that the recipe may name.

    Raises:
        PlanError: the recipe does not fit the checkpoint; every problem is listed.
        CheckpointError: the model cannot be built, or its tensors do not fit its config.
        ResourceError: there is too little space where the recipe's output shall go.
    """
    skeleton = build_skeleton(checkpoint)
    structure = find_groups(checkpoint, skeleton)
    recipe = without_schemes(recipe)
    files = _Files(tuple(gguf), tuple(onnx))
    if recipe.measures and allocation is None:
        plan = _plan_open(recipe, checkpoint, skeleton, structure, files, methods, gate=gate)
    else:
        chosen = {} if allocation is None else find_chosen(allocation)
        assignment = assign(recipe.quantize, skeleton, structure, chosen, methods)
        assignment = assign_types(recipe.quantize, assignment, gguf)
        assignment = share_scales(recipe, assignment)
        _refuse(_problems_of(recipe, checkpoint, skeleton, structure, assignment, files, gate=gate))
        plan = _plan_assigned(recipe, checkpoint, skeleton, structure, assignment, files)
    if recipe.output is not None:
        check_disk(Path(recipe.output), plan.disk_bytes)
    return replace(plan, allocation=allocation)


def _plan_open(
    recipe: Recipe,
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    structure: Structure,
    files: _Files,
    methods: Mapping[str, Method],
    *,
    gate: bool,
) -> Plan:
    """The plan of a recipe with `scheme: auto` or `type: auto` before anything is measured."""
    if recipe.chooses_types:
        opened = find_open_types(recipe, skeleton, structure, files.gguf[0])
    else:
        opened = find_open_units(recipe, checkpoint, skeleton, structure, methods)
    problems = list(opened.problems)
    typed = [assign_types(recipe.quantize, each, files.gguf) for each in opened.assignments]
    typed = [share_scales(recipe, each) for each in typed]
    for assignment in typed:
        problems += _problems_of(
            recipe, checkpoint, skeleton, structure, assignment, files, gate=gate
        )
    _refuse(problems)
    plans = [
        _plan_assigned(recipe, checkpoint, skeleton, structure, assignment, files)
        for assignment in typed
    ]
    choice = plan_choice(recipe, skeleton, opened.units, plans)
    _refuse(find_unreachable(choice))
    # A plan that leaves all in 16 bits has a note on that, which is not what will be.
    telling = [plan for plan in plans if any(group.quantized for group in _groups(plan))] or plans
    notes = (*opened.notes, *find_slack(choice), *(note for plan in telling for note in plan.notes))
    return bound_plan(choice, plans, notes)


def _groups(plan: Plan) -> Iterable[GroupPlan]:
    return (group for block in plan.blocks for group in block.groups)


def _problems_of(
    recipe: Recipe,
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    structure: Structure,
    assignment: Assignment,
    files: _Files,
    *,
    gate: bool,
) -> list[str]:
    _, kv_problems = plan_kv_cache(recipe, skeleton, structure)
    return [
        *assignment.problems,
        *kv_problems,
        *find_problems(recipe, checkpoint, skeleton, structure, assignment, gate=gate),
        *find_onnx_problems(recipe, tuple(assignment.linears.values()), files.onnx),
        *find_modelopt_problems(
            recipe,
            tuple(assignment.linears.values()),
            (names for block in structure.blocks for names in block.fused),
            gate=gate,
        ),
    ]


def _refuse(problems: Iterable[str]) -> None:
    """Raise the error that lists the problems, if there are any."""
    lines = list(dict.fromkeys(problems))
    if lines:
        raise PlanError(lines)


def _plan_assigned(
    recipe: Recipe,
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    structure: Structure,
    assignment: Assignment,
    files: _Files,
) -> Plan:
    """The plan of an assignment without problems."""
    kv_cache, _ = plan_kv_cache(recipe, skeleton, structure)
    blocks = _plan_blocks(structure, assignment)
    if not blocks:
        raise PlanError([f"{checkpoint.source.name} has no decoder blocks: see its config.json"])
    scale_dtype = choose_scale_dtype(checkpoint, assignment.linears.values())
    leads = bool(files.gguf) and not any(has_schemes(export) for export in recipe.export)
    linears = tuple(assignment.linears.values())
    graphs = tuple(finish_graph(graph, linears, checkpoint) for graph in files.onnx)
    sizes = measure_sizes(recipe, checkpoint, skeleton, blocks, scale_dtype)
    layout = plan_modelopt(recipe, linears, kv_cache, scale_dtype, sizes.artifact_bytes)
    if leads:
        sizes = replace(sizes, artifact_bytes=files.gguf[0].tensor_bytes)
    elif graphs and all(export.format in {GGUF, ONNX} for export in recipe.export):
        sizes = replace(sizes, artifact_bytes=graphs[0].tensor_bytes)
    added = scale_bytes(kv_cache, scale_dtype)
    if layout is not None and all(each.format in _OTHER_FORMATS for each in recipe.export):
        # The scales of the cache are counted there.
        sizes, added = replace(sizes, artifact_bytes=layout.tensor_bytes), 0
    # Encoded tensors lie in the workspace and in the file.
    encoded = 2 * sum(file.tensor_bytes for file in files.gguf)
    # A graph is tried on two blocks first, which lie there in their own dtype and in float32.
    excerpt = 4 * sizes.block_bytes if graphs else 0
    encoded += max(excerpt, sum(graph.tensor_bytes for graph in graphs))
    # It is judged from a copy in another layout.
    encoded += 0 if layout is None else 2 * layout.tensor_bytes
    sizes = replace(
        sizes,
        artifact_bytes=sizes.artifact_bytes + added,
        disk_bytes=sizes.disk_bytes + encoded,
    )
    notes = [
        *assignment.notes,
        *(f"{file.type}: {note}" for file in files.gguf for note in file.notes),
        *(f"onnx: {note}" for graph in graphs for note in graph.notes),
        *find_onnx_notes(recipe),
        *find_modelopt_notes(recipe, linears),
        *find_notes(recipe, assignment),
        *note_kv_runtimes(kv_cache),
        *_note_unplanned(checkpoint, skeleton, structure, assignment, kv_cache),
    ]
    plan = _build(checkpoint, structure, blocks, notes, scale_dtype, sizes, kv_cache)
    return replace(plan, gguf=files.gguf, onnx=graphs, modelopt=layout, gguf_leads=leads)


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
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    structure: Structure,
    assignment: Assignment,
    kv_cache: KvCachePlan | None,
) -> Iterable[str]:
    """What stays as it is without the recipe asking for it."""
    yield from structure.notes
    unknown = unknown_tensors(checkpoint, skeleton)
    if unknown:
        yield (
            f"{len(unknown)} tensors of the checkpoint have no place in the model and are copied "
            f"as they are: {', '.join(summarize_names(unknown)[:3])}"
        )
    if not any(linear.solved for linear in assignment.linears.values()):
        rest = "no weight" if kv_cache is not None else "nothing"
        yield f"{rest} will be quantized: every layer is ignored or has the scheme none"


def check_disk(output: Path, needed: int) -> None:
    """Compare the free space with what the job needs; what it holds already it needs no more.

    Raises:
        ResourceError: it is too little.
    """
    place = existing_folder(output)
    free = shutil.disk_usage(place).free
    if free + held_bytes(output) < needed:
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
    kv_cache: KvCachePlan | None,
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
        kv_cache=kv_cache,
    )
