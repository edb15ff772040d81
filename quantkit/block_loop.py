"""Solve the blocks of a plan one after the other, each stored before the next one is begun.

With calibration the blocks are solved along the walk: capture, solve, store, replace, advance. From
statistics that were taken before, of the original model, each is solved by itself.
Several processes do it in step: each walks its share of the windows, all know the statistics of
all, each rounds its share of the rows, and the first one stores the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial

from torch import Tensor, nn

from quantkit import tracing
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
from quantkit.calibration.stored import load_fishers, load_kv_stats, load_stats
from quantkit.calibration.walk import BlockEnd, GroupStop, walk
from quantkit.checkpoint.ahead import read_ahead
from quantkit.checkpoint.reader import Checkpoint, read_below, read_tensor
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
from quantkit.staging import existing_folder
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
    if needs_calibration(job.plan) and job.statistics is None:
        _solve_in_walk(job, workspace, stored, watch, tell, ranks)
        return
    if not ranks.leads:
        return
    left = [block for block in todo if block.index not in stored]
    read = tracing.carried(partial(_read_block, job.checkpoint))
    reader = read_ahead(left, read, blocks_ahead(job.plan))
    with closing(reader):
        for block in left:
            with tracing.block(block.index, block.prefix) as span:
                draft, tensors = Draft(), next(reader)
                with watch.time("solve"):
                    _solve_block(job, block, tensors, draft)
                store_block(workspace, finish_block(block, draft))
                span.tell(_describe_solved(block, _mean_error(draft)))
                tell(_solved(block, todo, _mean_error(draft)))
                # Held on to, it would be a third block in memory while the next but one is read.
                del tensors


def _solve_block(job: Job, block: BlockPlan, tensors: Mapping[str, Tensor], draft: Draft) -> None:
    """Solve a block by itself: without statistics, or from those of the original model."""
    stored, device = job.statistics, job.device
    fishers: Mapping[str, Tensor] = {}
    if stored is not None:
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        if block.looks_at_whole_model:
            fishers = load_fishers(stored, block, device)
    for group in _solved_groups(block):
        stats = None if stored is None else load_stats(stored, block, group, device)
        _solve_group(job, group, stats, tensors, draft, fishers)
    if stored is not None and job.plan.kv_cache is not None:
        kv = load_kv_stats(stored, block, device)
        solve_kv_cache(block, job.plan.kv_cache, kv, draft, job.scale_dtype)


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
        tracing.carried(partial(_read_block, job.checkpoint)),
        lambda: read_outside(job.checkpoint, job.plan, skeleton),
        share.windows,
        device=job.device,
        dtype=job.dtype,
        needs_stats=lambda block, group: block.index not in stored,
        needs_sample=lambda group: group.needs_sample,
        kv_cache=job.plan.kv_cache,
        follow_original=any(block.looks_at_whole_model for block in job.plan.blocks),
        room=choose_room(
            job.device,
            -(-job.plan.activation_bytes // ranks.size),
            existing_folder(workspace.folder),
            ranks_here(ranks),
            None if job.plan.prediction is None else job.plan.prediction.room_bytes,
        ),
        ahead=blocks_ahead(job.plan, ranks),
        combine=partial(combine_moments, ranks),
        combine_kv=partial(combine_kv_stats, ranks),
        first_token=share.first_token,
    )
    with closing(stops):
        for block in todo:
            with tracing.block(block.index, block.prefix) as span:
                error = _solve_block_in_walk(job, workspace, stops, stored, watch, ranks)
                span.tell(_describe_solved(block, error, resumed=block.index in stored))
                tell(_solved(block, todo, error))
        with watch.time("calibrate"):
            next(stops, None)


def _solve_block_in_walk(
    job: Job,
    workspace: Workspace,
    stops: Iterator[GroupStop | BlockEnd],
    stored: frozenset[int],
    watch: Stopwatch,
    ranks: Ranks,
) -> float | None:
    """Follow the walk through one block, store its solution, and return its mean output error."""
    draft, known = Draft(ranks=ranks), None
    fishers: Mapping[str, Tensor] = {}
    while True:
        with watch.time("calibrate"):
            stop = next(stops)
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
            return _mean_error(draft)
        # Held on to, it would keep this block in memory while the next one is read.
        del stop


def blocks_ahead(plan: Plan, ranks: Ranks = ALONE) -> int:
    """Read a block ahead unless memory is tight: one is in its own dtype, one at work.

    So it is where activations of a CPU are parked in a file.
    """
    foretold = plan.prediction
    if (
        foretold is not None
        and foretold.device_memory_bytes is None
        and foretold.room_bytes is not None
    ):
        return 0
    free = free_ram()
    return 0 if free is not None and free < 4 * plan.block_bytes * ranks_here(ranks) else 1


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
        # GGUF files are encoded by the same statistics.
        live = solve_input_group(
            group, stats, tensors, draft, job.scale_dtype, fishers, spent=not whole.gguf
        )
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


def _solved(block: BlockPlan, todo: Sequence[BlockPlan], error: float | None) -> Event:
    message = block.prefix
    if error is not None:
        message += f", output error {error:.2%}"
    return Event("quantize", todo.index(block) + 1, len(todo), message)


def _mean_error(draft: Draft) -> float | None:
    errors = [
        record.relative_error for record in draft.records if record.relative_error is not None
    ]
    return sum(errors) / len(errors) if errors else None


def _describe_solved(
    block: BlockPlan, error: float | None, *, resumed: bool = False
) -> dict[str, tracing.Attribute]:
    """What the span of a block says about it."""
    linears = [linear for group in block.groups for linear in group.linears if linear.quantized]
    return {
        "scheme": ", ".join(dict.fromkeys(linear.scheme.name for linear in linears)) or None,
        "method": ", ".join(dict.fromkeys(linear.method.name for linear in linears)) or None,
        "layer.error": error,
        "resumed": resumed,
    }


def _read_block(checkpoint: Checkpoint, block: BlockPlan) -> Mapping[str, Tensor]:
    with tracing.span("read", {"block.index": block.index}):
        return read_below(checkpoint, block.prefix)


def read_outside(checkpoint: Checkpoint, whole: Plan, skeleton: nn.Module) -> Mapping[str, Tensor]:
    """The tensors of the model that belong to no block and not to its head."""
    skipped = (
        *(f"{block.prefix}." for block in whole.blocks),
        f"{output_embedding_name(skeleton)}.",
    )
    names = sorted(checkpoint.tensors.keys() & skeleton.state_dict(keep_vars=True).keys())
    return {name: read_tensor(checkpoint, name) for name in names if not name.startswith(skipped)}
