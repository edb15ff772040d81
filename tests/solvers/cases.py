"""Weights, statistics and plans for the solver tests; slow, obvious float64 losses."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from quantkit.numerics.affine import decode, dequantize, quantize
from quantkit.records import LayerStats, LinearPlan
from quantkit.schemes import EFFORTS, METHODS, SCHEMES, Scheme

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
INTEGER_SCHEMES = ("w4a16", "w4a16_asym", "w8a16")
NORMAL = EFFORTS["normal"]
SETTINGS = (
    ("w4a16", 32),
    ("w4a16_asym", 32),
    ("w4a16_asym", None),
    ("w4a16", 160),
    ("w8a16", 32),
    ("w8a8", None),
    ("fp8_dynamic", None),
    ("fp8_block", None),
)
"""Schemes and group sizes that differ in how they are rounded, for 160 columns."""
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
schemes = st.sampled_from([SCHEMES[name] for name in INTEGER_SCHEMES])
group_sizes = st.sampled_from((32, 64, None))
dtypes = st.sampled_from((torch.bfloat16, torch.float16))
"""What searches for scales are tested with."""


def make_weight(rows: int, columns: int, seed: int) -> Tensor:
    """Heavy-tailed weights float32 [rows, columns] of the size that trained layers have."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(0.03 * generator.standard_t(5, (rows, columns))).float()


def make_moment(columns: int, seed: int, tokens: int | None = None) -> Tensor:
    """Second moment float32 [columns, columns] of correlated inputs with uneven channels."""
    generator = np.random.default_rng(seed)
    tokens = 8 * columns if tokens is None else tokens
    mixing = generator.standard_normal((columns, columns)) / np.sqrt(columns)
    channels = np.exp(generator.standard_normal(columns))
    inputs = (generator.standard_normal((tokens, columns)) @ (mixing + np.eye(columns))) * channels
    return torch.from_numpy(inputs.T @ inputs / tokens).float()


def make_plan(
    name: str,
    weight: Tensor,
    method: str = "gptq",
    scheme: str = "w4a16",
    group_size: int | None = 32,
) -> LinearPlan:
    """A plan for one linear layer with this weight."""
    rows, columns = weight.shape
    return LinearPlan(name, rows, columns, False, SCHEMES[scheme], group_size, METHODS[method])


def exact_losses(error: Tensor, moment: Tensor) -> Tensor:
    """e H e^T of each row of `error` [O, I], in float64."""
    wide, matrix = error.double(), moment.double()
    return torch.einsum("oi,ij,oj->o", wide, matrix, wide)


def error_in_units(weight: Tensor, found: tuple[Tensor, Tensor | None], scheme: Scheme) -> Tensor:
    """Rounding errors [O, I] in float64, relative to the largest weight of the row."""
    codes = quantize(weight, *found, scheme)
    error = dequantize(codes, *found).double() - weight.double()
    return error / weight.double().abs().amax(1, keepdim=True).clamp(min=1e-45)


def assert_not_worse(
    weight: Tensor,
    scheme: Scheme,
    stats: LayerStats,
    before: tuple[Tensor, Tensor, Tensor | None],
    after: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """Each row's e H e^T, or the sum over all rows where they share scales, has not grown.

    Args:
        before, after: codes, scale and zero point. There are no more rows than share a scale.
    """
    largest = weight.double().abs().amax(1, keepdim=True)
    if scheme.granularity == "block":
        largest = largest.amax().expand_as(largest)
    largest = largest.clamp(min=1e-45)
    errors = [(decode(*each, scheme).double() - weight) / largest for each in (before, after)]
    old, new = (exact_losses(error, stats.second_moment) for error in errors)
    resolution = 1e-5 * errors[0].square().sum(1) * stats.second_moment.diagonal().sum()
    if scheme.granularity == "block":
        old, new, resolution = old.sum(), new.sum(), resolution.sum()
    assert bool(errors[1].isfinite().all())
    assert bool((new <= old + resolution).all())


@st.composite
def hard_weights(draw: st.DrawFn, rows: int, columns: int) -> Tensor:
    """Weights [rows, columns] with zero, constant, huge, denormal and lopsided rows among them."""
    weight = make_weight(rows, columns, draw(st.integers(0, 99)))
    kinds = ("plain", "zero", "constant", "huge", "large", "mixed", "denormal")
    kinds += ("positive", "one", "negative")
    for row in range(rows):
        kind = draw(st.sampled_from(kinds))
        if kind == "zero":
            weight[row] = 0.0
        elif kind == "constant":
            weight[row] = draw(st.sampled_from((0.25, -3.0, 1e-6)))
        elif kind == "huge":
            weight[row] = weight[row].sign() * 3e38
        elif kind == "large":
            weight[row] *= 1e30
        elif kind == "mixed":
            # Groups that are nothing beside each other.
            weight[row] *= 1e30
            weight[row, columns // 2 :] = draw(st.sampled_from((0.0, 1e-38)))
        elif kind == "denormal":
            weight[row] *= 1e-41
        elif kind == "positive":
            weight[row] = weight[row].abs() + 1.0
        elif kind == "negative":
            weight[row] = -weight[row].abs()
        elif kind == "one":
            weight[row] = 0.0
            weight[row, draw(st.integers(0, columns - 1))] = 5.0
    return weight


@st.composite
def hard_stats(draw: st.DrawFn, columns: int) -> LayerStats:
    """Second moments: well-behaved, rank-deficient, with dead or dominant channels, zero, tiny."""
    kind = draw(st.sampled_from(("plain", "few", "dead", "dominant", "zero", "tiny", "vast")))
    seed = draw(st.integers(0, 99))
    tokens = columns // 4 if kind == "few" else 8 * columns
    moment = make_moment(columns, seed, tokens)
    if kind == "dead":
        moment[::3] = 0.0
        moment[:, ::3] = 0.0
    elif kind == "dominant":
        moment[3] *= 1e3
        moment[:, 3] *= 1e3
    elif kind in ("zero", "tiny", "vast"):
        moment *= {"zero": 0.0, "tiny": 1e-12, "vast": 1e12}[kind]
    return LayerStats(moment, tokens)
