"""Choose the codes of an encoder's linear layers and embeddings.

Shapes: O output features, I input features, V rows of a table, S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from quantkit.encoders.inputs import (
    GroupInput,
    add_noise,
    choose_input,
    divide,
    layer_stats,
    round_sample,
    whole_range,
)
from quantkit.encoders.sensitivity import FloatChoice, choose_float_layers
from quantkit.encoders.simulation import find_grid
from quantkit.errors import CalibrationError
from quantkit.numerics.affine import dequantize_layer
from quantkit.recipe import AUTO, CalibrationSpec, ExportSpec
from quantkit.records import (
    Event,
    GroupPlan,
    LayerRecord,
    LayerStats,
    LinearPlan,
    Progress,
)
from quantkit.records.encoders import (
    EncoderLayer,
    EncoderPlan,
    EncoderTable,
    InputStats,
    SolvedEncoder,
    TextRows,
)
from quantkit.schemes import METHODS, SCHEMES
from quantkit.solvers import (
    Solution,
    correct_bias,
    measure_weights,
    output_energy,
    solve_group,
)

REDUCED_BITS = 7
"""Bits of a weight for CPUs that add products of pairs in 16 bits."""


def solve_encoder(
    model: nn.Module,
    plan: EncoderPlan,
    stats: Mapping[str, InputStats] | None,
    rows: TextRows | None,
    export: ExportSpec,
    calibration: CalibrationSpec | None,
    tell: Progress,
) -> SolvedEncoder:
    """Quantize the layers and tables of `plan`.

    Args:
        model: float32; as it was before when this returns.
        stats: of `observe`; None where no method looks at statistics and no scheme is static.
        rows: the calibration texts, on which layers' sensitivity is measured; None: not measured.
        export: float_layers and reduce_range are followed.
        calibration: how the ranges of static inputs are chosen.
        tell: called after each group.

    Raises:
        CalibrationError: a layer needs statistics and there are none, or the input or the weight
            of a layer is not finite; or `float_layers` asks for a measurement and there is no text.
    """
    groups = [group for group in plan.groups if group.quantized]
    layers: list[EncoderLayer] = []
    records: list[LayerRecord] = []
    for number, group in enumerate(groups):
        name = group.linears[0].name
        tell(Event("solve", number, len(groups), name))
        known = None if stats is None else stats.get(name)
        found = _solve_group(model, group, known, export, calibration)
        layers += [layer for layer, _ in found]
        records += [record for _, record in found]
    tell(Event("solve", len(groups), len(groups)))
    tables = tuple(_round_table(model, name) for name in plan.tables)
    choice = _choose_float_layers(model, plan, layers, tables, rows, export, tell)
    kept = frozenset(choice.layers)
    return SolvedEncoder(
        layers=tuple(layer for layer in layers if layer.name not in kept),
        tables=tables,
        records=tuple(record for record in records if record.name not in kept),
        float_layers=choice.layers,
        notes=choice.notes,
    )


def _choose_float_layers(
    model: nn.Module,
    plan: EncoderPlan,
    layers: Sequence[EncoderLayer],
    tables: Sequence[EncoderTable],
    rows: TextRows | None,
    export: ExportSpec,
    tell: Progress,
) -> FloatChoice:
    wanted = export.float_layers
    if wanted == 0 or not layers:
        return FloatChoice((), ())
    if rows is None:
        if wanted == AUTO:
            note = "no calibration texts: which layers should stay in float was not measured"
            return FloatChoice((), (note,))
        raise CalibrationError(
            f"float_layers {wanted}: the most sensitive layers are measured on calibration texts, "
            f"and there are none; give calibration.data, or name the layers in quantize.ignore"
        )
    return choose_float_layers(model, plan.info, layers, tables, rows, wanted, tell)


def _round_table(model: nn.Module, name: str) -> EncoderTable:
    """Round each row of an embedding to nearest."""
    weight = model.get_submodule(name).get_parameter("weight").detach().float()
    _require_finite(weight, name)
    scale = weight.abs().amax(dim=1) / 127
    # Rows of zeros have codes of zeros.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (weight / scale.unsqueeze(1)).round_().clamp_(-127, 127)
    return EncoderTable(name, codes.to(torch.int8), scale)


def _solve_group(
    model: nn.Module,
    group: GroupPlan,
    stats: InputStats | None,
    export: ExportSpec,
    calibration: CalibrationSpec | None,
) -> list[tuple[EncoderLayer, LayerRecord]]:
    """Quantize the layers of a group that have a scheme: they share scheme and input."""
    linears = [linear for linear in group.linears if linear.quantized]
    weights = [_weight_of(model, linear.name) for linear in linears]
    _check(linears, stats)
    if export.reduce_range:
        narrow = replace(linears[0].scheme, weight_bits=REDUCED_BITS)
        linears = [replace(linear, scheme=narrow) for linear in linears]
    rounding = choose_input(linears, weights, stats, calibration)
    scaled, moved = weights, stats
    if rounding.smoothing is not None and stats is not None:
        scaled = [weight * rounding.smoothing for weight in weights]
        moved = divide(stats, rounding.smoothing)
    known = None if moved is None else layer_stats(moved)
    noisy = known if moved is None or known is None else add_noise(known, moved, rounding)
    solutions = solve_group(scaled, noisy, linears, torch.float32)
    found = []
    for linear, weight, solution in zip(linears, scaled, solutions, strict=True):
        layer = _make_layer(model, linear, group, solution, weight, moved, rounding)
        record = _record(linear, solution, weight, known, moved, rounding)
        plain = _measure_plainly(linear, weights[linears.index(linear)], stats)
        found.append(
            (
                layer,
                replace(
                    record,
                    rtn_relative_error=plain[0],
                    rtn_activation_error=plain[1],
                    bias_corrected=layer.bias is not None,
                ),
            )
        )
    return found


def _weight_of(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).get_parameter("weight").detach().float()
    _require_finite(weight, name)
    return weight


def _require_finite(weight: Tensor, name: str) -> None:
    if not bool(weight.isfinite().all()):
        raise CalibrationError(f"the weight of {name} is not finite: check the checkpoint")


def _check(linears: Sequence[LinearPlan], stats: InputStats | None) -> None:
    """Refuse to solve without what the layers need."""
    needing = [linear for linear in linears if linear.needs_statistics]
    if needing and stats is None:
        raise CalibrationError(
            f"{needing[0].name}: {needing[0].scheme.name} with method {needing[0].method.name} "
            f"needs calibration texts; give calibration.data, or use scheme w8a8 with method rtn"
        )
    if stats is not None and not bool(stats.second_moment.diagonal().isfinite().all()):
        raise CalibrationError(
            f"the input of {linears[0].name} is not finite on the calibration texts: the model "
            f"overflows on them, so check the checkpoint"
        )


def _make_layer(
    model: nn.Module,
    linear: LinearPlan,
    group: GroupPlan,
    solution: Solution,
    weight: Tensor,
    stats: InputStats | None,
    rounding: GroupInput,
) -> EncoderLayer:
    """Return the codes with all that the graph needs to know of them."""
    input_scale, zero_point = None, None
    if rounding.static and rounding.low is not None and rounding.high is not None:
        grid = find_grid(rounding.low, rounding.high)
        input_scale, zero_point = float(grid[0]), int(grid[1])
    bias = None
    if linear.has_bias and linear.method.needs_calibration and stats is not None:
        own = model.get_submodule(linear.name).get_parameter("bias").detach().float()
        shift = torch.zeros_like(stats.mean)
        if len(stats.sample):
            shift = (round_sample(stats, rounding) - stats.sample).mean(dim=0)
        decoded = dequantize_layer(solution.layer)
        bias = correct_bias(own, weight, decoded, stats.mean, stats.mean + shift)
    return EncoderLayer(
        name=linear.name,
        group=group.linears[0].name,
        codes=solution.layer.codes,
        scale=solution.layer.scale.reshape(-1).float(),
        smoothing=rounding.smoothing,
        bias=bias,
        input_scale=input_scale,
        input_zero_point=zero_point,
        clip=rounding.clip,
    )


def _record(
    linear: LinearPlan,
    solution: Solution,
    weight: Tensor,
    known: LayerStats | None,
    stats: InputStats | None,
    rounding: GroupInput,
) -> LayerRecord:
    decoded = dequantize_layer(solution.layer)
    errors = _errors(weight, decoded, known, stats, rounding)
    choice = rounding.choice
    size = solution.layer.codes.numel()
    return LayerRecord(
        name=linear.name,
        scheme=linear.scheme.name,
        group_size=None,
        method=linear.method.name,
        bits_per_weight=(8 * size + 32 * len(weight)) / size,
        relative_error=errors[0],
        rtn_relative_error=None,
        weight_error=measure_weights(weight, decoded),
        damping=solution.damping,
        smoothing_exponent=None if choice is None else choice.exponent,
        activation_error=errors[1],
        fallback="; ".join(filter(None, (rounding.fallback, solution.fallback))) or None,
    )


def _errors(
    weight: Tensor,
    decoded: Tensor,
    known: LayerStats | None,
    stats: InputStats | None,
    rounding: GroupInput,
) -> tuple[float | None, float | None]:
    """Return the relative output error of rounded weights, and of rounded inputs and weights."""
    if known is None or stats is None:
        return None, None
    lost = _share(output_energy(decoded - weight, known), output_energy(weight, known))
    if not len(stats.sample):
        return lost, None
    output = stats.sample @ weight.T
    error = output - round_sample(stats, rounding) @ decoded.T
    energies = [float(each.double().square().sum()) for each in (error, output)]
    return lost, _share(energies[0], energies[1])


def _share(part: float, whole: float) -> float:
    """Nothing of nothing is 0."""
    return part / whole if whole > 0 else float(part > 0)


def _measure_plainly(
    linear: LinearPlan, weight: Tensor, stats: InputStats | None
) -> tuple[float | None, float | None]:
    """Return both errors of plain rounding without smoothing, to compare with."""
    if stats is None:
        return None, None
    scheme = SCHEMES[linear.scheme.name]
    plain = replace(linear, method=METHODS["rtn"], scheme=scheme)
    decoded = dequantize_layer(solve_group([weight], None, [plain], torch.float32)[0].layer)
    rounding = GroupInput(None, *whole_range(stats), static=False)
    return _errors(weight, decoded, layer_stats(stats), stats, rounding)
