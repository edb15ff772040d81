"""Folds keep the function: what is divided in front is multiplied behind."""

from __future__ import annotations

import pytest
import torch

from quantkit.numerics.affine import code_dtype, dequantize_layer
from quantkit.records import LayerStats, QuantizedLayer
from quantkit.schemes import SCHEMES
from quantkit.solvers import (
    collapse_heads,
    expand_heads,
    fold_into_bias,
    fold_into_dense,
    fold_into_layer,
    fold_into_norm,
    scale_stats,
)
from tests.solvers.cases import make_moment, make_weight
from tests.solvers.inputs import stats_of


def make_layer(dtype: torch.dtype, size: float) -> QuantizedLayer:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(4, 4)
    scale = torch.full((4, 2), size, dtype=dtype)
    return QuantizedLayer("layer", SCHEMES["w4a16"], 32, codes, scale, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_norm_times_the_effective_scale_is_the_original_norm(dtype: torch.dtype) -> None:
    """Exactly what is folded, after the rounding of the new weight, is returned."""
    generator = torch.Generator().manual_seed(0)
    weight = (1 + 0.3 * torch.randn(64, generator=generator)).to(dtype)
    bias = torch.randn(64, generator=generator).to(dtype)
    scale = torch.rand(64, generator=generator) + 0.5

    new, new_bias, effective = fold_into_norm(weight, bias, scale)

    assert new.dtype == dtype
    torch.testing.assert_close(new.double() * effective, weight.double(), rtol=1e-7, atol=0)
    torch.testing.assert_close(effective, scale, rtol=torch.finfo(dtype).eps, atol=0)
    assert new_bias is not None
    torch.testing.assert_close(
        new_bias.float() * effective, bias.float(), rtol=torch.finfo(dtype).eps, atol=0
    )


def test_a_norm_channel_that_would_leave_the_range_keeps_its_weight() -> None:
    """A zero weight, one that would overflow and one that would vanish: scale 1 each."""
    weight = torch.tensor([0.0, 6e4, 1e-7, 2.0], dtype=torch.float16)
    scale = torch.tensor([2.0, 1e-3, 1e3, 4.0])

    new, bias, effective = fold_into_norm(weight, None, scale)

    assert torch.equal(new, torch.tensor([0.0, 6e4, 1e-7, 0.5], dtype=torch.float16))
    assert effective.tolist() == [1.0, 1.0, 1.0, 4.0]
    assert bias is None


def test_the_rows_of_a_quantized_layer_are_divided_by_its_scales() -> None:
    """Codes stay as they are; powers of two leave no rounding at all."""
    layer = make_layer(torch.bfloat16, 0.125)
    scale = torch.tensor([1.0, 2.0, 0.5, 4.0])

    found = fold_into_layer(layer, scale)

    assert found is not None
    folded, effective = found
    assert torch.equal(effective, scale)
    assert torch.equal(folded.codes, layer.codes)
    assert torch.equal(dequantize_layer(folded), dequantize_layer(layer) / scale.unsqueeze(1))


@pytest.mark.parametrize("scheme", ["w8a8", "fp8_dynamic"])
def test_a_row_with_one_scale_takes_a_fold_without_rounding(scheme: str) -> None:
    """What is returned is what was folded, so multiplied behind it gives the same product."""
    codes = torch.arange(-8, 8).repeat(4, 1).to(code_dtype(SCHEMES[scheme]))
    steps = torch.tensor([[0.11], [0.13], [0.17], [0.19]]).bfloat16()
    layer = QuantizedLayer("layer", SCHEMES[scheme], None, codes, steps, None)
    scale = torch.tensor([1.3, 0.7, 5.1, 0.01])

    found = fold_into_layer(layer, scale)

    assert found is not None
    folded, effective = found
    torch.testing.assert_close(effective, scale, rtol=0.005, atol=0)
    product = dequantize_layer(folded).double() * effective.double().unsqueeze(1)
    torch.testing.assert_close(product, dequantize_layer(layer).double(), rtol=1e-6, atol=0)


def test_rows_that_share_scales_take_no_fold() -> None:
    """One scale serves 128 rows."""
    codes = torch.zeros(4, 16).to(torch.float8_e4m3fn)
    layer = QuantizedLayer("layer", SCHEMES["fp8_block"], None, codes, torch.ones(1, 1), None)

    assert fold_into_layer(layer, torch.full((4,), 2.0)) is None


def test_a_fold_that_the_scale_dtype_cannot_hold_is_refused() -> None:
    """A float16 scale pushed deep into the subnormals would change by more than 1 %."""
    layer = make_layer(torch.float16, 1e-4)

    assert fold_into_layer(layer, torch.full((4,), 1.37)) is not None
    assert fold_into_layer(layer, torch.full((4,), 1e3)) is None
    assert fold_into_layer(layer, torch.full((4,), 1e-10)) is None


def test_an_unquantized_layer_is_divided_row_by_row() -> None:
    """Weight and bias, each in its dtype."""
    weight, bias = make_weight(4, 8, seed=0).bfloat16(), torch.tensor([1.0, 2.0, 3.0, 4.0])
    scale = torch.tensor([1.0, 2.0, 0.5, 4.0])

    new, new_bias = fold_into_dense(weight, bias, scale)

    assert new.dtype == torch.bfloat16
    assert torch.equal(new.float(), weight.float() / scale.unsqueeze(1))
    assert new_bias is not None
    assert torch.equal(new_bias, fold_into_bias(bias, scale))
    assert new_bias.tolist() == [1.0, 1.0, 6.0, 1.0]


def test_heads_that_share_a_key_value_head_collapse_to_one_scale() -> None:
    """[kv_head, repeat, head_dim] to [kv_head, head_dim]; without grouping nothing changes."""
    heads = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    scale = heads.unsqueeze(1).expand(2, 3, 2).reshape(-1)

    assert collapse_heads(scale, repeat=3, head_dim=2).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert torch.equal(expand_heads(heads.reshape(-1), repeat=3, head_dim=2), scale)
    for change in (collapse_heads, expand_heads):
        assert torch.equal(change(scale, repeat=1, head_dim=0), scale)


def test_scaled_statistics_are_those_of_the_divided_input() -> None:
    """E[(x/s)(x/s)^T] from the inputs themselves."""
    inputs = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.5

    scaled = scale_stats(stats_of(inputs), scale)

    expected = stats_of(inputs / scale)
    torch.testing.assert_close(scaled.second_moment, expected.second_moment)
    for name in ("mean", "absmax", "sample"):
        torch.testing.assert_close(getattr(scaled, name), getattr(expected, name))
    assert scaled.tokens == 100
    alone = scale_stats(LayerStats(torch.eye(16), 3), scale)
    assert (alone.mean, alone.absmax, alone.sample) == (None, None, None)


def test_spent_statistics_are_scaled_where_they_are() -> None:
    """The same bits as in a copy, in the memory of the old ones; the copy leaves them alone."""
    moment, drift = make_moment(16, seed=1), make_moment(16, seed=2)
    stats = LayerStats(moment.clone(), 3, drift=drift.clone())
    scale = torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.5

    copied = scale_stats(stats, scale)
    torch.testing.assert_close((stats.second_moment, stats.drift), (moment, drift), rtol=0, atol=0)
    spent = scale_stats(stats, scale, spent=True)

    for name in ("second_moment", "drift"):
        assert torch.equal(getattr(spent, name), getattr(copied, name))
        assert getattr(spent, name).data_ptr() == getattr(stats, name).data_ptr()


def test_folding_leaves_the_output_of_the_pair_as_it_was() -> None:
    """Norm and linear layer, in bfloat16 with the effective scale: the same product."""
    weight = make_weight(8, 32, seed=1)
    norm = (1 + 0.2 * torch.randn(32, generator=torch.Generator().manual_seed(2))).bfloat16()
    scale = make_moment(32, seed=1).diagonal().sqrt()

    new, _, effective = fold_into_norm(norm, None, scale)

    before = weight.double() * norm.double()
    after = (weight.double() * effective.double()) * new.double()
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-12)
