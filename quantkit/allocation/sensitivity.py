"""How much each unit of layers loses under each of its candidates: measured, not guessed.

For every unit and candidate the model runs with that unit alone quantized, and the KL divergence of
its next-token distributions from the original's is the cost. All of these runs go through the
blocks together: at a unit's block its streams of hidden states branch off from the original's, and
from there on each block is read once and run on every stream. In memory are one block and the
streams; where those are too many they are measured in several passes.

A unit is solved as the job will solve it, only without polishing, on statistics of the original's
inputs. A layer of a GGUF file is polished too where the job does so: without, it would have
llama.cpp's own encoding, whose costs are others. The divergence is taken on other windows than the
statistics, since rounding that makes up for its errors does better on the tokens that it has seen.
All is computed in float32: in bfloat16 the noise of the computation would hide what eight bits
cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantkit.allocation.bench import Bench, observe, set_up
from quantkit.allocation.streams import compute_logits, place_block
from quantkit.blocks import Draft, encode_input_group, solve_input_group
from quantkit.calibration.placing import empty, put
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError
from quantkit.numerics.activations import round_inputs
from quantkit.numerics.divergence import quick_divergence
from quantkit.records import (
    BlockPlan,
    Candidate,
    Event,
    GroupPlan,
    LayerStats,
    LinearPlan,
    OpenChoice,
    Plan,
    Progress,
    QuantizedLayer,
    TokenWindows,
)
from quantkit.schemes import EFFORTS, Effort

_LOGITS_AT_ONCE = 1 << 24
"""Entries of the logits that are compared at a time."""

Key = tuple[int, int]
"""Index of a unit, and of one of its candidates."""


def measure_costs(
    checkpoint: Checkpoint,
    plan: Plan,
    choice: OpenChoice,
    windows: TokenWindows,
    *,
    device: torch.device,
    tell: Progress,
) -> tuple[tuple[float, ...], ...]:
    """Return the divergence, in nats per token, of each candidate of each unit.

    Args:
        plan: of the job, with the choice still open.
        windows: the calibration windows, of which `choice` says how many are measured.

    Raises:
        CheckpointError: the model cannot be measured, or overflows on the data.
    """
    costs: dict[Key, float] = {}
    with torch.inference_mode():
        bench = set_up(checkpoint, plan, choice, windows, device)
        hidden, final = bench.measured.hidden, None
        done, total = 0, sum(len(plan.blocks) - start for start, _ in choice.passes)
        for start, stop in choice.passes:
            streams: dict[Key, Tensor] = {}
            for index in range(start, len(plan.blocks)):
                tensors = place_block(bench.model, checkpoint, bench.prefixes[index], device)
                for stream in streams.values():
                    bench.run(index, bench.measured, stream, in_place=True)
                if index < stop:
                    hidden = _branch_off(bench, index, choice, tensors, hidden, streams)
                elif start == choice.passes[0][0]:
                    final = bench.run(index, bench.measured, hidden if final is None else final)
                del tensors
                empty(bench.model.get_submodule(bench.prefixes[index]))
                done += 1
                message = f"{bench.prefixes[index]}, {len(streams)} candidates on their way"
                tell(Event("allocate", done, total, message))
            final = hidden if final is None else final
            costs |= _compare(bench, final, streams)
    return tuple(
        tuple(costs.get((unit, number), 0.0) for number in range(len(each.candidates)))
        for unit, each in enumerate(choice.units)
    )


def _branch_off(
    bench: Bench,
    index: int,
    choice: OpenChoice,
    tensors: Mapping[str, Tensor],
    hidden: Tensor,
    streams: MutableMapping[Key, Tensor],
) -> Tensor:
    """Start the streams of a block's units; return what the original goes on with."""
    units = {number: unit for number, unit in enumerate(choice.units) if unit.block == index}
    observed = observe(bench, index, units.values())
    for number, unit in units.items():
        stats = observed.pop(unit.candidates[0].linears[0].name, None)
        for place, candidate in enumerate(unit.candidates):
            if candidate.solved:
                with _degraded(bench, index, candidate, stats, tensors):
                    streams[number, place] = bench.run(index, bench.measured, hidden)
        del stats
    return bench.run(index, bench.measured, hidden)


@contextmanager
def _degraded(
    bench: Bench,
    index: int,
    candidate: Candidate,
    stats: LayerStats | None,
    tensors: Mapping[str, Tensor],
) -> Iterator[None]:
    """Quantize one unit for a while: its weights, and its inputs where the scheme says so."""
    linears = tuple(replace(linear, effort=_lower(linear)) for linear in candidate.linears)
    draft = Draft()
    scale_dtype: torch.dtype = getattr(torch, bench.plan.scale_dtype)
    if linears[0].quantized:
        group = _as_group(bench.plan.blocks[index], linears)
        live = solve_input_group(group, stats, tensors, draft, scale_dtype)
    else:
        group, files = GroupPlan(linears, None), bench.plan.gguf
        live = encode_input_group(group, stats, tensors, draft, files, leads=True)
    fold = draft.replay.get(f"fold:{linears[0].name}")
    kept, handles = [], []
    try:
        for name, value in live.items():
            owner, leaf = bench.model.get_submodule(name.rpartition(".")[0]), name.split(".")[-1]
            kept.append((owner, leaf, owner._parameters[leaf]))
            put(owner, leaf, value.to(bench.device))
        for linear in linears:
            if linear.scheme.activations is not None:
                hook = _rounding_hook(draft.layers[linear.name], fold)
                module = bench.model.get_submodule(linear.name)
                handles.append(module.register_forward_pre_hook(hook))
        yield
    finally:
        for owner, leaf, parameter in kept:
            owner._parameters[leaf] = parameter
        for handle in handles:
            handle.remove()


def _lower(linear: LinearPlan) -> Effort:
    """The effort with which a layer is solved for a measurement."""
    if linear.quantized:
        return EFFORTS["fast"]
    return EFFORTS["normal"] if linear.effort.whole_model else linear.effort


def _as_group(block: BlockPlan, linears: tuple[LinearPlan, ...]) -> GroupPlan:
    """The unit as a group of its own; a scale is folded only where the unit is a whole group."""
    names = {linear.name for linear in linears}
    for group in block.groups:
        if names == {linear.name for linear in group.linears}:
            return GroupPlan(linears, group.fold)
    return GroupPlan(linears, None)


def _rounding_hook(layer: QuantizedLayer, fold: Tensor | None) -> Callable[..., Any]:
    """Round a layer's input as its scheme does, behind the fold that the input has not seen."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
        inputs = args[0] if fold is None else args[0] / fold
        rounded = round_inputs(inputs, layer.scheme, layer.input_scale)
        return (rounded if fold is None else rounded * fold, *args[1:])

    return hook


def _compare(bench: Bench, final: Tensor, streams: Mapping[Key, Tensor]) -> dict[Key, float]:
    """Return the mean divergence of each stream from the original behind the last block.

    Raises:
        CheckpointError: the original's own logits are not finite.
    """
    part = bench.measured
    weights = part.weights.flatten().to(bench.device)
    counted = torch.nonzero(part.weights.flatten()).squeeze(1)
    vocabulary = len(cast(Any, bench.model).get_output_embeddings().weight)
    sums = dict.fromkeys(streams, 0.0)

    def logits(hidden: Tensor, rows: Tensor) -> Tensor:
        batch = hidden.flatten(0, 1)[rows].to(bench.device)
        return compute_logits(bench.model, bench.prefixes, batch, part.recording.in_tuple)

    for rows in counted.split(max(1, _LOGITS_AT_ONCE // vocabulary)):
        original = logits(final, rows)
        if not bool(original.isfinite().all()):
            raise CheckpointError(
                "the model's logits are not finite on the calibration data: it overflows on them, "
                "so check the checkpoint and its dtype"
            )
        log_p = torch.log_softmax(original.float(), dim=-1)
        for key, stream in streams.items():
            divergence = quick_divergence(log_p, logits(stream, rows))
            sums[key] += float(divergence.double() @ weights[rows].double())
    return {key: value / float(weights.double().sum()) for key, value in sums.items()}
