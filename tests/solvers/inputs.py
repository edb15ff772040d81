"""Inputs with outliers, and the statistics of them, for the tests of rounded activations."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from quantkit.records import LayerStats


def make_inputs(columns: int, seed: int, tokens: int = 192, outlier: float = 30.0) -> Tensor:
    """Correlated inputs float32 [tokens, columns] of which a few channels are much larger."""
    generator = np.random.default_rng(seed)
    mixing = np.eye(columns) + generator.standard_normal((columns, columns)) / np.sqrt(columns)
    inputs = generator.standard_normal((tokens, columns)) @ mixing
    inputs[:, :: columns // 4] *= outlier
    return torch.from_numpy(inputs).float()


def stats_of(inputs: Tensor) -> LayerStats:
    """The statistics that calibration would have of inputs [S, I], all of them sampled."""
    tokens = max(len(inputs), 1)
    return LayerStats(
        second_moment=inputs.T @ inputs / tokens,
        tokens=len(inputs),
        mean=inputs.sum(0) / tokens,
        absmax=inputs.abs().amax(0) if len(inputs) else torch.zeros(inputs.shape[1]),
        sample=inputs,
    )


@st.composite
def hard_inputs(draw: st.DrawFn, columns: int) -> Tensor:
    """Inputs: plain, none or one, zero or dead or constant channels, an outlier, a wild token."""
    kinds = ("plain", "none", "one", "zero", "dead", "constant", "outlier", "token", "vast", "tiny")
    kind = draw(st.sampled_from(kinds))
    tokens = {"none": 0, "one": 1}.get(kind, draw(st.sampled_from((2, 7, 64))))
    inputs = make_inputs(columns, draw(st.integers(0, 99)), tokens)
    if kind == "zero":
        inputs[:] = 0.0
    elif kind == "dead":
        inputs[:, ::3] = 0.0
    elif kind == "constant":
        inputs[:] = draw(st.sampled_from((1.0, -1e-3, 250.0)))
    elif kind == "outlier":
        inputs[:, 1] *= 1e6
    elif kind == "token":
        inputs[0] *= 1e5
    elif kind in ("vast", "tiny"):
        inputs *= {"vast": 1e12, "tiny": 1e-12}[kind]
    return inputs
