from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantkit.ggml_types import GGML_TYPES, GgmlType
from quantkit.numerics.ggml.encode_k import encode_k
from quantkit.numerics.ggml.packing_k import pack_k
from tests.ggml_oracle import encode_with_ggml

K_QUANTS = [GGML_TYPES[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")]
MODEL = Path(__file__).parents[3] / "models" / "demo-llama" / "model.safetensors"


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def one_spike() -> Tensor:
    weight = normal(4, 512) * 1e-3
    weight[1, 300] = 50.0
    weight[2] = 0.0
    weight[2, 17] = -1e-4
    return weight


def ties() -> Tensor:
    """Steps of a half of a power of two, so that many weights lie between two codes."""
    return (normal(8, 512, seed=3) * 4).round() / 8


def single_signs() -> Tensor:
    weight = normal(4, 512, seed=5).abs()
    weight[2:] *= -1
    return weight


def near_constants() -> Tensor:
    weight = torch.full((8, 512), -1.0) + normal(8, 512, seed=6) * 1e-7
    weight[4:] *= -1
    return weight


def magnitudes_of_all_kinds() -> Tensor:
    """From denormal numbers to those whose squares overflow."""
    return normal(24, 512, seed=7) * torch.logspace(-44, 37, 24)[:, None]


def sub_blocks_of_zeros() -> Tensor:
    weight = normal(8, 512, seed=8)
    weight.unflatten(1, (-1, 16))[:, ::3] = 0
    return weight


def outliers_among_zeros() -> Tensor:
    """Where an outlier counts nothing in the matrix, a search meets numbers too large to round."""
    weight = normal(256, 512, seed=11)
    return weight * (normal(256, 512, seed=12) > 1.6)


WEIGHTS: Mapping[str, Callable[[], Tensor]] = {
    "random": lambda: normal(64, 512),
    "zeros": lambda: torch.zeros(2, 512),
    "constants": lambda: torch.tensor([0.3, -0.7, 1e-30, 1e-38])[:, None].expand(4, 512),
    "one spike": one_spike,
    "ties": ties,
    "single signs": single_signs,
    "near constants": near_constants,
    "magnitudes of all kinds": magnitudes_of_all_kinds,
    "sub-blocks of zeros": sub_blocks_of_zeros,
    "outliers among zeros": outliers_among_zeros,
    "heavy tails": lambda: normal(16, 512, seed=9) ** 5,
}


def importance_of(columns: int, zeros: bool) -> Tensor:
    """What a matrix of real activations looks like: over many magnitudes, and zeros in places."""
    importance = torch.exp(3 * normal(1, columns, seed=10)[0])
    if zeros:
        importance[::5] = 0
        importance[64:128] = 0
    return importance


@pytest.fixture(params=["torch", "numba"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With numba and as if it were not installed."""
    if request.param == "torch":
        monkeypatch.setitem(sys.modules, "quantkit.numerics.ggml.encode_k_compiled", None)
    else:
        pytest.importorskip("numba")
    return str(request.param)


def differing_rows(kind: GgmlType, weight: Tensor, importance: Tensor | None) -> list[int]:
    found = pack_k(encode_k(kind, weight, importance))
    expected = encode_with_ggml(kind, weight, importance)
    return (found != expected).any(dim=1).nonzero().flatten().tolist()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("matrix", ["none", "positive", "zeros"])
@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
def test_bytes_are_those_of_llama_cpp(kind: GgmlType, matrix: str) -> None:
    cases = {name: make() for name, make in WEIGHTS.items()}
    names = [name for name, weight in cases.items() for _ in weight]
    importance = None if matrix == "none" else importance_of(512, matrix == "zeros")
    rows = differing_rows(kind, torch.cat(list(cases.values())), importance)
    assert not rows, f"rows of {sorted({names[row] for row in rows})} differ"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
def test_bytes_of_trained_weights_are_those_of_llama_cpp(kind: GgmlType) -> None:
    names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate_proj.weight")
    tensors = load_file(MODEL)
    for name in names:
        weight = tensors[name].float()[:16]
        weight = weight[:, : weight.shape[1] // 256 * 256].contiguous()
        for importance in (None, importance_of(weight.shape[1], zeros=False)):
            assert not differing_rows(kind, weight, importance)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
def test_rows_and_columns_may_be_those_of_a_larger_tensor(kind: GgmlType) -> None:
    larger, importance = normal(4, 1024), importance_of(1024, zeros=False)
    part = larger[::2, 256:768]
    found = pack_k(encode_k(kind, part, importance[256:768]))
    expected = encode_with_ggml(kind, part, importance[256:768])
    assert torch.equal(found, expected)


def test_rows_that_are_not_whole_super_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="300 columns are not whole blocks of 256 of Q4_K"):
        encode_k(GGML_TYPES["Q4_K"], torch.zeros(2, 300), None)
