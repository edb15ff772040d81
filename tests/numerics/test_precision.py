"""Products of rounded factors: only while they are asked for."""

from __future__ import annotations

import pytest
import torch

from quantkit.numerics.precision import quick_products


def setting() -> tuple[str, str]:
    """What torch may do to the factors of a float32 product now, on a CPU and on CUDA."""
    backends = torch.backends.mkldnn, torch.backends.cuda
    return backends[0].matmul.fp32_precision, backends[1].matmul.fp32_precision


def test_the_setting_is_as_before_afterwards() -> None:
    """Also after an error, within another, and where nothing was asked for."""
    before = setting()

    with quick_products(True):
        assert setting() == ("bf16", "tf32")
        with quick_products(False):
            assert setting() == ("bf16", "tf32")
        with pytest.raises(ValueError), quick_products(True):
            raise ValueError
        assert setting() == ("bf16", "tf32")

    assert setting() == before
    with quick_products(False):
        assert setting() == before


def test_what_bfloat16_holds_is_multiplied_exactly() -> None:
    """Summed in float32, like any float32 product; large enough for the library to take it up."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator).bfloat16() for _ in range(2))

    with quick_products(True):
        found = left.float() @ right.float()

    exact = left.double() @ right.double()
    assert (found.double() - exact).norm() < 1e-6 * exact.norm()


def test_other_factors_are_good_to_three_digits() -> None:
    """A device without bfloat16 arithmetic gives more."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))

    with quick_products(True):
        found = left @ right

    exact = left.double() @ right.double()
    assert (found.double() - exact).norm() < 4e-3 * exact.norm()
