"""Encode the weights of one input group for the GGUF files of a job, and say how well it went.

Every file gets codes of its own from the same statistics, so one pass over the data serves all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import Tensor

from quantkit.blocks.draft import Draft
from quantkit.blocks.smoothing import smooth_input
from quantkit.blocks.solving import choose_targets, relative_loss
from quantkit.errors import CheckpointError
from quantkit.ggml_types import GGML_TYPES, GgmlType
from quantkit.numerics.ggml.codec import decode, pack
from quantkit.ranks import Ranks, from_first
from quantkit.records import GgufPlan, GroupPlan, LayerRecord, LayerStats, LinearPlan, SolvedBlock
from quantkit.schemes import EFFORTS
from quantkit.solvers import follow_drift, measure_weights, output_energy, scale_stats
from quantkit.solvers.ggml import GgmlSolution, solve_ggml_group
from quantkit.solvers.spreading import spread_blocks


def encode_input_group(
    group: GroupPlan,
    stats: LayerStats | None,
    tensors: Mapping[str, Tensor],
    draft: Draft,
    files: tuple[GgufPlan, ...],
    fishers: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    leads: bool,
) -> dict[str, Tensor]:
    """Encode the layers of a group for every GGUF file and add them to `draft`.

    Args:
        group: the layers.
        stats: of their input; None for methods that need no calibration.
        tensors: the block's tensors as the checkpoint has them.
        draft: changed in place.
        files: the files of the job.
        fishers: layer name -> Fisher matrix float32 [O, B], where they were measured.
        leads: whether the walk goes on with the weights of the first file.

    Returns:
        Full tensor name -> the float32 weight [O, I] that takes its place in the walk; empty where
        another format leads.

    Raises:
        CheckpointError: a type cannot hold weights that are so large.
    """
    linears = [linear for linear in group.linears if linear.encoded]
    live: dict[str, Tensor] = {}
    if not linears:
        return live
    weights = [tensors[f"{linear.name}.weight"].float() for linear in linears]
    # What the inputs have lost is what the leading format lost: only that can make up for it.
    targets = follow_drift(weights, stats) if leads and stats is not None else None
    leading = weights if targets is None else choose_targets(linears, weights, targets)
    energies = [None if stats is None else output_energy(weight, stats) for weight in weights]
    smoothed = None
    if stats is not None:
        _note_importance(linears, stats, draft)
        calibrated = all(linear.method.needs_calibration for linear in linears)
        # At the least effort files are those of llama.cpp.
        if calibrated and linears[0].effort.polish_sweeps:
            smoothed = smooth_input(group, linears, leading, stats, tensors, draft, files)
    for number, file in enumerate(files):
        followed = number == 0 and targets is not None
        chosen = leading if followed else weights
        tasks = [
            _Task(linear, number, file.type, weight, energy, followed)
            for linear, weight, energy in zip(linears, chosen, energies, strict=True)
            if GGML_TYPES[linear.ggml_types[number]].quantized
        ]
        decoded = _encode(tasks, stats, draft, fishers, smoothed)
        if leads and number == 0:
            live |= decoded
    return live


def _note_importance(linears: Sequence[LinearPlan], stats: LayerStats, draft: Draft) -> None:
    """Keep what an importance matrix has; a copy each, as a file holds no tensor twice."""
    for linear in linears:
        if linear.method.needs_calibration:
            importance = stats.second_moment.diagonal().clone()
            draft.importance[f"{linear.name}.weight"] = importance


def replay_encoded_group(group: GroupPlan, block: SolvedBlock) -> dict[str, Tensor]:
    """Return the weights that the walk had for a group of a block that the first file led.

    They are bit-equal to those that `encode_input_group` returned.
    """
    live = {}
    scales = (block.replay.get(f"smooth:{linear.name}") for linear in group.linears)
    scale = next((scale for scale in scales if scale is not None), None)
    for linear in group.linears:
        name = f"{linear.name}.weight"
        packed = block.encoded.get(f"0:{name}")
        if packed is not None:
            decoded = decode(GGML_TYPES[linear.ggml_types[0]], packed)
            live[name] = decoded if scale is None else decoded / scale
    return live


@dataclass(frozen=True)
class _Task:
    """One layer for one file.

    weight: what is encoded, float32 [O, I]. energy: of the output of the checkpoint's weight, where
    the input is known. followed: whether weights make up for layers before, where methods look at
    data.
    """

    linear: LinearPlan
    number: int
    file_type: str
    weight: Tensor
    energy: float | None
    followed: bool

    @property
    def kind(self) -> GgmlType:
        """The type of the weight in the file."""
        return GGML_TYPES[self.linear.ggml_types[self.number]]


def _encode(
    tasks: Sequence[_Task],
    stats: LayerStats | None,
    draft: Draft,
    fishers: Mapping[str, Tensor],
    smoothed: tuple[Tensor, float] | None,
) -> dict[str, Tensor]:
    """Add the bytes and records of layers to `draft`; return the weights that they stand for."""
    scale, exponent = (None, None) if smoothed is None else smoothed
    decoded = {}
    for calibrated in (True, False):
        members = [each for each in tasks if each.linear.method.needs_calibration == calibrated]
        if not members:
            continue
        known = stats if calibrated else None
        solutions = _solve(members, known, fishers, scale, draft.ranks)
        for task, solution in zip(members, solutions, strict=True):
            name = f"{task.linear.name}.weight"
            draft.encoded[f"{task.number}:{name}"] = pack(solution.blocks)
            weight = solution.blocks.dequantize()
            decoded[name] = weight if scale is None else weight / scale
            coupled = known is not None and task.linear.name in fishers
            record = _record(task, solution, known, decoded[name], coupled=coupled)
            draft.records.append(replace(record, smoothing_exponent=exponent))
    return decoded


def _solve(
    tasks: Sequence[_Task],
    stats: LayerStats | None,
    fishers: Mapping[str, Tensor],
    scale: Tensor | None,
    ranks: Ranks,
) -> tuple[GgmlSolution, ...]:
    """Solve layers that share an input, which is divided by `scale`.

    Raises:
        CheckpointError: a type cannot hold weights that are so large.
    """
    weights, kinds = [task.weight for task in tasks], [task.kind for task in tasks]
    found = [fishers.get(task.linear.name) for task in tasks]
    effort = tasks[0].linear.effort

    def solve(weights: Sequence[Tensor], stats: LayerStats | None) -> tuple[GgmlSolution, ...]:
        if any(fisher is not None for fisher in found):
            # Rows make up for each other: one process does it.
            return from_first(ranks, lambda: solve_ggml_group(weights, kinds, stats, effort, found))
        return spread_blocks(
            ranks, weights, lambda rows: solve_ggml_group(rows, kinds, stats, effort, found)
        )

    try:
        if scale is None or stats is None:
            return solve(weights, stats)
        # What the loss is compared with is the file that llama.cpp would make.
        plain = solve_ggml_group(weights, kinds, stats, EFFORTS["fast"], [None] * len(tasks))
        scaled = [weight * scale for weight in weights]
        solutions = solve(scaled, scale_stats(stats, scale))
        return tuple(
            replace(solution, plain_loss=other.plain_loss)
            for solution, other in zip(solutions, plain, strict=True)
        )
    except ValueError as error:
        names = ", ".join(task.linear.name for task in tasks)
        raise CheckpointError(
            f"{names}: {error}; give these layers the type F32 with an override of the export"
        ) from error


def _record(
    task: _Task,
    solution: GgmlSolution,
    stats: LayerStats | None,
    decoded: Tensor,
    *,
    coupled: bool,
) -> LayerRecord:
    linear, kind = task.linear, task.kind
    return LayerRecord(
        name=linear.name,
        scheme=kind.name,
        group_size=kind.sub_block,
        method=_describe_method(linear, stats),
        bits_per_weight=kind.bits_per_weight,
        relative_error=relative_loss(solution.loss, task.energy),
        rtn_relative_error=relative_loss(solution.plain_loss, task.energy),
        weight_error=measure_weights(task.weight, decoded),
        damping=solution.damping,
        coupled=coupled,
        followed_drift=task.followed and linear.method.needs_calibration,
        fallback=solution.fallback,
        file_type=task.file_type,
    )


def _describe_method(linear: LinearPlan, stats: LayerStats | None) -> str:
    """Say how codes were chosen: at the least effort as llama.cpp does it."""
    if stats is None:
        return "rtn"
    return "gptq" if linear.effort.polish_sweeps else "importance matrix"
