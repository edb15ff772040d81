"""The most that a job's own process holds, stage by stage, from shapes alone.

Counted are the libraries, a block as the checkpoint has it and the one that is read ahead, what the
suspended forwards hold at each of their stops, the statistics, and what the solvers and the writers
allocate beside them. The workers of the gate are processes of their own and are not counted.

Letters of shapes: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from quantkit.numerics.batching import count_micro_batches, tokens_at_once
from quantkit.planning.groups import SolvedMatrix, group_weights, holds_outputs, solved_matrices
from quantkit.planning.workload import Workload
from quantkit.records import BlockPlan, GroupPlan, LinearPlan, Plan
from quantkit.schemes import ONNX

_FLOAT32 = 4

MEMORY: Mapping[str, float] = MappingProxyType(
    {
        "margin": 1.1,
        # Bytes by which the process grows once it does more than plan.
        "data": 36e6,
        "walk": 20e6,
        # Freed memory, and oneDNN's code for shapes of products, of which a limit leaves less.
        "walk without a limit": 75e6,
        "suspended forward": 1.5e6,
        "compiled loops": 112e6,
        "solving": 16e6,
        "writing": 85e6,
        "gguf": 40e6,
        "onnx": 65e6,
        "gate": 60e6,
        "accelerator": 1.2e9,
        # The share of what suspended forwards hold that lies beside it in holes.
        "holes": 0.25,
        "holes between small tensors": 0.5,
        # Copies of a matrix [O, I] in float32 that a rounder has beside the weights.
        "rtn": 3.0,
        "search": 2.3,
        "gptq": 3.0,
        # Not measured: what a solver of the user's own holds is not known.
        "custom": 3.0,
    }
)
"""What was found by measuring jobs: benchmarks/predictions.py."""

_MAPPED_FROM = 8 << 20
"""Bytes from which on a tensor's memory is its own; smaller ones share the heap."""

_CHUNK_BYTES = 32 << 20
"""Two temporaries of a loss that is taken some rows at a time."""

_SAMPLED_TOKENS = 1024

_CANDIDATE_ELEMENTS = 1 << 21
_CANDIDATE_ROWS = 40 * 64
_CANDIDATE_TENSORS = 5
"""Of the search for a scale to fold: weights times candidates at a time, the rows of all of them,
and the float32 tensors of that size."""


def find_peak(plan: Plan, work: Workload, resident: int) -> int:
    """Return the most bytes that the job's process holds.

    Args:
        resident: what it holds when the plan has been made.
    """
    base = resident + (MEMORY["data"] if work.tokens or work.gate_windows else 0)
    base += MEMORY["onnx"] if ONNX in work.formats else 0
    stages = [_hold_writing(plan, work)]
    if work.on_device:
        base += MEMORY["accelerator"]
        stages.append(2 * work.model.block_bytes + work.model.embedding_bytes)
    else:
        stages.append(max(_hold_solving(plan, work), default=0.0))
        stages[-1] += _hold_walk(work) if work.tokens else 0
    if _runs_compiled(plan, work):
        base += MEMORY["compiled loops"]
    if work.gate_windows:
        stages.append(MEMORY["gate"])
    if plan.choice is not None:
        measuring = 2 * work.model.block_bytes + plan.choice.memory_bytes
        stages.append(_hold_walk(work) + measuring)
    return int(MEMORY["margin"] * (base + max(stages)))


def _runs_compiled(plan: Plan, work: Workload) -> bool:
    """Whether anything is run that numba compiles."""
    if work.compiled_sums and any(linear.needs_statistics for linear in plan.linears):
        return True
    return work.compiled and not work.on_device and any(map(_has_loops, plan.linears))


def _has_loops(linear: LinearPlan) -> bool:
    """Whether a solver goes over the columns or the candidate scales of a layer, in integers."""
    if not linear.needs_statistics:
        return False
    integers = linear.quantized and linear.scheme.weight_kind == "int"
    return linear.encoded or (integers and linear.method.rounder in ("gptq", "search"))


def _hold_walk(work: Workload) -> float:
    """Libraries that the walk needs, and the stacks of its suspended forwards."""
    windows, length = work.calibration_windows, work.calibration_length
    forwards = count_micro_batches(windows, work.model.hidden, length, on_device=work.on_device)
    kept = MEMORY["walk without a limit"] if work.room_bytes is None else 0
    return MEMORY["walk"] + kept + forwards * MEMORY["suspended forward"]


def find_device_peak(plan: Plan, work: Workload) -> int | None:
    """Return the most bytes that the job holds of the accelerator's memory; None without one."""
    if not work.on_device:
        return None
    return int(MEMORY["margin"] * max(_hold_solving(plan, work), default=0.0))


@dataclass(frozen=True)
class _Stop:
    """A group of a block, and those before it."""

    group: GroupPlan
    before: tuple[GroupPlan, ...]


def _stops(block: BlockPlan) -> Iterator[_Stop]:
    for number, group in enumerate(block.groups):
        if group.solved:
            yield _Stop(group, block.groups[:number])


def _hold_solving(plan: Plan, work: Workload) -> Iterator[float]:
    """Yield what is held at each stop of the loop over the blocks, the libraries apart."""
    # As block_loop.blocks_ahead has it.
    parked = work.room_bytes is not None and work.room_bytes < plan.activation_bytes
    ahead = work.on_device or not parked
    if work.tokens:
        # Every forward has looked its tokens up, and the first block is being read.
        yield work.model.embedding_bytes + work.tokens * work.model.hidden * work.compute_bytes
    if plan.kv_cache is not None and not any(group.solved for group in _groups(plan)):
        first = plan.blocks[0]
        weights = _hold_weights(_Stop(first.groups[0], ()), work, ahead=ahead)
        yield weights + _hold_forwards(
            _Stop(first.groups[1] if len(first.groups) > 1 else first.groups[0], first.groups[:1]),
            work,
            small=True,
        )
    # Blocks are alike: those that differ in their shapes or schemes are looked at alone.
    for block in {_describe(block): block for block in plan.blocks}.values():
        for stop in _stops(block):
            weights = _hold_weights(stop, work, ahead=ahead)
            statistics = _hold_statistics(stop.group) if work.tokens else 0
            moving = _hold_forwards(stop, work, small=True)
            waiting = _hold_forwards(stop, work, small=False)
            yield weights + moving + statistics
            holes = waiting - _hold_activations(stop, work)
            solver = _hold_solver(stop.group, holes, shared=bool(plan.gguf))
            yield weights + waiting + statistics + solver + MEMORY["solving"]


def _groups(plan: Plan) -> Iterator[GroupPlan]:
    return (group for block in plan.blocks for group in block.groups)


def _describe(block: BlockPlan) -> tuple[object, ...]:
    return tuple(
        (each.out_features, each.in_features, each.scheme, each.method, each.effort)
        for each in block.linears
    )


def _hold_weights(stop: _Stop, work: Workload, *, ahead: bool) -> float:
    """The block as stored, the copies that the forward runs on, and what is solved.

    Where the forward runs in the dtype of the checkpoint its weights are the stored ones, until
    they are replaced.

    Args:
        ahead: whether the next block is read meanwhile.
    """
    weights = work.model.block_bytes // work.model.item_bytes
    held = (1.0 + ahead) * work.model.block_bytes
    solved = group_weights([group for group in stop.before if group.solved])
    if work.tokens:
        copied = work.compute_bytes != work.model.item_bytes
        held += (weights if copied else solved) * work.compute_bytes
    # A byte a code, in each format.
    return held + solved * (1 + len(stop.group.linears[0].ggml_types))


def _hold_forwards(stop: _Stop, work: Workload, *, small: bool) -> float:
    """What all suspended forwards hold in front of a group, with the holes between it.

    Args:
        small: while the forwards move on, one after the other, the heap gets holes where tensors
            of a micro-batch are small.
    """
    at_once = tokens_at_once(work.model.hidden, on_device=work.on_device)
    at_once = max(at_once, work.calibration_length) * work.model.hidden * work.compute_bytes
    small = small and at_once < _MAPPED_FROM and not work.on_device
    # What is not parked lies between what comes and goes.
    crowded = small or work.room_bytes is not None
    holes = MEMORY["holes between small tensors" if crowded else "holes"]
    return _hold_activations(stop, work) * (1 + holes)


def _hold_activations(stop: _Stop, work: Workload) -> float:
    """What suspended forwards hold in front of a group, where there is room for it.

    That is the residual stream and the group's input; behind attention also the input of attention
    and its queries, keys and values; behind the first layers of a feed-forward their input.
    """
    if not work.tokens:
        return 0.0
    width = work.model.hidden + stop.group.linears[0].in_features
    # Behind a norm the block has begun anew from the residual stream.
    if stop.before and (stop.group.fold is None or stop.group.fold.kind != "norm"):
        last = stop.before[-1]
        width += last.linears[0].in_features
        if holds_outputs(last):
            width += sum(linear.out_features for linear in last.linears)
    held = work.tokens * width * work.compute_bytes
    return held if work.room_bytes is None else min(held, work.room_bytes)


def _hold_statistics(group: GroupPlan) -> float:
    """The second moment, and sampled tokens in float32; the drift of the input where it is used."""
    first = group.linears[0]
    if not any(linear.needs_statistics for linear in group.linears):
        return 0.0
    drift = any(linear.looks_at_whole_model for linear in group.linears)
    columns = first.in_features
    matrices = columns**2 * _FLOAT32 * (3 if drift else 1)
    if not group.needs_sample:
        return float(matrices)
    return matrices + 1.5 * _SAMPLED_TOKENS * columns * _FLOAT32 * (2 if drift else 1)


def _hold_solver(group: GroupPlan, holes: float, *, shared: bool) -> float:
    """What solving a group allocates: weights in float32 first of all.

    Args:
        holes: bytes of the heap that are free between what the forwards hold.
        shared: whether another format is solved by the same statistics.
    """
    matrices = solved_matrices(group)
    weights = sum(matrix.elements for matrix in matrices) * _FLOAT32
    held = [float(weights)]
    for matrix in matrices:
        joined = matrix.rows > matrix.first.out_features
        held.append(weights + _hold_matrix(matrix, holes, joined=joined, shared=shared))
    for linear in group.linears:
        if linear.encoded:
            held.append(linear.out_features * linear.in_features * _FLOAT32 * 4.0 + _CHUNK_BYTES)
            held[-1] += 3 * linear.in_features**2 * _FLOAT32 if linear.needs_statistics else 0
    return max(held)


def _hold_matrix(matrix: SolvedMatrix, holes: float, *, joined: bool, shared: bool) -> float:
    method, columns = matrix.first.method, matrix.columns
    size = matrix.elements * _FLOAT32
    square = columns**2 * _FLOAT32
    copy = size if joined else 0
    codes = matrix.elements
    if not method.needs_calibration:
        return copy + codes + MEMORY["rtn"] * size
    # With rounded inputs, the second moment and the noise of their rounding.
    folded = square if matrix.first.scheme.activations is not None else 0
    stages: list[float] = []
    if method.transform is not None:
        # The second moment, scaled: in place where nobody needs it afterwards. Before, candidates.
        folded += square if shared else 0
        rows = _CANDIDATE_ROWS * columns
        each = min(_CANDIDATE_ELEMENTS, rows) * _FLOAT32
        candidates = max(0.0, _CANDIDATE_TENSORS * each - (holes if each < _MAPPED_FROM else 0))
        stages.append(candidates + (2 * square if method.rounder == "gptq" else 0))
    losses = MEMORY[method.rounder] * size + min(_CHUNK_BYTES, 2 * size)
    if method.rounder == "gptq":
        # The factor, and what is eliminated while its order is found: some more than a third of it.
        stages.append(folded + 1.42 * square + size + codes)
        # Errors and targets of a block of columns beside it; with several roundings, theirs.
        stages.append(folded + square + (1.5 + (matrix.first.effort.beam_width > 1)) * size)
    stages.append(folded + losses)
    return copy + codes + max(stages)


def _hold_writing(plan: Plan, work: Workload) -> float:
    """A solved block as it is stored and as it is written, or a tensor that is copied."""
    weights = work.model.block_bytes // max(1, work.model.item_bytes)
    solved = 2.0 * weights if any(group.solved for group in _groups(plan)) else 0.0
    held = MEMORY["writing"] + max(solved, 2.0 * work.model.embedding_bytes)
    return held + (MEMORY["gguf"] if plan.gguf else 0)
