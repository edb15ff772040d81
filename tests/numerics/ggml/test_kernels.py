from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from quantkit.ggml_types import GGML_TYPES, GgmlType
from quantkit.numerics.ggml import encode_k_compiled, encode_k_torch, kernels
from quantkit.numerics.ggml.encode_k_search import nearest_integers

K_QUANTS = [GGML_TYPES[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
def test_compiled_searches_find_what_torch_finds(kind: GgmlType, rows: int) -> None:
    """Rows of 768 weights are 24 or 48 sub-blocks: lanes stay empty in the end."""
    weight, importance = normal(rows, 768, seed=rows), normal(768).square()
    for matrix in (None, importance):
        found = encode_k_compiled.search(kind, weight, matrix)
        expected = encode_k_torch.search(kind, weight, matrix)
        for name in ("scale", "codes", "minimum", "weights"):
            ours, theirs = getattr(found, name), getattr(expected, name)
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs), name


def test_rounding_in_kernels_is_that_of_torch_for_numbers_of_any_size() -> None:
    values = torch.cat([normal(500) * 100, torch.arange(-8, 8) + 0.5, normal(500) * 1e9])
    limits = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3e38, 1e-45, 4194303.0])
    values = torch.cat([values, limits])[None]
    codes = np.zeros(values.shape, np.int8)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    kernels.round_codes(values.numpy(), one, zero, -31, 15, codes)
    expected = nearest_integers(values).clamp(-31, 15)
    assert torch.equal(torch.from_numpy(codes).int(), expected)


def test_encoding_needs_no_numba() -> None:
    script = """
import sys
sys.modules["numba"] = None
import torch
from quantkit.ggml_types import GGML_TYPES
from quantkit.numerics.ggml.encode_k import encode_k
blocks = encode_k(GGML_TYPES["Q4_K"], torch.ones(1, 256), None)
assert "quantkit.numerics.ggml.kernels" not in sys.modules
print(blocks.dequantize().mean().item())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(done.stdout) == pytest.approx(1, abs=1e-3)
