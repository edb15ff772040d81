"""Products of bfloat16 with float32 sums, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.numerics import products
from quantkit.numerics.products import (
    add_product,
    pack_and_measure,
    pack_rows,
    sums_products,
)

pytestmark = pytest.mark.skipif(
    not sums_products(torch.device("cpu")),
    reason="the processor has no AVX512-BF16, or AMX, or numba is missing",
)


def _draw(tokens: int, features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, features, generator=generator).bfloat16()


def test_a_product_by_hand() -> None:
    """Three tokens of two features, and of one; what was there before is added to."""
    left = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, -6.0]]).bfloat16()
    right = torch.tensor([[1.0], [0.0], [-1.0]]).bfloat16()
    total = torch.tensor([[100.0], [200.0]])

    add_product(total, pack_rows(left), pack_rows(right))

    assert total.tolist() == [[96.0], [208.0]]


@pytest.mark.parametrize("tokens", [1, 2, 37, 256])
@pytest.mark.parametrize(("features", "others"), [(1, 48), (7, 9), (16, 15), (49, 47), (300, 100)])
def test_products_are_those_of_float64(tokens: int, features: int, others: int) -> None:
    """Up to the rounding of float32 sums, whatever the last panel and the last pair lack."""
    left, right = _draw(tokens, features), _draw(tokens, others, seed=1)
    total = torch.zeros(features, others)

    add_product(total, pack_rows(left), pack_rows(right))

    torch.testing.assert_close(
        total.double(), left.double().T @ right.double(), rtol=1e-6, atol=1e-6 * tokens
    )


@pytest.mark.parametrize("features", [1, 48, 100, 600])
def test_an_upper_triangle_is_whole(features: int) -> None:
    """Below the diagonal there may be less than the sum, but nothing else."""
    rows = _draw(64, features)
    packed, total = pack_rows(rows), torch.zeros(features, features)

    add_product(total, packed, packed, upper=True)

    expected = rows.double().T @ rows.double()
    torch.testing.assert_close(total.triu().double(), expected.triu(), rtol=1e-5, atol=1e-5)
    below = total.tril(-1).double()
    torch.testing.assert_close(below, expected.tril(-1) * (below != 0), rtol=1e-5, atol=1e-5)


def test_room_that_was_used_before_leaves_no_trace() -> None:
    """Nor does it matter how rows lie in memory."""
    rows = _draw(33, 50)
    room = torch.full((100_000,), -1, dtype=torch.int32)

    packed = pack_rows(rows.T.contiguous().T, room)

    assert packed.data_ptr() == room.data_ptr()
    assert torch.equal(packed, pack_rows(rows))
    assert torch.equal(packed, pack_rows(rows, room[:7]))


def test_memory_of_packed_rows_can_still_be_given_back() -> None:
    """By resizing it, as the walk does with what it parks."""
    rows = _draw(8, 50)

    pack_rows(rows)

    assert rows.untyped_storage().resizable()


@pytest.mark.parametrize("tokens", [1, 2, 37, 256])
@pytest.mark.parametrize("features", [1, 7, 16, 47, 48, 49, 96, 300])
def test_packing_sees_sums_and_magnitudes(tokens: int, features: int) -> None:
    """Sums up to float32's rounding, magnitudes exactly, whatever the last panel and pair lack."""
    rows = 100 * _draw(tokens, features)

    found = pack_and_measure(rows, torch.full((1 << 17,), -1, dtype=torch.int32))

    assert torch.equal(found.packed, pack_rows(rows))
    assert torch.equal(found.largest, rows.abs().amax(0).float())
    torch.testing.assert_close(
        found.sums.double(), rows.double().sum(0), rtol=1e-6, atol=1e-5 * tokens
    )


def test_packing_sees_what_is_not_finite() -> None:
    """What is no number is never lost, not beside an infinity either; nothing else is touched."""
    nan, infinity = torch.nan, torch.inf
    rows = torch.zeros(3, 7).bfloat16()
    rows[:, 0] = torch.tensor([1.0, nan, 2.0])
    rows[:, 1] = torch.tensor([-nan, infinity, 2.0])
    rows[:, 2] = torch.tensor([1.0, 2.0, -infinity])
    rows[:, 3] = torch.tensor([infinity, -infinity, 2.0])
    rows[:, 4] = torch.tensor([-0.0, -0.0, -0.0])
    rows[:, 5] = torch.tensor([1e-40, -3e-39, 0.0])

    found = pack_and_measure(rows)

    expected = rows.abs().amax(0).float()
    torch.testing.assert_close(found.largest, expected, rtol=0, atol=0, equal_nan=True)
    assert found.largest[:5].tolist()[2:] == [infinity, infinity, 0.0]
    total = rows.float().sum(0)
    torch.testing.assert_close(found.sums, total, rtol=0, atol=0, equal_nan=True)
    assert found.sums.isnan().tolist() == [True, True, False, True, False, False, False]


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sum is one thread's."""
    monkeypatch.setattr(products, "_PACKED_A_THREAD", 1)
    monkeypatch.setattr(products, "_PRODUCTS_A_THREAD", 1)
    left, right = _draw(513, 700), _draw(513, 900, seed=1)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            packed, other = pack_and_measure(left), pack_and_measure(right)
            total, square = torch.zeros(700, 900), torch.zeros(900, 900)
            add_product(total, packed.packed, other.packed)
            add_product(square, other.packed, other.packed, upper=True)
            found.append((total, square, other.packed, other.sums, other.largest))
    finally:
        torch.set_num_threads(before)

    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_a_value_that_is_not_finite_stays_in_its_row_and_column() -> None:
    """A padded token or feature makes no product of it that is not a number."""
    rows = torch.ones(3, 20).bfloat16()
    rows[2, 4] = torch.inf
    packed, total = pack_rows(rows), torch.zeros(20, 20)

    add_product(total, packed, packed)

    reached = ~total.isfinite()
    assert reached.sum() == 39
    assert reached[4].all()
    assert reached[:, 4].all()
    assert not total.isnan().any()


def test_rows_that_do_not_fit_are_refused() -> None:
    """Before anything outside of the sum is written."""
    left, right = pack_rows(_draw(8, 60)), pack_rows(_draw(8, 20))
    with pytest.raises(ValueError, match="have no product of shape"):
        add_product(torch.zeros(60, 60), left, right)
    with pytest.raises(ValueError, match="have no product of shape"):
        add_product(torch.zeros(60, 20), left, pack_rows(_draw(11, 20)))


def test_nothing_is_packed_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on another device."""
    assert not sums_products(torch.device("meta"))
    monkeypatch.setattr(products, "find_spec", lambda _: None)
    assert not sums_products(torch.device("cpu"))
