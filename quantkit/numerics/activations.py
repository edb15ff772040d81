"""How a server rounds the input of a linear layer, emulated: round, and give back what is left.

The arithmetic is that of compressed-tensors 0.17, which transformers runs: scales, quotients and
products are in the dtype of the input. Symmetric eight bits throughout: codes in [-128, 127] with a
scale of absmax / 127.5, or float8_e4m3fn with a scale of absmax / 448. Kernels differ from it in
the last bits only (vLLM's divide by 127 and keep float32 scales).

Shapes: S tokens, I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.schemes import BLOCK_SIZE, Activations, Scheme

LARGEST_CODE = {"int": 127.5, "float": 448.0}
"""What absmax is divided by for a scale: half the width of the range of codes."""


def round_inputs(inputs: Tensor, scheme: Scheme, scale: Tensor | None = None) -> Tensor:
    """Return what remains of `inputs` [..., I] after the rounding that `scheme` asks for.

    Args:
        inputs: in a floating dtype; not changed.
        scale: [1], for schemes with static activations; cast to the input's dtype, as loading a
            model in that dtype does.

    Returns:
        The rounded inputs, or `inputs` itself where the scheme leaves them in 16 bits.

    Raises:
        ValueError: a static scheme without a scale, or a dynamic one with a scale; a scheme in
            blocks whose 128 columns do not divide I.
    """
    activations = scheme.activations
    if activations is None:
        return inputs
    if activations.dynamic == (scale is not None):
        raise ValueError(f"scheme {scheme.name}: only static activations have a scale of their own")
    if scale is not None:
        return _round(inputs, scale.to(inputs.dtype), activations)
    if scheme.granularity != "block" or inputs.shape[-1] < BLOCK_SIZE:
        return _round(inputs, choose_input_scale(inputs, activations), activations)
    if inputs.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"blocks of {BLOCK_SIZE} columns do not divide {inputs.shape[-1]}")
    grouped = inputs.unflatten(-1, (-1, BLOCK_SIZE))
    return _round(grouped, choose_input_scale(grouped, activations), activations).flatten(-2)


def choose_input_scale(inputs: Tensor, activations: Activations) -> Tensor:
    """Return the scale [..., 1] of each row of `inputs` [..., I], in its dtype.

    The scale of a row of zeros is the dtype's epsilon: its codes are zeros all the same.
    """
    scale = inputs.abs().amax(-1, keepdim=True) / LARGEST_CODE[activations.kind]
    smallest = torch.full_like(scale, torch.finfo(scale.dtype).eps)
    return torch.where(scale == 0, smallest, scale)


def scale_from_absmax(absmax: Tensor, activations: Activations, dtype: torch.dtype) -> Tensor:
    """Return the scale [1] in `dtype` of a static input whose largest magnitude is `absmax` []."""
    limits = torch.finfo(dtype)
    scale = absmax.float().reshape(1) / LARGEST_CODE[activations.kind]
    scale = torch.where(scale == 0, torch.full_like(scale, limits.eps), scale)
    return scale.clamp(limits.smallest_normal, limits.max).to(dtype)


def _round(inputs: Tensor, scale: Tensor, activations: Activations) -> Tensor:
    scaled = inputs / scale
    if activations.kind == "float":
        largest = LARGEST_CODE["float"]
        codes = scaled.clamp_(-largest, largest).to(torch.float8_e4m3fn).to(inputs.dtype)
    else:
        codes = scaled.clamp_(-128, 127).round_()
    return codes.mul_(scale)
