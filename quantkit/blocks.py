"""One input group solved: fold a scale out of its input, round its weights, say how well it went.

A fold divides the input of a group by a scale per channel and multiplies the columns of its
weights by it. In the artifact the division sits in the operation in front (a norm, or the rows of
a linear layer). The walk keeps that operation as it was, since the forwards that wait in front of
the group have run it already, and divides the columns of the dequantized weight instead: the
same function, up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantkit.numerics.affine import dequantize, dequantize_layer
from quantkit.records import (
    BlockPlan,
    FoldPlan,
    GroupPlan,
    LayerRecord,
    LayerStats,
    LinearPlan,
    QuantizedLayer,
    SolvedBlock,
)
from quantkit.schemes import METHODS
from quantkit.solvers import (
    Solution,
    choose_fold,
    collapse_heads,
    fold_into_bias,
    fold_into_dense,
    fold_into_layer,
    fold_into_norm,
    measure_weights,
    output_energy,
    scale_stats,
    solve_group,
)


@dataclass
class Draft:
    """What is known of a block while its groups are being solved."""

    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    records: list[LayerRecord] = field(default_factory=list)
    replay: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Fold:
    """scale: float32 [I], what the group's input is divided by."""

    scale: Tensor | None
    exponent: float | None
    fallback: str | None


def solve_input_group(
    group: GroupPlan,
    stats: LayerStats | None,
    tensors: Mapping[str, Tensor],
    draft: Draft,
    scale_dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Solve the quantized layers of a group and add them to `draft`.

    Args:
        group: the layers and what stands in front of them.
        stats: second moment of their input; None for methods that need no calibration.
        tensors: the block's tensors as the checkpoint has them.
        draft: changed in place.
        scale_dtype: dtype of the scales in the artifact.

    Returns:
        Layer name -> float32 weight [O, I] that takes its place in the walk.
    """
    linears = [linear for linear in group.linears if linear.quantized]
    weights = [tensors[f"{linear.name}.weight"].float() for linear in linears]
    energies = [None if stats is None else output_energy(weight, stats) for weight in weights]
    fold = _fold(group, linears, weights, stats, tensors, draft, scale_dtype)
    plain_losses: list[float | None] = [None] * len(linears)
    if fold.scale is not None and stats is not None:
        # Before the weights are scaled; without a fold the solutions bring theirs along.
        plain_losses = _losses_of_plain_rounding(weights, stats, linears, scale_dtype)
        weights = [weight * fold.scale for weight in weights]
        stats = scale_stats(stats, fold.scale)
        draft.replay[f"fold:{linears[0].name}"] = fold.scale
    live = {}
    solutions = solve_group(weights, stats, linears, scale_dtype)
    for linear, weight, energy, plain, solution in zip(
        linears, weights, energies, plain_losses, solutions, strict=True
    ):
        decoded = dequantize_layer(solution.layer)
        loss = solution.loss
        if loss is None and stats is not None:
            loss = output_energy(decoded - weight, stats)
        draft.layers[linear.name] = solution.layer
        draft.records.append(
            _record(
                linear,
                solution,
                fold,
                relative_error=_ratio(loss, energy),
                rtn_relative_error=_ratio(
                    next((x for x in (plain, solution.plain_loss, loss) if x is not None), None),
                    energy,
                ),
                weight_error=measure_weights(weight, decoded),
            )
        )
        if fold.scale is not None:
            decoded = decoded / fold.scale
        live[linear.name] = decoded
    return live


def finish_block(block: BlockPlan, draft: Draft) -> SolvedBlock:
    """Freeze a block whose groups are all solved."""
    return SolvedBlock(
        block.index,
        tuple(draft.layers.values()),
        dict(draft.dense),
        tuple(draft.records),
        dict(draft.replay),
    )


def replay_input_group(group: GroupPlan, block: SolvedBlock) -> dict[str, Tensor]:
    """Return the weights that the walk had for a group of a block that was solved before.

    They are bit-equal to those that `solve_input_group` returned, so that a resumed job ends in
    the same bytes.
    """
    layers = {layer.name: layer for layer in block.layers}
    linears = [linear for linear in group.linears if linear.quantized]
    fold = block.replay.get(f"fold:{linears[0].name}")
    live = {}
    for linear in linears:
        layer = layers[linear.name]
        scale = block.replay.get(f"scale:{linear.name}", layer.scale)
        weight = dequantize(layer.codes, scale, layer.zero_point)
        live[linear.name] = weight if fold is None else weight / fold
    return live


def _losses_of_plain_rounding(
    weights: Sequence[Tensor],
    stats: LayerStats,
    linears: Sequence[LinearPlan],
    scale_dtype: torch.dtype,
) -> list[float | None]:
    """Losses of rtn on the untransformed weights, to compare with."""
    plain = [replace(linear, method=METHODS["rtn"]) for linear in linears]
    solutions = solve_group(weights, None, plain, scale_dtype)
    return [
        output_energy(dequantize_layer(solution.layer).sub_(weight), stats)
        for weight, solution in zip(weights, solutions, strict=True)
    ]


def _ratio(loss: float | None, energy: float | None) -> float | None:
    """Loss relative to the output; nothing to nothing is 0."""
    if loss is None or energy is None:
        return None
    return loss / energy if energy > 0 else float(loss > 0)


def _fold(
    group: GroupPlan,
    linears: Sequence[LinearPlan],
    weights: Sequence[Tensor],
    stats: LayerStats | None,
    tensors: Mapping[str, Tensor],
    draft: Draft,
    scale_dtype: torch.dtype,
) -> _Fold:
    """Choose a scale for the group's input and fold it into the operation in front."""
    plan = group.fold
    scaled = [linear.method.transform is not None for linear in linears]
    if plan is None or stats is None or not any(scaled):
        return _Fold(None, None, None)
    if len(linears) < len(group.linears) or not all(scaled):
        return _Fold(None, None, "not scaled: shares its input with a layer without scaling")
    choice = choose_fold(weights, stats, linears, scale_dtype, plan.repeat, plan.head_dim)
    if choice.exponent is None:
        return _Fold(None, None, None)
    if plan.kind == "norm":
        return _Fold(_fold_norm(plan, choice.scale, tensors, draft), choice.exponent, None)
    if _fold_linear(plan, choice.scale, tensors, draft):
        return _Fold(choice.scale, choice.exponent, None)
    return _Fold(None, None, f"not scaled: {plan.module} cannot take the scale without rounding")


def _fold_norm(
    plan: FoldPlan, scale: Tensor, tensors: Mapping[str, Tensor], draft: Draft
) -> Tensor:
    """Divide a norm's weight and bias; return the scale that its rounded weight stands for."""
    names = (f"{plan.module}.weight", f"{plan.module}.bias")
    weight, bias, effective = fold_into_norm(tensors[names[0]], tensors.get(names[1]), scale)
    draft.dense[names[0]] = weight
    if bias is not None:
        draft.dense[names[1]] = bias
    return effective


def _fold_linear(
    plan: FoldPlan, scale: Tensor, tensors: Mapping[str, Tensor], draft: Draft
) -> bool:
    """Divide the rows of the linear layer in front; False where its scales cannot hold it."""
    rows = scale
    if plan.repeat > 1:
        rows = collapse_heads(scale, plan.repeat, plan.head_dim)
    weight_name, bias_name = f"{plan.module}.weight", f"{plan.module}.bias"
    layer = draft.layers.get(plan.module)
    if layer is None:
        weight, bias = fold_into_dense(tensors[weight_name], tensors.get(bias_name), rows)
        draft.dense[weight_name] = weight
    else:
        folded = fold_into_layer(layer, rows)
        if folded is None:
            return False
        draft.replay.setdefault(f"scale:{plan.module}", layer.scale)
        draft.layers[plan.module] = folded
        bias = tensors.get(bias_name)
        if bias is not None:
            bias = fold_into_bias(bias, rows)
    if bias is not None:
        draft.dense[bias_name] = bias
    return True


def _record(
    linear: LinearPlan,
    solution: Solution,
    fold: _Fold,
    *,
    relative_error: float | None,
    rtn_relative_error: float | None,
    weight_error: float,
) -> LayerRecord:
    layer = solution.layer
    groups = layer.scale.shape[1]
    bits = linear.scheme.weight_bits * (
        1 if layer.zero_point is None else 1 + groups / linear.in_features
    )
    bits += 8 * layer.scale.element_size() * groups / linear.in_features
    unscaled = fold.fallback if linear.method.transform is not None else None
    notes = [note for note in (unscaled, solution.fallback) if note]
    return LayerRecord(
        name=linear.name,
        scheme=linear.scheme.name,
        group_size=linear.group_size,
        method=linear.method.name,
        bits_per_weight=bits,
        relative_error=relative_error,
        rtn_relative_error=rtn_relative_error,
        weight_error=weight_error,
        damping=solution.damping,
        awq_exponent=fold.exponent,
        fallback="; ".join(notes) or None,
    )
