"""Static scales of inputs, the noise of their rounding, and output errors, by slow references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.numerics.activations import round_inputs, scale_from_absmax
from quantkit.schemes import SCHEMES
from quantkit.solvers import add_input_noise, choose_input_scale, output_error, shift_of_mean
from tests.solvers.cases import hard_weights, make_weight
from tests.solvers.inputs import hard_inputs, make_inputs, stats_of

STATIC = ["w8a8_static", "fp8_static"]


def whole_range(inputs: torch.Tensor, scheme: str) -> torch.Tensor:
    """The scale that clips nothing."""
    activations = SCHEMES[scheme].activations
    assert activations is not None
    return scale_from_absmax(inputs.abs().max(), activations, torch.bfloat16)


@pytest.mark.parametrize("scheme", STATIC)
def test_an_even_input_is_not_clipped(scheme: str) -> None:
    """Its scale is that of its largest value, in the stored dtype."""
    inputs, weight = make_inputs(64, 0, outlier=1.0), make_weight(32, 64, 0)

    scale = choose_input_scale(weight, stats_of(inputs), SCHEMES[scheme], torch.bfloat16)

    assert scale.dtype == torch.bfloat16
    assert float(scale) >= 0.8 * float(whole_range(inputs, scheme))


def test_values_that_hardly_matter_are_clipped_where_that_lowers_the_error() -> None:
    """A channel with an outlier that no weight reads takes the range of all others."""
    inputs, weight = make_inputs(64, 1, outlier=1.0), make_weight(32, 64, 1)
    inputs[:, 3] *= 200.0
    weight[:, 3] = 0.0
    stats = stats_of(inputs)

    scale = choose_input_scale(weight, stats, SCHEMES["w8a8_static"], torch.bfloat16)

    assert float(scale) < 0.2 * float(whole_range(inputs, "w8a8_static"))
    after, before = (
        output_error(inputs, weight, weight, SCHEMES["w8a8_static"], candidate)
        for candidate in (scale, whole_range(inputs, "w8a8_static"))
    )
    assert after is not None
    assert before is not None
    assert after < 0.1 * before


def test_an_outlier_that_the_sample_missed_is_not_clipped() -> None:
    """Its channel's absmax knows of it, and one token of it costs more than all rounding."""
    inputs, weight = make_inputs(64, 2, outlier=1.0), make_weight(32, 64, 2)
    stats = stats_of(inputs)
    assert stats.absmax is not None
    stats.absmax[7] = 1000.0

    scale = choose_input_scale(weight, stats, SCHEMES["w8a8_static"], torch.float32)

    assert float(scale) > 0.9 * 1000.0 / 127.5


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_only_static_inputs_have_a_scale(scheme: str) -> None:
    """Asking for one is a mistake of the caller."""
    with pytest.raises(ValueError, match="static input"):
        choose_input_scale(
            torch.ones(2, 8), stats_of(torch.ones(4, 8)), SCHEMES[scheme], torch.float32
        )


@settings(max_examples=40, deadline=None)
@given(data=st.data(), scheme=st.sampled_from(STATIC))
def test_no_input_makes_a_scale_that_is_bad(data: st.DataObject, scheme: str) -> None:
    """Positive, finite, and never larger than what clips nothing."""
    weight = data.draw(hard_weights(rows=4, columns=16))
    inputs = data.draw(hard_inputs(columns=16))
    stats = stats_of(inputs)

    scale = choose_input_scale(weight, stats, SCHEMES[scheme], torch.bfloat16)

    assert stats.absmax is not None
    assert 0 < float(scale) < float("inf")
    assert float(scale) <= float(whole_range(stats.absmax, scheme))


def test_the_noise_of_rounding_joins_the_diagonal() -> None:
    """Against a loop over tokens; the real second moment of the rounded input is near."""
    inputs, scheme = make_inputs(32, 3, tokens=500), SCHEMES["w8a8"]
    stats = stats_of(inputs)

    noisy = add_input_noise(stats, scheme, None)

    noise = torch.zeros(32, dtype=torch.float64)
    rounded = []
    for token in inputs:
        rounded.append(round_inputs(token.reshape(1, 1, -1), scheme).flatten())
        noise += (rounded[-1] - token).double().square() / len(inputs)
    added = (noisy.second_moment - stats.second_moment).double()
    scale = stats.second_moment.diagonal().mean()
    torch.testing.assert_close(added.diagonal(), noise, rtol=0, atol=1e-5 * float(scale))
    assert not (added - added.diagonal().diag()).any()
    real = torch.stack(rounded).T @ torch.stack(rounded) / len(inputs)
    assert (noisy.second_moment - real).norm() < 0.02 * real.norm()


def test_inputs_in_16_bits_have_no_noise_and_keep_their_mean() -> None:
    """The statistics come back as they are."""
    stats = stats_of(make_inputs(16, 4))

    assert add_input_noise(stats, SCHEMES["w4a16"], None) is stats
    assert not shift_of_mean(stats, SCHEMES["w4a16"], None).any()


def test_the_mean_of_a_rounded_input_is_known() -> None:
    """The shift is the mean rounding error; clipping makes it large."""
    inputs = make_inputs(16, 5).abs()
    scale = whole_range(inputs, "w8a8_static").float() / 4

    shift = shift_of_mean(stats_of(inputs), SCHEMES["w8a8_static"], scale)

    rounded = round_inputs(inputs, SCHEMES["w8a8_static"], scale)
    torch.testing.assert_close(shift, (rounded - inputs).mean(0))
    assert float(shift.min()) < -1.0


@pytest.mark.parametrize("scheme", ["w8a8", "fp8_dynamic", "w4a16"])
def test_the_output_error_is_that_of_every_token(scheme: str) -> None:
    """Against a loop over tokens in float64."""
    inputs, weight = make_inputs(32, 6, tokens=20), make_weight(8, 32, 6)
    decoded = weight + 0.01 * make_weight(8, 32, 7)

    found = output_error(inputs, weight, decoded, SCHEMES[scheme], None)

    error = energy = 0.0
    for token in inputs:
        output = weight.double() @ token.double()
        rounded = round_inputs(token.reshape(1, 1, -1), SCHEMES[scheme]).flatten().double()
        error += float((output - decoded.double() @ rounded).square().sum())
        energy += float(output.square().sum())
    assert found == pytest.approx(error / energy, rel=1e-3)


def test_an_output_error_of_nothing() -> None:
    """No tokens have none; a zero output that stays zero has none of it."""
    weight = torch.ones(2, 4)

    assert output_error(torch.empty(0, 4), weight, weight, SCHEMES["w8a8"], None) is None
    assert output_error(torch.zeros(3, 4), weight, weight, SCHEMES["w8a8"], None) == 0.0
