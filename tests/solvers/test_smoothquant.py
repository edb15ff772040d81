"""The choice of a smoothing scale, against the textbook's formula and loops over tokens."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.numerics.activations import round_inputs
from quantkit.numerics.affine import choose_absmax, dequantize, quantize
from quantkit.records import LayerStats
from quantkit.schemes import SCHEMES
from quantkit.solvers import choose_smoothing
from quantkit.solvers.smoothquant import EXPONENTS, LEAST_GAIN, _candidates
from tests.solvers.cases import DEVICES, hard_weights, make_plan, make_weight
from tests.solvers.inputs import hard_inputs, make_inputs, stats_of

INT8 = {"scheme": "w8a8", "group_size": None}


def slow_loss(weight: Tensor, inputs: Tensor, scale: Tensor) -> float:
    """The held-out error by one loop over tokens and plain rounding of both factors."""
    scheme = SCHEMES["w8a8"]
    found = choose_absmax(weight * scale, scheme, None, torch.bfloat16)
    decoded = dequantize(quantize(weight * scale, *found, scheme), *found).double()
    outputs = [weight.double() @ token.double() for token in inputs]
    mean = sum(float(output.square().sum()) for output in outputs) / len(outputs)
    total = 0.0
    for token, output in zip(inputs, outputs, strict=True):
        rounded = round_inputs((token / scale).reshape(1, 1, -1), scheme).flatten().double()
        error = float((output - decoded @ rounded).square().sum())
        total += error / (float(output.square().sum()) + mean)
    return total


def textbook_scale(weight: Tensor, inputs: Tensor, exponent: float) -> Tensor:
    """s_j = max|x_j|^a / max|w_j|^(1 - a), channel by channel, and centred."""
    scales = []
    for column in range(weight.shape[1]):
        activation = max(abs(float(value)) for value in inputs[:, column])
        coefficient = max(abs(float(value)) for value in weight[:, column])
        scales.append(activation**exponent / coefficient ** (1 - exponent))
    middle = math.sqrt(max(scales) * min(scales))
    return torch.tensor([scale / middle for scale in scales])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["smoothquant", "smoothquant+gptq"])
def test_outlier_channels_are_smoothed(method: str, device: str) -> None:
    """Nearly all of the error goes, which a loop over the held-out tokens confirms."""
    weight, inputs = make_weight(96, 64, seed=0), make_inputs(64, seed=0)
    stats = LayerStats(
        *(x.to(device) if isinstance(x, Tensor) else x for x in vars(stats_of(inputs)).values())
    )

    choice = choose_smoothing(
        [weight.to(device)], stats, [make_plan("a", weight, method, **INT8)], torch.bfloat16
    )

    assert choice.exponent is not None
    assert choice.loss < 0.2 * choice.identity_loss
    held_out = inputs[96:]
    before = slow_loss(weight, held_out, torch.ones(64))
    assert slow_loss(weight, held_out, choice.scale.cpu()) < 0.2 * before
    if method == "smoothquant":
        assert choice.identity_loss == pytest.approx(before, rel=1e-3)
        after = slow_loss(weight, held_out, choice.scale.cpu())
        assert choice.loss == pytest.approx(after, rel=1e-3)


def test_the_textbook_scales_are_among_the_candidates() -> None:
    """With the largest magnitudes over all tokens, one for each exponent."""
    weight, inputs = make_weight(96, 64, seed=1), make_inputs(64, seed=1)
    rms = inputs.square().mean(0).sqrt()

    exponents, scales = _candidates([weight], inputs.abs().amax(0), rms, 1, 0)

    assert len(exponents) == len(scales)
    for exponent in EXPONENTS:
        expected = textbook_scale(weight, inputs, exponent)
        distances = [
            float((scale / expected).log().abs().max())
            for found, scale in zip(exponents, scales, strict=True)
            if found == exponent
        ]
        assert min(distances) < 1e-4


def test_channels_that_are_all_alike_are_left_alone() -> None:
    """Where nothing is to be gained, nothing is scaled."""
    weight, inputs = make_weight(64, 64, seed=2).sign(), make_inputs(64, 2).sign()

    choice = choose_smoothing(
        [weight], stats_of(inputs), [make_plan("a", weight, "smoothquant", **INT8)], torch.bfloat16
    )

    assert choice.exponent is None
    assert torch.equal(choice.scale, torch.ones(64))
    assert choice.loss == choice.identity_loss


def test_a_gain_that_held_out_tokens_do_not_confirm_is_refused() -> None:
    """The outliers are in the choosing half alone."""
    weight, inputs = make_weight(64, 64, seed=3), make_inputs(64, 3, outlier=1.0)
    inputs[:96, 5] *= 100.0

    choice = choose_smoothing(
        [weight], stats_of(inputs), [make_plan("a", weight, "smoothquant", **INT8)], torch.bfloat16
    )

    assert choice.exponent is None


def test_grouped_heads_share_their_scale() -> None:
    """o_proj's input is [kv_head, repeat, head_dim]; the scale is equal along `repeat`."""
    weight, inputs = make_weight(48, 96, seed=4), make_inputs(96, seed=4)
    plan = make_plan("o_proj", weight, "smoothquant+gptq", **INT8)

    choice = choose_smoothing(
        [weight], stats_of(inputs), [plan], torch.bfloat16, repeat=3, head_dim=16
    )

    heads = choice.scale.reshape(2, 3, 16)
    assert choice.exponent is not None
    assert torch.equal(heads, heads[:, :1].expand_as(heads))


@pytest.mark.parametrize("scheme", ["w8a8_static", "w4a8", "fp8_static", "fp8_block"])
def test_every_scheme_with_rounded_inputs_can_be_judged(scheme: str) -> None:
    """Static scales, groups of columns, blocks: a finite loss, not above the identity's."""
    weights = [make_weight(rows, 128, seed=rows) for rows in (64, 32)]
    group_size = 32 if scheme == "w4a8" else None
    plans = [
        make_plan(name, weight, "smoothquant+gptq", scheme, group_size)
        for name, weight in zip("qk", weights, strict=True)
    ]

    choice = choose_smoothing(weights, stats_of(make_inputs(128, 5)), plans, torch.bfloat16)

    assert math.isfinite(choice.loss)
    assert choice.loss <= choice.identity_loss


def test_without_a_sample_nothing_is_scaled() -> None:
    """There is nothing to judge by."""
    weight = make_weight(8, 32, seed=6)
    stats = dataclasses.replace(stats_of(make_inputs(32, 6)), sample=None)

    choice = choose_smoothing(
        [weight], stats, [make_plan("a", weight, "smoothquant", **INT8)], torch.bfloat16
    )

    assert choice.exponent is None


@settings(max_examples=40, deadline=None)
@given(data=st.data(), method=st.sampled_from(["smoothquant", "smoothquant+gptq"]))
def test_no_input_makes_a_scale_that_is_bad(data: st.DataObject, method: str) -> None:
    """Finite and positive; kept only if the held-out error falls by 2 %; never above identity."""
    weight = data.draw(hard_weights(rows=8, columns=32))
    inputs = data.draw(hard_inputs(columns=32))
    plan = make_plan("a", weight, method, **INT8)

    choice = choose_smoothing([weight], stats_of(inputs), [plan], torch.bfloat16)

    assert bool(choice.scale.isfinite().all())
    assert bool((choice.scale > 0).all())
    if choice.exponent is None:
        assert torch.equal(choice.scale, torch.ones(32))
    else:
        assert choice.loss < (1 - LEAST_GAIN) * choice.identity_loss
