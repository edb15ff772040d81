"""Round the weights of one input group, and say how well it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.blocks.draft import Draft
from quantkit.blocks.folding import Fold, fold_input
from quantkit.errors import CalibrationError
from quantkit.numerics.activations import scale_from_absmax
from quantkit.numerics.affine import dequantize_layer
from quantkit.ranks import Ranks, from_first
from quantkit.records import GroupPlan, LayerRecord, LayerStats, LinearPlan, QuantizedLayer
from quantkit.schemes import METHODS
from quantkit.solvers import (
    Solution,
    add_input_noise,
    choose_input_scale,
    correct_bias,
    follow_drift,
    measure_weights,
    output_energy,
    output_error,
    scale_stats,
    shift_of_mean,
    solve_group,
)


def solve_input_group(
    group: GroupPlan,
    stats: LayerStats | None,
    tensors: Mapping[str, Tensor],
    draft: Draft,
    scale_dtype: torch.dtype,
    fishers: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    spent: bool = False,
) -> dict[str, Tensor]:
    """Solve the quantized layers of a group and add them to `draft`.

    Args:
        group: the layers and what stands in front of them.
        stats: of their input; None for methods that need no calibration.
        tensors: the block's tensors as the checkpoint has them.
        draft: changed in place.
        scale_dtype: dtype of the scales in the artifact.
        fishers: layer name -> Fisher matrix float32 [O, B], where they were measured; a fold does
            not change them, as a layer is solved before a later fold divides its output.
        spent: whether `stats` are of no use afterwards, and may be changed in place.

    Returns:
        Full tensor name -> the float32 tensor that takes its place in the walk: a weight [O, I],
        or a bias [O] that was corrected.

    Raises:
        CalibrationError: no calibration token reached a layer whose scheme stores a scale of its
            input.
    """
    linears = [linear for linear in group.linears if linear.quantized]
    weights = [tensors[f"{linear.name}.weight"].float() for linear in linears]
    energies = [None if stats is None else output_energy(weight, stats) for weight in weights]
    targets = None if stats is None else follow_drift(weights, stats)
    if targets is not None:
        weights = choose_targets(linears, weights, targets)
    fold = fold_input(group, linears, weights, stats, tensors, draft, scale_dtype)
    plain = [_Errors()] * len(linears)
    if stats is not None and (fold.scale is not None or _round_inputs(linears)):
        # Before the weights are scaled; elsewhere the solutions bring theirs along.
        plain = _errors_of_plain_rounding(weights, stats, linears, scale_dtype)
    if stats is not None and fold.scale is not None:
        weights = [weight * fold.scale for weight in weights]
        stats = scale_stats(stats, fold.scale, spent=spent)
        draft.replay[f"fold:{linears[0].name}"] = fold.scale
    live = {}
    solutions = _solve(weights, stats, linears, scale_dtype, fishers, draft.ranks)
    for linear, weight, energy, rtn, solution in zip(
        linears, weights, energies, plain, solutions, strict=True
    ):
        decoded = dequantize_layer(solution.layer)
        errors = _measure(solution, weight, decoded, stats)
        bias = _correct_bias(linear, solution, weight, decoded, stats, tensors)
        record = _record(linear, solution, fold, energy, errors, rtn)
        weight_error = measure_weights(weight, decoded)
        draft.layers[linear.name] = solution.layer
        draft.records.append(
            replace(
                record,
                weight_error=weight_error,
                bias_corrected=bias is not None,
                coupled=linear.name in fishers
                and linear.method.rounder == "gptq"
                and not linear.one_scale,
                followed_drift=targets is not None and linear.method.needs_calibration,
            )
        )
        live[f"{linear.name}.weight"] = decoded if fold.scale is None else decoded / fold.scale
        if bias is not None:
            # As stored: a later fold may divide the artifact's, and the walk's stays as it is.
            draft.dense[f"{linear.name}.bias"] = bias
            draft.replay[f"bias:{linear.name}"] = bias.clone()
            live[f"{linear.name}.bias"] = bias.float()
    return live


def choose_targets(
    linears: Sequence[LinearPlan], weights: Sequence[Tensor], targets: Sequence[Tensor]
) -> list[Tensor]:
    """Return what each weight is rounded to: plain rounding takes it as it is."""
    return [
        target if linear.method.needs_calibration else weight
        for linear, weight, target in zip(linears, weights, targets, strict=True)
    ]


def _round_inputs(linears: Sequence[LinearPlan]) -> bool:
    return any(linear.scheme.activations is not None for linear in linears)


def _solve(
    weights: Sequence[Tensor],
    stats: LayerStats | None,
    linears: Sequence[LinearPlan],
    scale_dtype: torch.dtype,
    fishers: Mapping[str, Tensor],
    ranks: Ranks,
) -> list[Solution]:
    """Solve the layers scheme by scheme, each for the input as its scheme rounds it."""
    solutions: dict[str, Solution] = {}
    for scheme in dict.fromkeys(linear.scheme for linear in linears):
        members = [index for index, linear in enumerate(linears) if linear.scheme == scheme]
        parts = [weights[index] for index in members]
        plans = [linears[index] for index in members]
        input_scale, noisy = None, stats
        if scheme.static:
            input_scale = _choose_input_scale(parts, stats, plans[0], scale_dtype, ranks)
        if stats is not None:
            noisy = add_input_noise(stats, scheme, input_scale)
        for solution in solve_group(parts, noisy, plans, scale_dtype, fishers, ranks):
            # Each its own: a file of tensors holds none twice.
            own = None if input_scale is None else input_scale.clone()
            layer = replace(solution.layer, input_scale=own)
            if noisy is not stats:
                # What it says of its losses is for an input with noise.
                solution = replace(solution, loss=None, plain_loss=None)
            solutions[layer.name] = replace(solution, layer=layer)
    return [solutions[linear.name] for linear in linears]


def _choose_input_scale(
    weights: Sequence[Tensor],
    stats: LayerStats | None,
    linear: LinearPlan,
    scale_dtype: torch.dtype,
    ranks: Ranks,
) -> Tensor:
    """Return the scale [1] of an input that these layers share."""
    if stats is None or stats.tokens == 0:
        raise CalibrationError(
            f"no calibration token reached {linear.name}, and {linear.scheme.name} stores a scale "
            f"of its input: use more calibration data, or a scheme with dynamic activations"
        )
    joined = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    return from_first(ranks, lambda: choose_input_scale(joined, stats, linear.scheme, scale_dtype))


@dataclass(frozen=True)
class _Errors:
    """loss: tr(E H E^T). activation: relative output error with rounded inputs, on the sample."""

    loss: float | None = None
    activation: float | None = None


def _errors_of_plain_rounding(
    weights: Sequence[Tensor],
    stats: LayerStats,
    linears: Sequence[LinearPlan],
    scale_dtype: torch.dtype,
) -> list[_Errors]:
    """Errors of rtn on the untransformed weights, to compare with."""
    plans = [replace(linear, method=METHODS["rtn"]) for linear in linears]
    errors = []
    for weight, solution in zip(
        weights, solve_group(weights, None, plans, scale_dtype), strict=True
    ):
        layer = solution.layer
        if layer.scheme.static and layer.scheme.activations and stats.absmax is not None:
            largest = stats.absmax.amax()
            scale = scale_from_absmax(largest, layer.scheme.activations, scale_dtype)
            solution = replace(solution, layer=replace(layer, input_scale=scale))
        errors.append(_measure(solution, weight, dequantize_layer(layer), stats))
    return errors


def _measure(
    solution: Solution, weight: Tensor, decoded: Tensor, stats: LayerStats | None
) -> _Errors:
    """Return the errors of a solved layer."""
    if stats is None:
        return _Errors(solution.loss)
    loss, scheme = solution.loss, solution.layer.scheme
    if loss is None:
        loss = output_energy(decoded - weight, stats)
    if scheme.activations is None or stats.sample is None:
        return _Errors(loss)
    scale = solution.layer.input_scale
    return _Errors(loss, output_error(stats.sample, weight, decoded, scheme, scale))


def _correct_bias(
    linear: LinearPlan,
    solution: Solution,
    weight: Tensor,
    decoded: Tensor,
    stats: LayerStats | None,
    tensors: Mapping[str, Tensor],
) -> Tensor | None:
    """Return the layer's bias with the mean output error taken up; None where there is none."""
    bias = tensors.get(f"{linear.name}.bias")
    if bias is None or stats is None or stats.mean is None or stats.tokens == 0:
        return None
    shift = shift_of_mean(stats, linear.scheme, solution.layer.input_scale)
    return correct_bias(bias, weight, decoded, stats.mean, stats.mean + shift)


def _record(
    linear: LinearPlan,
    solution: Solution,
    fold: Fold,
    energy: float | None,
    errors: _Errors,
    plain: _Errors,
) -> LayerRecord:
    """Return the layer's record, but for what is known of its weight and bias alone."""
    rtn_loss = next(
        (loss for loss in (plain.loss, solution.plain_loss, errors.loss) if loss is not None), None
    )
    unscaled = fold.fallback if linear.method.transform is not None else None
    notes = [note for note in (unscaled, solution.fallback) if note]
    return LayerRecord(
        name=linear.name,
        scheme=linear.scheme.name,
        group_size=linear.group_size,
        method=linear.method.name,
        bits_per_weight=_bits_per_weight(linear, solution.layer),
        relative_error=relative_loss(errors.loss, energy),
        rtn_relative_error=relative_loss(rtn_loss, energy),
        weight_error=0.0,
        damping=solution.damping,
        awq_exponent=fold.exponent if fold.transform == "awq" else None,
        smoothing_exponent=fold.exponent if fold.transform == "smoothquant" else None,
        activation_error=errors.activation,
        rtn_activation_error=plain.activation,
        fallback="; ".join(notes) or None,
    )


def _bits_per_weight(linear: LinearPlan, layer: QuantizedLayer) -> float:
    """Bits of codes, scales and zero points for each weight of the layer."""
    bits = layer.codes.numel() * linear.scheme.weight_bits
    bits += 8 * layer.scale.numel() * layer.scale.element_size()
    if layer.zero_point is not None:
        bits += layer.zero_point.numel() * linear.scheme.weight_bits
    if layer.input_scale is not None:
        bits += 8 * layer.input_scale.numel() * layer.input_scale.element_size()
    return bits / layer.codes.numel()


def relative_loss(loss: float | None, energy: float | None) -> float | None:
    """Loss relative to the output; nothing to nothing is 0."""
    if loss is None or energy is None:
        return None
    return loss / energy if energy > 0 else float(loss > 0)
