"""Solve the blocks of a plan one after the other, each stored before the next one is begun.

With calibration the blocks are solved along the walk: capture, solve, store, replace, advance.
Several processes do it in step: each walks its share of the windows, all know the statistics of
all, each rounds its share of the rows, and the first one stores the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from quantkit.blocks import (
    Draft,
    encode_input_group,
    finish_block,
    replay_encoded_group,
    replay_input_group,
    solve_input_group,
    solve_kv_cache,
)
from quantkit.calibration.parking import choose_room, free_ram
from quantkit.calibration.sharing import combine_kv_stats, combine_moments, share_windows
from quantkit.calibration.walk import BlockEnd, GroupStop, walk
from quantkit.checkpoint.ahead import read_ahead
from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.checkpoint.structure import output_embedding_name
from quantkit.describe import Stopwatch
from quantkit.errors import RecipeError
from quantkit.fisher import measure_fisher
from quantkit.job import Job, needs_calibration
from quantkit.ranks import ALONE, Ranks, from_first, ranks_here
from quantkit.records import (
    BlockPlan,
    Event,
    GroupPlan,
    LayerStats,
    Plan,
    Progress,
    SolvedBlock,
)
from quantkit.workspace import (
    Workspace,
    load_block,
    load_matrices,
    store_block,
    store_matrices,
    stored_blocks,
    stored_matrices,
)


def solve_blocks(
    job: Job, workspace: Workspace, watch: Stopwatch, tell: Progress, ranks: Ranks = ALONE
) -> None:
    """Bring every block of the job's plan into the workspace; those that are there stay.

    Args:
        workspace: only the first rank looks at it.
        watch: is told the seconds of `calibrate` (the walk with its statistics) and `solve`.
        ranks: the processes that do it together; without calibration the first one does it alone.

    Raises:
        RecipeError: a method needs calibration data and the recipe names none.
        CheckpointError, CalibrationError: a weight or an activation is not finite; or there are
            fewer calibration windows than ranks.
        ResourceError, OutputError: a block cannot be stored, or a rank has died.
    """
    stored = from_first(ranks, lambda: stored_blocks(workspace))
    todo = blocks_to_solve(job.plan)
    if stored:
        tell(Event("quantize", len(stored), len(todo), _resumed(todo, stored)))
    if all(block.index in stored for block in todo):
        return
    if needs_calibration(job.plan):
        _solve_in_walk(job, workspace, stored, watch, tell, ranks)
        return
    if not ranks.leads:
        return
    left = [block for block in todo if block.index not in stored]
    reader = read_ahead(left, partial(_read_block, job.checkpoint), _blocks_ahead(job, ALONE))
    with closing(reader):
        for block in left:
            draft, tensors = Draft(), next(reader)
            for group in _solved_groups(block):
                _solve_group(job, group, None, tensors, draft, {})
            store_block(workspace, finish_block(block, draft))
            tell(_solved(block, todo, draft))
            # Held on to, it would be a third block in memory while the next but one is read.
            del tensors


def _resumed(todo: Sequence[BlockPlan], stored: frozenset[int]) -> str:
    count = f"{len(stored)} block{'s' if len(stored) != 1 else ''}"
    left = [block.prefix for block in todo if block.index not in stored]
    return f"resumed after {count}, " + (f"goes on with {left[0]}" if left else "all are solved")


def _solve_in_walk(
    job: Job,
    workspace: Workspace,
    stored: frozenset[int],
    watch: Stopwatch,
    tell: Progress,
    ranks: Ranks,
) -> None:
    """The sequential loop: capture, solve, store, replace, advance."""
    if job.calibration is None:
        raise RecipeError("the method needs calibration data: write `calibration:` in the recipe")
    share = share_windows(ranks, job.calibration)
    from_first(ranks, lambda: _measure_fisher(job, workspace, stored, tell))
    skeleton = build_skeleton(job.checkpoint)
    todo = blocks_to_solve(job.plan)
    stops = walk(
        skeleton,
        job.plan.blocks,
        lambda block: _read_block(job.checkpoint, block),
        lambda: _read_outside(job.checkpoint, job.plan, skeleton),
        share.windows,
        device=job.device,
        dtype=job.dtype,
        needs_stats=lambda block, group: block.index not in stored,
        kv_cache=job.plan.kv_cache,
        follow_original=any(block.looks_at_whole_model for block in job.plan.blocks),
        room=choose_room(
            job.device,
            -(-job.plan.activation_bytes // ranks.size),
            _existing(workspace.folder),
            ranks_here(ranks),
        ),
        ahead=_blocks_ahead(job, ranks),
        combine=partial(combine_moments, ranks),
        combine_kv=partial(combine_kv_stats, ranks),
        first_token=share.first_token,
    )
    draft, known = Draft(ranks=ranks), None
    fishers: Mapping[str, Tensor] = {}
    with closing(stops):
        while True:
            with watch.time("calibrate"):
                stop = next(stops, None)
            if stop is None:
                break
            index = stop.block.index
            if isinstance(stop, GroupStop):
                if known is None and index in stored:
                    known = from_first(ranks, partial(load_block, workspace, index))
                if known is None and not draft.records and stop.block.looks_at_whole_model:
                    fishers = from_first(ranks, partial(load_matrices, workspace, index))
                with watch.time("solve"):
                    _settle(job, stop, known, draft, fishers)
            elif job.plan.kv_cache is not None and index not in stored:
                solve_kv_cache(stop.block, job.plan.kv_cache, stop.kv, draft, job.scale_dtype)
            if _is_last(stop, job.plan):
                if index not in stored and ranks.leads:
                    store_block(workspace, finish_block(stop.block, draft))
                tell(_solved(stop.block, todo, draft))
                draft, known, fishers = Draft(ranks=ranks), None, {}
            # Held on to, it would keep this block in memory while the next one is read.
            del stop


def _existing(folder: Path) -> Path:
    """The folder, or what there is of it: a rank behind the first may be on another machine."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _blocks_ahead(job: Job, ranks: Ranks) -> int:
    """Read a block ahead unless memory is tight: one is in its own dtype, one at work."""
    free = free_ram()
    return 0 if free is not None and free < 4 * job.plan.block_bytes * ranks_here(ranks) else 1


def _measure_fisher(job: Job, workspace: Workspace, stored: frozenset[int], tell: Progress) -> None:
    """Bring the Fisher matrices of all blocks that need them into the workspace."""
    needed = {block.index for block in job.plan.blocks if block.looks_at_whole_model} - stored
    if needed <= stored_matrices(workspace) or job.calibration is None:
        return
    found = measure_fisher(job.checkpoint, job.plan, job.calibration, device=job.device, tell=tell)
    for block in found:
        if block.index in needed:
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


def blocks_to_solve(whole: Plan) -> list[BlockPlan]:
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
