"""The second moment and the choice of device and dtype."""

from __future__ import annotations

import pytest
import torch

from quantkit.calibration.compute import choose_compute_dtype, choose_device
from quantkit.calibration.stats import accumulate, empty_moment, finish, split_product
from quantkit.errors import InputError

CPU = torch.device("cpu")


def test_batches_add_up_to_the_mean_outer_product() -> None:
    """Against a sum over single tokens in float64."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 5, 8, generator=generator) for _ in range(3)]
    moment = empty_moment(8, CPU)

    for batch in batches:
        accumulate(moment, batch, None)
    stats = finish(moment)

    rows = torch.cat([batch.reshape(-1, 8) for batch in batches]).double()
    expected = sum(torch.outer(row, row) for row in rows) / len(rows)
    assert stats.tokens == 30
    torch.testing.assert_close(stats.second_moment.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_inputs_are_summed_panel_by_panel(dtype: torch.dtype) -> None:
    """Also where the last panel is narrow, and to float32's precision from bfloat16 activations."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(700, 300, generator=generator).to(dtype)
    moment = empty_moment(300, CPU)

    for batch in rows.split(128):
        accumulate(moment, batch, None)
    found = finish(moment).second_moment

    expected = rows.double().T @ rows.double() / len(rows)
    assert torch.equal(found, found.T)
    assert (found.double() - expected).norm() < 1e-5 * expected.norm()


def test_two_bfloat16_parts_hold_a_product_that_one_cannot() -> None:
    """The library subtracts the first part before it rounds the second."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(4096, 64, generator=generator).bfloat16()

    high, low = split_product(rows.T, rows)

    exact = rows.double().T @ rows.double()
    assert (high.double() - exact).norm() > 1e-4 * exact.norm()
    assert (high.double() + low.double() - exact).norm() < 1e-5 * exact.norm()


def test_weighted_tokens_count_by_their_weight() -> None:
    """A token of weight 2 counts as two tokens, one of weight 0 not at all."""
    rows = torch.tensor([[1.0, 2.0], [3.0, -1.0], [5.0, 5.0]])
    moment = empty_moment(2, CPU)

    accumulate(moment, rows, torch.tensor([2.0, 1.0, 0.0]))
    stats = finish(moment)

    expected = (2 * torch.outer(rows[0], rows[0]) + torch.outer(rows[1], rows[1])) / 3
    assert stats.tokens == 2
    torch.testing.assert_close(stats.second_moment, expected)


def test_no_token_gives_zeros() -> None:
    """Nothing counted is not a division by zero."""
    assert not finish(empty_moment(4, CPU)).second_moment.any()


def test_a_float16_checkpoint_is_never_computed_in_bfloat16() -> None:
    """bfloat16 would drop bits of its weights."""
    dtype, probe = choose_compute_dtype(CPU, torch.float16)
    assert dtype == torch.float32
    assert probe.float32_gflops > 0


def test_the_faster_dtype_is_chosen_for_a_bfloat16_checkpoint() -> None:
    """The choice follows the measurement that is returned with it."""
    dtype, probe = choose_compute_dtype(CPU, torch.bfloat16)
    assert (dtype == torch.bfloat16) == (probe.bfloat16_gflops > 1.5 * probe.float32_gflops)


def test_an_unknown_or_absent_device_is_refused() -> None:
    """The error says which devices there are."""
    with pytest.raises(InputError, match="known: auto, cpu, cuda"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            choose_device("cuda")
