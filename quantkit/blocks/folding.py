"""Choose a scale for the input of a group and fold it into the operation in front."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.blocks.draft import Draft
from quantkit.ranks import from_first
from quantkit.records import FoldPlan, GroupPlan, LayerStats, LinearPlan
from quantkit.schemes import Transform
from quantkit.solvers import (
    FoldChoice,
    choose_fold,
    choose_smoothing,
    collapse_heads,
    expand_heads,
    fold_into_bias,
    fold_into_dense,
    fold_into_layer,
    fold_into_norm,
)

CHOOSERS: Mapping[Transform, Callable[..., FoldChoice]] = MappingProxyType(
    {"awq": choose_fold, "smoothquant": choose_smoothing}
)

_NOT_SMOOTHED = "not smoothed: no scale lowers the error of held-out tokens by 2 %"


@dataclass(frozen=True)
class Fold:
    """What was folded, and why.

    scale: float32 [I], what the group's input is divided by; None where it is left alone.
    fallback: why, where a scale was asked for.
    """

    scale: Tensor | None = None
    exponent: float | None = None
    transform: Transform | None = None
    fallback: str | None = None


def fold_input(
    group: GroupPlan,
    linears: Sequence[LinearPlan],
    weights: Sequence[Tensor],
    stats: LayerStats | None,
    tensors: Mapping[str, Tensor],
    draft: Draft,
    scale_dtype: torch.dtype,
) -> Fold:
    """Choose a scale for the group's input and fold it into the operation in front.

    Args:
        linears: the quantized layers of the group.
        weights: float32 [O_i, I], one for each of `linears`; not changed.
        stats: of the group's input.
        tensors: the block's tensors as the checkpoint has them.
        draft: what is in front is changed in place.
        scale_dtype: of the scales in the artifact.
    """
    plan = group.fold
    transforms = {linear.method.transform for linear in linears}
    wanted = next((transform for transform in transforms if transform is not None), None)
    if plan is None or stats is None or wanted is None:
        return Fold()
    if len(linears) < len(group.linears) or len(transforms) > 1:
        return Fold(fallback="not scaled: shares its input with a layer without such scaling")
    if stats.tokens == 0:
        return Fold(fallback="not scaled: no calibration token reached the layer")
    choose = CHOOSERS[wanted]
    choice = from_first(
        draft.ranks,
        lambda: choose(weights, stats, linears, scale_dtype, plan.repeat, plan.head_dim),
    )
    if choice.exponent is None:
        return Fold(fallback=_NOT_SMOOTHED if wanted == "smoothquant" else None)
    into = _fold_norm if plan.kind == "norm" else _fold_linear
    scale = into(plan, choice.scale, tensors, draft)
    if scale is None:
        return Fold(fallback=f"not scaled: {plan.module} cannot take the scale without rounding")
    return Fold(scale, choice.exponent, wanted)


def _fold_norm(
    plan: FoldPlan, scale: Tensor, tensors: Mapping[str, Tensor], draft: Draft
) -> Tensor | None:
    """Divide a norm's weight and bias; return the scale that its rounded weight stands for."""
    names = (f"{plan.module}.weight", f"{plan.module}.bias")
    weight, bias, effective = fold_into_norm(tensors[names[0]], tensors.get(names[1]), scale)
    draft.dense[names[0]] = weight
    if bias is not None:
        draft.dense[names[1]] = bias
    return effective


def _fold_linear(
    plan: FoldPlan, scale: Tensor, tensors: Mapping[str, Tensor], draft: Draft
) -> Tensor | None:
    """Divide the rows of the linear layer in front; return the scale that was really folded.

    None where its own scales cannot hold it. Its bias may have been corrected in the meantime.
    """
    rows = collapse_heads(scale, plan.repeat, plan.head_dim)
    weight_name, bias_name = f"{plan.module}.weight", f"{plan.module}.bias"
    bias = draft.dense.get(bias_name, tensors.get(bias_name))
    layer = draft.layers.get(plan.module)
    if layer is None:
        weight, bias = fold_into_dense(tensors[weight_name], bias, rows)
        draft.dense[weight_name] = weight
    else:
        folded = fold_into_layer(layer, rows)
        if folded is None:
            return None
        draft.replay.setdefault(f"scale:{plan.module}", layer.scale)
        draft.layers[plan.module], rows = folded
        bias = None if bias is None else fold_into_bias(bias, rows)
    if bias is not None:
        draft.dense[bias_name] = bias
    return expand_heads(rows, plan.repeat, plan.head_dim)
