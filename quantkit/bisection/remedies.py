"""What can take the place of a unit's weights, and how many bytes it would take."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.bisection.folds import apply_scales
from quantkit.bisection.records import AGAIN, ORIGINAL, Form, Remedy, Unit
from quantkit.ggml_types import GGML_TYPES, GGUF
from quantkit.numerics.affine import decode
from quantkit.numerics.ggml import codec
from quantkit.planning.sizes import layer_bytes
from quantkit.records import LinearPlan
from quantkit.schemes import METHODS, SCHEMES
from quantkit.solvers.rtn import round_plainly

EIGHT_BITS: Mapping[str, Remedy] = {GGUF: "Q8_0"}
"""Format -> its eight bits, where they are not those of schemes."""
_USUAL_EIGHT_BITS: Remedy = "w8a16"


def eight_bits(written: str) -> Remedy:
    """Return what a layer with more bits gets first in a format."""
    return EIGHT_BITS.get(written, _USUAL_EIGHT_BITS)


def replace_tensor(unit: Unit, name: str, base: Tensor, remedy: Remedy) -> Tensor:
    """Return what a unit's tensor becomes.

    Args:
        name: full name; what is not the weight is restored in any case.
        base: float32, the original's.
    """
    restored = apply_scales(base, unit.scales)
    if remedy == ORIGINAL or not name.endswith(".weight") or restored.dim() != 2:
        return restored
    if remedy == AGAIN:
        return round_as(restored, unit.form)
    form = Form(remedy, 8, unit.form.group_size, 0)
    return round_as(restored, form)


def can_round(form: Form, columns: int) -> bool:
    """Whether weights with so many columns can be rounded plainly as a layer is stored."""
    if form.scheme in GGML_TYPES:
        return columns % GGML_TYPES[form.scheme].block == 0
    scheme = SCHEMES.get(form.scheme)
    if scheme is None or scheme.weight_kind == "none":
        return False
    return form.group_size is None or columns % form.group_size == 0


def round_as(weight: Tensor, form: Form) -> Tensor:
    """Return float32 [O, I] rounded to nearest as a layer is stored; unchanged where it is not
    known how."""
    if not can_round(form, weight.shape[1]):
        return weight
    if form.scheme in GGML_TYPES:
        kind = GGML_TYPES[form.scheme]
        return codec.decode(kind, codec.encode_rows(kind, weight, None))
    scheme = SCHEMES[form.scheme]
    group_size = form.group_size if scheme.grouped else None
    rounding = round_plainly(weight, scheme, group_size, torch.float32)
    return decode(rounding.codes, rounding.scale, rounding.zero_point, scheme)


def improves(unit: Unit, remedy: Remedy, shape: tuple[int, int]) -> bool:
    """Whether eight bits are more than what a unit has, and it can have them."""
    rounds_inputs = unit.form.activations is not None
    if unit.form.bits >= 8 and not rounds_inputs:
        return False
    return can_round(Form(remedy, 8, unit.form.group_size, 0), shape[1])


def count_bytes(unit: Unit, remedy: Remedy, shape: tuple[int, int], scale_dtype: str) -> int:
    """Return the bytes of a unit's weight under a remedy."""
    if remedy == AGAIN:
        return unit.form.size
    if remedy == ORIGINAL:
        return unit.plain_size if unit.quantized else unit.form.size
    if remedy in GGML_TYPES:
        return shape[0] * GGML_TYPES[remedy].row_bytes(shape[1])
    linear = LinearPlan(
        unit.name, *shape, False, SCHEMES[remedy], unit.form.group_size, METHODS["rtn"]
    )
    return layer_bytes(linear, scale_dtype)
