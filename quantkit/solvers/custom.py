"""Codes that a user's own solver chooses, looked at before anything is made of them.

Shapes: O output features, I input features, G groups along I.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import InputError, QuantkitError, is_out_of_memory
from quantkit.records import LayerStats, LinearPlan, SolvedWeight, WeightForm
from quantkit.schemes import Scheme, Solver
from quantkit.solvers.rounding import Rounding, measure_rows
from quantkit.solvers.rtn import round_plainly


def round_by(
    solver: Solver,
    weight: Tensor,
    stats: LayerStats | None,
    linear: LinearPlan,
    scale_dtype: torch.dtype,
) -> Rounding:
    """Let `solver` choose the codes of one layer.

    Args:
        solver: is given copies: of the weight, and where it needs them of the statistics.
        weight: float32 [O, I].
        stats: of the input; what the codes lose is measured on it.
        linear: the layer, under an integer scheme.
        scale_dtype: in which scales are stored.

    Raises:
        InputError: it raised something, or returned what is no weight of this form; the solver and
            the layer are named.
    """
    columns = weight.shape[1]
    form = WeightForm(
        layer=linear.name,
        scheme=linear.scheme.name,
        bits=linear.scheme.weight_bits,
        symmetric=linear.scheme.symmetric,
        group_size=linear.group_size or columns,
        scale_dtype=scale_dtype,
    )
    where = f"solver {linear.method.name.rpartition('+')[2]!r} at {linear.name}"
    # Solvers may optimize, which the walk's mode and its tensors would not let them.
    with torch.inference_mode(False), torch.enable_grad():
        given = _copy(stats) if solver.needs_statistics else None
        solved = _call(solver, weight.clone(), given, form, where)
    rounding = _read(solved, weight, form, where)
    if stats is None:
        return rounding
    return _measure(rounding, weight, linear, stats, scale_dtype)


def _call(
    solver: Solver, weight: Tensor, stats: LayerStats | None, form: WeightForm, where: str
) -> object:
    try:
        return solver.function(weight, stats, form)
    except QuantkitError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{where} failed: {words}") from error


def _copy(stats: LayerStats | None) -> LayerStats | None:
    """Return statistics that may be changed: other layers share them."""
    if stats is None:
        return None
    values = {each.name: getattr(stats, each.name) for each in dataclasses.fields(stats)}
    copies: dict[str, Any] = {
        name: value.clone() for name, value in values.items() if isinstance(value, Tensor)
    }
    return dataclasses.replace(stats, **copies)


def _read(solved: object, weight: Tensor, form: WeightForm, where: str) -> Rounding:
    """Return the codes of a solver as quantkit's own solvers return theirs.

    Raises:
        InputError: they are not of the form that was asked for.
    """
    if not isinstance(solved, SolvedWeight):
        raise InputError(
            f"{where} returned {_name(solved)}: return quantkit.SolvedWeight(codes, scale, "
            f"zero_point)"
        )
    rows, columns = weight.shape
    groups = (rows, columns // form.group_size)
    codes = _tensor(solved.codes, "codes", (rows, columns), torch.int8, where)
    _check_range(codes, "codes", form, where)
    scale = _tensor(solved.scale, "scale", groups, form.scale_dtype, where)
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise InputError(
            f"{where} returned scales that are not all finite and positive: the scale of a group "
            f"of zeros is 1"
        )
    if (solved.zero_point is None) != form.symmetric:
        wanted = "has no zero points: leave them out" if form.symmetric else "needs zero points"
        raise InputError(f"{where}: scheme {form.scheme} {wanted}")
    zero_point = None
    if solved.zero_point is not None:
        zero_point = _tensor(solved.zero_point, "zero_point", groups, torch.int8, where)
        _check_range(zero_point, "zero_point", form, where)
    device = weight.device
    return Rounding(
        codes.to(device),
        scale.to(device),
        None if zero_point is None else zero_point.to(device),
    )


def _tensor(
    value: object, name: str, shape: tuple[int, int], dtype: torch.dtype, where: str
) -> Tensor:
    """Return what a solver gave, without its history of gradients.

    Raises:
        InputError: it is no tensor of this shape and dtype.
    """
    if not isinstance(value, Tensor):
        raise InputError(f"{where} returned {_name(value)} as {name}, not a tensor")
    if tuple(value.shape) != shape or value.dtype != dtype:
        remedy = ""
        if value.dtype != dtype and value.is_floating_point() and dtype.is_floating_point:
            remedy = ": round it with .to(form.scale_dtype) before you choose codes"
        raise InputError(
            f"{where} returned {name} of {list(value.shape)} in {_short(value.dtype)}, not of "
            f"{list(shape)} in {_short(dtype)}{remedy}"
        )
    return value.detach().contiguous()


def _check_range(values: Tensor, name: str, form: WeightForm, where: str) -> None:
    lowest, highest = (int(bound) for bound in torch.aminmax(values))
    if lowest < form.smallest_code or highest > form.largest_code:
        raise InputError(
            f"{where} returned {name} from {lowest} to {highest}: {form.bits} bits reach from "
            f"{form.smallest_code} to {form.largest_code}"
        )


def _measure(
    rounding: Rounding,
    weight: Tensor,
    linear: LinearPlan,
    stats: LayerStats,
    scale_dtype: torch.dtype,
) -> Rounding:
    """Add what the codes lose, and what plain rounding would."""
    scheme: Scheme = linear.scheme
    plain = round_plainly(weight, scheme, linear.group_size, scale_dtype)
    moment, quick = stats.second_moment, stats.bfloat16
    return dataclasses.replace(
        rounding,
        losses=measure_rows(weight, scheme, moment, rounding, quick),
        plain_losses=measure_rows(weight, scheme, moment, plain, quick),
    )


def _name(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
