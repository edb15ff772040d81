"""Calibration data, statistics, codes: what travels while a model is quantized.

Shapes: O output features, I input features, G groups along I, N windows, T tokens of a window,
S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantkit.schemes import Scheme

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class TokenWindows:
    """Windows of token ids, and which of their tokens count.

    ids: int64 [N, T]. weights: float32 [N, T], 0 where a token must not count (for instance
    outside of assistant turns), else 1.
    """

    ids: np.ndarray
    weights: np.ndarray
    source: str
    sha256: str
    """Hash of the ids, the weights and the shape: same hash, same calibration."""
    notes: tuple[str, ...] = ()
    """What the data doctor found and did not refuse."""
    domains: np.ndarray | None = None
    """int16 [N, T]: which of `domain_names` the text of a token is of; None: not asked for."""
    domain_names: tuple[str, ...] = ()
    numbers: np.ndarray | None = None
    """int64 [N], the windows' numbers in the data; None: they are in its order."""


@dataclass(frozen=True)
class LayerStats:
    """What calibration knows about one input.

    second_moment: float32 [I, I], the mean over tokens of x x^T (weighted by the token weights).
    mean: float32 [I], the weighted mean. absmax: float32 [I], the largest |x| of a counted token.
    sample: float32 [S, I], counted tokens spread evenly over the calibration data, on which the
    rounding of activations is judged.
    drift: float32 [I, I], the weighted mean of (y - x) x^T, where y is what the same token brings
    in the original model; None where that was not followed. drift_sample: float32 [S, I], y - x of
    the tokens of `sample`.
    """

    second_moment: Tensor
    tokens: int
    """Tokens that counted."""
    mean: Tensor | None = None
    absmax: Tensor | None = None
    sample: Tensor | None = None
    drift: Tensor | None = None
    drift_sample: Tensor | None = None
    bfloat16: bool = False
    """Whether every activation was a bfloat16 value: then that is fast here, and precise enough
    for what only compares losses."""


@dataclass(frozen=True)
class KvStats:
    """What calibration knows about the keys and values of one attention layer, as a cache holds
    them: keys after the rotary embedding.

    key_absmax, value_absmax: float32 [kv_heads, head_dim], the largest magnitude over tokens.
    key_errors: float64 [8, kv_heads], the summed squared error of keys in FP8 for scales at each of
    eight positions within an octave.
    """

    key_absmax: Tensor
    value_absmax: Tensor
    tokens: int
    key_errors: Tensor | None = None


@dataclass(frozen=True)
class QuantizedLayer:
    """Codes, scales and zero points of one linear layer, in compressed-tensors' signed convention.

    codes: int8 or float8_e4m3fn [O, I]; scale: [O, G] in the artifact's scale dtype (already
    rounded to it), or [ceil(O/128), ceil(I/128)] for the granularity `block`; zero_point: int8
    [O, G], or None for symmetric schemes. The weight is `scale * (codes - zero_point)` with each
    scale repeated over what shares it. input_scale: [1] in the scale dtype, for schemes with
    static activations only.
    """

    name: str
    scheme: Scheme
    group_size: int | None
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    input_scale: Tensor | None = None


@dataclass(frozen=True)
class WeightForm:
    """In which form a custom solver is to bring the weight [O, I] of a layer.

    A weight is `scale * (code - zero_point)`, or `scale * code` for symmetric schemes, with each
    scale repeated over the `group_size` columns of a row that share it.
    """

    layer: str
    """Full name, for instance `model.layers.0.self_attn.q_proj`."""
    scheme: str
    """Its name in the recipe."""
    bits: int
    symmetric: bool
    """Whether there are no zero points."""
    group_size: int
    """Columns that share a scale: all I of a row where the scheme has one scale a row."""
    scale_dtype: torch.dtype
    """That the artifact stores scales in. Codes must be chosen for scales that are rounded to it.
    """

    @property
    def smallest_code(self) -> int:
        """The smallest code, and the smallest zero point."""
        return -(1 << (self.bits - 1))

    @property
    def largest_code(self) -> int:
        """The largest code, and the largest zero point."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class SolvedWeight:
    """What a custom solver returns, G being I / `WeightForm.group_size`.

    codes: int8 [O, I], from `smallest_code` to `largest_code`. scale: [O, G] in
    `WeightForm.scale_dtype`, finite and positive. zero_point: int8 [O, G] in the same range as the
    codes; None for symmetric schemes.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


@dataclass(frozen=True)
class LayerRecord:
    """How well one layer was solved; goes into evidence and reports."""

    name: str
    scheme: str
    group_size: int | None
    method: str
    bits_per_weight: float
    relative_error: float | None
    """tr(dW H dW^T) / tr(W H W^T): squared output error relative to the output, on the calibration
    tokens; None where no statistics were taken."""
    rtn_relative_error: float | None
    """The same for plain rounding of the untransformed weight, to compare with."""
    weight_error: float
    """||dW||^2 / ||W||^2."""
    damping: float | None = None
    """Fraction of mean(diag H) that was added before the inversion; None without an inversion."""
    awq_exponent: float | None = None
    """Exponent that the grid chose; None where no scale was folded for the weights' sake."""
    smoothing_exponent: float | None = None
    """Exponent of the activations' magnitude; None where no scale was folded for their sake."""
    activation_error: float | None = None
    """Squared output error relative to the output on sampled calibration tokens, with rounded
    activations and rounded weights; None where activations stay in 16 bits."""
    rtn_activation_error: float | None = None
    """The same for plain rounding without smoothing."""
    bias_corrected: bool = False
    """Whether the layer's bias took up the mean of the output error."""
    coupled: bool = False
    """Whether its rows were rounded under the Fisher matrix of its output."""
    followed_drift: bool = False
    """Whether it was rounded to a target that makes up for the layers before; errors are against
    that target."""
    fallback: str | None = None
    """Why the layer got something other than what was asked for, for instance `rtn: ...`."""
    file_type: str | None = None
    """The GGUF file that it is of, by its mix of types; None for the layer under its scheme."""


@dataclass(frozen=True)
class KvRecord:
    """The scales of one attention layer's key/value cache; goes into evidence and reports."""

    name: str
    """Full name of the attention module."""
    key_scale: tuple[float, ...]
    """One a layer or one a key/value head."""
    value_scale: tuple[float, ...]
    key_absmax: tuple[float, ...]
    """One a key/value head."""
    value_absmax: tuple[float, ...]


@dataclass(frozen=True)
class SolvedBlock:
    """All that the artifact needs of one block.

    dense: full tensor name -> tensor, for tensors that changed without being quantized (a folded
    norm or bias). added: the same for tensors that the checkpoint does not have (`k_scale` and
    `v_scale` of a quantized key/value cache). Every other tensor is copied from the checkpoint.
    """

    index: int
    layers: tuple[QuantizedLayer, ...]
    dense: Mapping[str, Tensor]
    records: tuple[LayerRecord, ...]
    replay: Mapping[str, Tensor] = field(default_factory=dict)
    """What the walk needs beside the codes to take this block's place in a resumed forward:
    `fold:<layer>` [I], the scale that was folded out of the input of the group that begins with the
    layer; `scale:<layer>` [O, G], a layer's scale before a later fold divided it;
    `smooth:<layer>` [I], what `fold:` is, for the layers of GGUF files."""
    added: Mapping[str, Tensor] = field(default_factory=dict)
    kv: KvRecord | None = None
    encoded: Mapping[str, Tensor] = field(default_factory=dict)
    """`<number of the GGUF file>:<full tensor name>` -> uint8 [O, row bytes], rows in the order of
    the checkpoint."""
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    """Full tensor name -> mean square of each input, float32 [I], where GGUF files are written."""
    divided: Mapping[str, Tensor] = field(default_factory=dict)
    """Full tensor name -> what its rows (or elements) are divided by in every GGUF file, float32
    [O]: the scale by which the columns of the encoded layers behind it were multiplied."""
