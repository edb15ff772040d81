"""An encoder as its INT8 graph computes it, in torch.

Inputs are rounded to unsigned 8 bits once for a group, codes are multiplied and summed as whole
numbers, and the sums meet the scales in float32. Sums are exact up to 2^24 and good to a part in
10^7 beyond. Shapes: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quantkit.records.encoders import EncoderLayer, EncoderTable

LARGEST_INPUT = 255
"""Largest code of an input; the smallest is 0."""


def find_grid(low: float | Tensor, high: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of the codes for a range, as DynamicQuantizeLinear takes them.

    Args:
        low, high: ends of the range, which is widened to hold zero.

    Returns:
        float32 []; the scale of an empty range is 1.
    """
    low = torch.as_tensor(low, dtype=torch.float32).clamp(max=0.0)
    high = torch.as_tensor(high, dtype=torch.float32).clamp(min=0.0)
    scale = (high - low) / LARGEST_INPUT
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, (-low / scale).clamp(0, LARGEST_INPUT).round()


def round_to_codes(inputs: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return codes less the zero point, whole numbers in float32, shaped as `inputs`."""
    codes = (inputs / scale).round_().add_(zero_point)
    return codes.clamp_(0, LARGEST_INPUT).sub_(zero_point)


def round_group_input(inputs: Tensor, layer: EncoderLayer) -> tuple[Tensor, Tensor]:
    """Return what a layer of a group multiplies its codes with, and the scale of it."""
    if layer.smoothing is not None:
        inputs = inputs * (1.0 / layer.smoothing.double()).float()
    if layer.input_scale is not None and layer.input_zero_point is not None:
        grid = torch.tensor(layer.input_scale), torch.tensor(float(layer.input_zero_point))
    else:
        if layer.clip is not None:
            inputs = inputs.clamp(*layer.clip)
        grid = find_grid(inputs.min(), inputs.max())
    return round_to_codes(inputs, *grid), grid[0]


@contextmanager
def simulated(
    model: nn.Module,
    layers: Sequence[EncoderLayer],
    tables: Sequence[EncoderTable] = (),
) -> Iterator[nn.Module]:
    """Let a model compute as the graph of `layers` and `tables` does, while in the context.

    Args:
        model: float32; as it was before when the context ends.
    """
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    kept: list[tuple[nn.Module, str, nn.Parameter | None]] = []

    def replace(module: nn.Module, leaf: str, values: Tensor | None) -> None:
        kept.append((module, leaf, getattr(module, leaf)))
        fresh = None if values is None else nn.Parameter(values, requires_grad=False)
        setattr(module, leaf, fresh)

    try:
        for table in tables:
            rows = table.codes.float() * table.scale.unsqueeze(1)
            replace(model.get_submodule(table.name), "weight", rows)
        for layer in layers:
            module = model.get_submodule(layer.name)
            own = dict(module.named_parameters(recurse=False)).get("bias")
            before, after = _watch(layer, own if layer.bias is None else layer.bias)
            replace(module, "weight", layer.codes.float())
            replace(module, "bias", None)
            hooks.append(module.register_forward_pre_hook(before))
            hooks.append(module.register_forward_hook(after))
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        for module, leaf, parameter in reversed(kept):
            setattr(module, leaf, parameter)


def _watch(
    layer: EncoderLayer, bias: Tensor | None
) -> tuple[
    Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]],
    Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor],
]:
    """Return what rounds a layer's input, and what makes its sums of codes its output."""
    scales: list[Tensor] = []

    def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        codes, scale = round_group_input(inputs[0], layer)
        scales.append(scale)
        return (codes,)

    def after(_module: nn.Module, _inputs: tuple[Tensor, ...], sums: Tensor) -> Tensor:
        output = sums * (scales.pop() * layer.scale)
        return output if bias is None else output + bias

    return before, after
