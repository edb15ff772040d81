"""Scales of an FP8 key/value cache: one for K and one for V a layer, or one a key/value head.

A server writes x / scale to its cache, cast to float8_e4m3fn (at most 448 in magnitude), and reads
the code times the scale. A scale that is too small clips, which is never worth it: clipped values
cost more than they save (vLLM's measurements in PRs 19292 and 54705). One that is larger than
needed costs nothing until values become subnormal, 15 octaves below the largest. So scales keep
some room above the largest magnitude of the calibration data, and within the octave above that the
scale of the keys takes the position at which they are rounded best.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.numerics.fp8 import LARGEST
from quantkit.numerics.octaves import place_scale
from quantkit.records import KvRecord, KvStats

HEADROOM = 1.25
"""Room above the largest magnitude of the calibration data, at the least: tokens to come reached
1.17 times that of a small calibration."""


def choose_kv_scales(
    attention: str, stats: KvStats, *, per_head: bool, scale_dtype: torch.dtype
) -> tuple[Mapping[str, Tensor], KvRecord]:
    """Choose the scales of one attention layer's keys and values.

    Args:
        attention: full name of the attention module.
        stats: of its keys and values.
        per_head: one scale a key/value head; otherwise one for K and one for V.
        scale_dtype: the dtype in which they are stored.

    Returns:
        Full tensor name -> scale, `<attention>.k_scale` and `.v_scale`: [1], or [kv_heads, 1, 1]
        per head, as vLLM and compressed-tensors read them; and the record of them.
    """
    key_scale = _choose(stats.key_absmax, stats.key_errors, per_head, scale_dtype)
    value_scale = _choose(stats.value_absmax, None, per_head, scale_dtype)
    scales = {f"{attention}.k_scale": key_scale, f"{attention}.v_scale": value_scale}
    key, value = (tuple(map(float, scale.flatten().tolist())) for scale in scales.values())
    record = KvRecord(
        name=attention,
        key_scale=key,
        value_scale=value,
        key_absmax=tuple(stats.key_absmax.amax(dim=1).tolist()),
        value_absmax=tuple(stats.value_absmax.amax(dim=1).tolist()),
    )
    return scales, record


def divide_values(stats: KvStats, fold: Tensor) -> KvStats:
    """Return the statistics with values divided by `fold`, float32 [kv_heads * head_dim].

    A scale that was folded out of o_proj's input divides the rows of v_proj in the artifact, and
    so what its cache holds, while calibration saw the values as they were.
    """
    value = stats.value_absmax / fold.reshape(stats.value_absmax.shape)
    return dataclasses.replace(stats, value_absmax=value)


def _choose(absmax: Tensor, errors: Tensor | None, per_head: bool, dtype: torch.dtype) -> Tensor:
    """Scales for magnitudes up to `absmax`, float32 [kv_heads, head_dim].

    Args:
        errors: float64 [8, kv_heads], the squared errors at each position of the octave.
    """
    heads = absmax.amax(dim=1).double()
    largest = heads.amax()
    # A head (or layer) that calibration never moved: as its neighbours, or as if it reached 1.
    usual = largest if largest > 0 else torch.ones_like(largest)
    wanted = heads.where(heads > 0, usual) if per_head else usual.reshape(1)
    scale = wanted * HEADROOM / LARGEST
    if errors is not None:
        positions = errors if per_head else errors.sum(dim=1, keepdim=True)
        scale = place_scale(scale, positions.argmin(dim=0))
    rounded = _round(scale.cpu(), dtype)
    return rounded.reshape(-1, 1, 1) if per_head else rounded


def _round(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round positive scales to `dtype`, within its normal range and beside exactly 1.

    A unit scale is what servers put in the place of a missing one: stored, it would look like it.
    The headroom is wider than what rounding down takes away.
    """
    limits = torch.finfo(dtype)
    rounded = scale.clamp(limits.smallest_normal, limits.max).to(dtype)
    return torch.where(rounded == 1, rounded + limits.eps, rounded)
