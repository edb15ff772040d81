"""The walk through the original model, and the pass back through it: a file a block."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.block_loop import blocks_ahead, read_outside
from quantkit.calibration.parking import choose_room
from quantkit.calibration.stored import pack_group, pack_kv, packed_bytes
from quantkit.calibration.walk import BlockEnd, GroupStop, walk
from quantkit.checkpoint.reader import Checkpoint, read_below
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.checkpoint.structure import find_groups
from quantkit.errors import ResourceError
from quantkit.fisher import measure_fisher
from quantkit.job import plan_work
from quantkit.planning.kv import plan_kv_cache
from quantkit.planning.sizes import FISHER_ENTRIES
from quantkit.recipe import ExportSpec, QuantizeSpec, Recipe
from quantkit.records import (
    Event,
    GroupPlan,
    KvCachePlan,
    LinearPlan,
    Plan,
    Progress,
    TokenWindows,
)
from quantkit.schemes import METHODS, SCHEMES
from quantkit.staging import existing_folder, held_bytes
from quantkit.workspace import (
    Workspace,
    store_matrices,
    store_tensors,
    stored_matrices,
    stored_tensors,
)

KIND = "statistics"
"""Of a block's file in the workspace."""


@dataclass(frozen=True)
class Taking:
    """What the walk needs."""

    checkpoint: Checkpoint
    plan: Plan
    """Every linear layer of the blocks is in it as one to be solved."""
    windows: TokenWindows
    device: torch.device
    dtype: torch.dtype
    wants_fisher: bool
    no_key_value: str | None
    """Why keys and values are not watched."""


def plan_taking(recipe: Recipe, checkpoint: Checkpoint) -> tuple[Plan, str | None]:
    """Plan to watch all: every linear layer of a block counts as one that is solved.

    Returns:
        The plan, and why keys and values are not watched, if they are not.
    """
    plain = Recipe(
        version=1,
        model=recipe.model,
        output=recipe.output,
        calibration=recipe.calibration,
        quantize=QuantizeSpec(scheme="fp8_dynamic", group_size="channel", method="gptq"),
        export=(ExportSpec(),),
    )
    plan = plan_work(plain, checkpoint, gate=False)
    blocks = tuple(
        replace(block, groups=tuple(_watched(group) for group in block.groups))
        for block in plan.blocks
    )
    key_value, why = _plan_key_value(plain, checkpoint)
    return replace(plan, blocks=blocks, kv_cache=key_value), why


def _watched(group: GroupPlan) -> GroupPlan:
    def watch(linear: LinearPlan) -> LinearPlan:
        return replace(linear, scheme=SCHEMES["w8a16"], method=METHODS["gptq"], ggml_types=())

    return replace(group, linears=tuple(map(watch, group.linears)))


def _plan_key_value(
    recipe: Recipe, checkpoint: Checkpoint
) -> tuple[KvCachePlan | None, str | None]:
    skeleton = build_skeleton(checkpoint)
    spec = recipe.quantize.model_copy(update={"kv_cache": "fp8"})
    asked = recipe.model_copy(update={"quantize": spec})
    found, problems = plan_kv_cache(asked, skeleton, find_groups(checkpoint, skeleton))
    return found, None if found is not None else "; ".join(problems)


def check_room(prepared: Taking, output: Path) -> None:
    """Refuse a disk that is too small, before the walk.

    Raises:
        ResourceError: it is, by these numbers.
    """
    blocks = prepared.plan.blocks
    size = sum(packed_bytes(group) for block in blocks for group in block.groups)
    if prepared.wants_fisher:
        linears = (linear for block in blocks for linear in block.linears)
        size += sum(4 * min(linear.out_features**2, FISHER_ENTRIES) for linear in linears)
    free = shutil.disk_usage(existing_folder(output.parent)).free + held_bytes(output)
    if free < size:
        raise ResourceError(
            f"the statistics take {size:,} bytes in {output}, and {free:,} are free: free some "
            f"space or choose another --output"
        )


def take_statistics(prepared: Taking, workspace: Workspace, tell: Progress) -> None:
    """Bring the statistics of every block into the workspace; those that are there stay."""
    plan, checkpoint = prepared.plan, prepared.checkpoint
    stored = stored_tensors(workspace, KIND)
    count = len(plan.blocks)
    if stored:
        resumed = f"resumed after {len(stored)} block{'s' if len(stored) != 1 else ''}"
        tell(Event("calibrate", len(stored), count, resumed))
    if all(block.index in stored for block in plan.blocks):
        return
    skeleton = build_skeleton(checkpoint)
    stops = walk(
        skeleton,
        plan.blocks,
        lambda block: read_below(checkpoint, block.prefix),
        lambda: read_outside(checkpoint, plan, skeleton),
        prepared.windows,
        device=prepared.device,
        dtype=prepared.dtype,
        needs_stats=lambda block, group: block.index not in stored,
        kv_cache=plan.kv_cache,
        room=choose_room(
            prepared.device, plan.activation_bytes, existing_folder(workspace.folder), 1
        ),
        ahead=blocks_ahead(plan),
    )
    found = _Found({}, {})
    with closing(stops):
        for stop in stops:
            block = stop.block
            _add(found, stop)
            ends = isinstance(stop, BlockEnd) or (
                plan.kv_cache is None and stop.group is block.groups[-1]
            )
            # Held on to, it would keep a second moment while the next one is summed.
            del stop
            if ends:
                if block.index not in stored:
                    about = {"groups": found.groups, "kv_tokens": found.kv_tokens}
                    store_tensors(workspace, KIND, block.index, found.tensors, about)
                found = _Found({}, {})
                tell(Event("calibrate", plan.blocks.index(block) + 1, count, block.prefix))


@dataclass
class _Found:
    """What a block's file will hold."""

    tensors: dict[str, Tensor]
    groups: dict[str, Any]
    kv_tokens: int | None = None


def _add(found: _Found, stop: GroupStop | BlockEnd) -> None:
    """Add what a stop of the walk has brought."""
    if isinstance(stop, BlockEnd):
        found.tensors |= pack_kv(stop.kv)
        found.kv_tokens = stop.kv.tokens
    elif stop.stats is not None:
        tensors, about = pack_group(stop.group, stop.stats)
        found.tensors |= tensors
        found.groups |= about


def take_fishers(prepared: Taking, workspace: Workspace, tell: Progress) -> None:
    """Bring the Fisher matrices of every block into the workspace, as all blocks or none."""
    if {block.index for block in prepared.plan.blocks} <= stored_matrices(workspace):
        return
    measured = measure_fisher(
        prepared.checkpoint, prepared.plan, prepared.windows, device=prepared.device, tell=tell
    )
    for block in measured:
        store_matrices(workspace, block.index, block.matrices)
