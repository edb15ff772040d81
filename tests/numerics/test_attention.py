"""Causal attention by the compiled kernel, against float64 and torch's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantkit.numerics.attention import attend_causally, can_attend
from quantkit.numerics.products import sums_products

pytestmark = pytest.mark.skipif(
    not sums_products(torch.device("cpu")),
    reason="the processor has no AVX512-BF16, or AMX, or numba is missing",
)

Parts = tuple[Tensor, Tensor, Tensor]


def _draw(batch: int, heads: int, shared: int, tokens: int, channels: int) -> Parts:
    """Queries, keys and values as a model makes them: the heads of a token lie side by side."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        rows = torch.randn(batch, tokens, count, channels, generator=generator)
        return rows.bfloat16().transpose(1, 2)

    return draw(heads), draw(shared), draw(shared)


def _attend_by_torch(parts: Parts, scaling: float) -> Tensor:
    query, key, value = parts
    return scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    ).transpose(1, 2)


def _attend_exactly(parts: Parts, scaling: float) -> Tensor:
    """The definition, in float64."""
    query, key, value = (part.double() for part in parts)
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    scores = scaling * query @ key.mT
    later = torch.ones(scores.shape[-2:]).triu(1).bool()
    return (scores.masked_fill(later, -math.inf).softmax(-1) @ value).transpose(1, 2)


def test_two_tokens_by_hand() -> None:
    """The second has e^(ln 3) times the weight of the first for itself."""
    query, key, value = (torch.zeros(1, 1, 2, 16).bfloat16() for _ in range(3))
    query[0, 0, 1, 0] = key[0, 0, 1, 0] = 1
    value[0, 0, :, 0] = torch.tensor([4.0, 8.0])
    value[0, 0, :, 15] = torch.tensor([-8.0, 0.0])

    found = attend_causally(query, key, value, math.log(3))

    assert found.shape == (1, 2, 1, 16)
    assert found[0, :, 0, 0].tolist() == [4, 7]
    assert found[0, :, 0, 15].tolist() == [-8, -2]
    assert not found[..., 1:15].any()


@pytest.mark.parametrize(
    ("batch", "heads", "shared", "tokens", "channels"),
    [
        (1, 1, 1, 2, 16),
        (2, 4, 2, 31, 64),
        (1, 6, 2, 33, 80),
        (3, 3, 3, 40, 96),
        (1, 8, 1, 129, 128),
        (1, 2, 1, 200, 256),
        (2, 14, 2, 512, 64),
        (1, 4, 2, 1029, 64),
    ],
)
def test_no_error_is_larger_than_that_of_torch(
    batch: int, heads: int, shared: int, tokens: int, channels: int
) -> None:
    """Both round weights to bfloat16, and what comes out."""
    parts = _draw(batch, heads, shared, tokens, channels)
    scaling = 1.5 * channels**-0.5
    expected = _attend_exactly(parts, scaling)

    found = attend_causally(*parts, scaling)

    assert found.dtype == torch.bfloat16
    assert found.shape == (batch, tokens, heads, channels)
    error = (found.double() - expected).abs()
    usual = (_attend_by_torch(parts, scaling).double() - expected).abs()
    assert error.max() <= 1.1 * usual.max()
    assert error.norm() <= 1.02 * usual.norm()


@pytest.mark.parametrize("tokens", range(1, 40))
def test_any_number_of_tokens(tokens: int) -> None:
    """Whatever the last block of queries, tile of keys and pair of them lack."""
    parts = _draw(2, 2, 1, tokens, 16)

    found = attend_causally(*parts, 0.25)

    expected = _attend_exactly(parts, 0.25).float()
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=2**-8)


def test_one_token_sees_itself() -> None:
    """So it gets its value, bit for bit."""
    query, key, value = _draw(2, 4, 2, 1, 64)

    found = attend_causally(query, key, value, 0.125)

    assert torch.equal(found, value.repeat_interleave(2, dim=1).transpose(1, 2))


@pytest.mark.parametrize("scaling", [1e-9, 5.0, 1e4])
def test_scores_of_any_size(scaling: float) -> None:
    """Nothing overflows, and where all scores are about equal the mean comes out."""
    parts = _draw(1, 2, 2, 70, 32)

    found = attend_causally(*parts, scaling)

    expected = _attend_exactly(parts, scaling).float()
    torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-6)


def test_largest_scores_may_come_late() -> None:
    """What was summed before shrinks, to nothing in the end."""
    query, key, value = _draw(1, 1, 1, 1100, 16)
    query[:] = 1
    key[:] = torch.linspace(-4, 4, 1100).bfloat16()[:, None]
    parts = query, key, value

    found = attend_causally(*parts, 1.0)

    expected = _attend_exactly(parts, 1.0).float()
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=2**-7)


def test_weights_are_exact_up_to_float32() -> None:
    """Their sum is checked, where they are not rounded to bfloat16 yet."""
    import numba

    from quantkit.numerics.attention_compiled import _weigh

    @numba.njit
    def weigh(scores, scale, state, weights):
        _weigh(scores, scale, state, weights)

    powers = np.linspace(-125, 0, 32 * 50, dtype=np.float32).reshape(50, 32)
    for row in powers:
        scores = np.stack([row, np.full_like(row, -np.inf)])
        state = np.zeros((3, 32), np.float32)
        weigh(scores, np.float32(1), state, np.empty((1, 32), np.int32))
        np.testing.assert_allclose(state[1], np.exp2(row.astype(np.float64)), rtol=3e-7)


def test_what_comes_later_leaves_no_trace() -> None:
    """Not even in the same block, however large it is."""
    query, key, value = _draw(1, 2, 1, 50, 32)
    before = attend_causally(query, key, value, 0.5)
    key[:, :, 40:], value[:, :, 40:] = 1e4, 1e37

    after = attend_causally(query, key, value, 0.5)

    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_what_is_not_finite_shows(place: str, number: float) -> None:
    """In what is made of it, and in no other head or text."""
    parts = dict(zip(("query", "key", "value"), _draw(2, 2, 2, 70, 32), strict=True))
    parts[place][0, 1, 37, 5] = number

    found = attend_causally(**parts, scaling=0.2)

    assert not found[0, 37:, 1].isfinite().all()
    assert found[0, :, 0].isfinite().all()
    assert found[1].isfinite().all()


def test_scores_that_overflow_show() -> None:
    """Two are the largest, and their difference is no number."""
    query, key, value = (torch.full((1, 1, 4, 16), 3e38).bfloat16() for _ in range(3))

    assert not attend_causally(query, key, value, 1.0).isfinite().any()


def test_threads_change_no_bit() -> None:
    """Each query is one thread's, wherever the threads part."""
    parts = _draw(1, 3, 1, 1000, 64)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(attend_causally(*parts, 0.125))
    finally:
        torch.set_num_threads(before)

    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_memory_may_lie_in_any_order_and_be_given_back() -> None:
    """By resizing it, as the walk does with what it parks."""
    parts = _draw(2, 4, 2, 37, 32)

    found = attend_causally(*parts, 0.2)

    assert found.is_contiguous()
    assert torch.equal(found, attend_causally(*(part.contiguous() for part in parts), 0.2))
    assert all(part.untyped_storage().resizable() for part in (*parts, found))


def test_what_does_not_fit_is_refused() -> None:
    """Other numbers, lengths, groups and channels are for torch."""
    query, key, value = _draw(1, 4, 2, 10, 32)
    assert can_attend(query, key, value, 0.1)
    for wrong in (
        (query.float(), key, value),
        (query, key.to("meta"), value),
        (query[:, :, :9], key, value),
        (query[:, :3], key, value),
        (query, key, value[..., :16]),
        (query[..., :24], key[..., :24], value[..., :24]),
        (query[:, :, :0], key[:, :, :0], value[:, :, :0]),
    ):
        with pytest.raises(ValueError, match="attention does not take queries"):
            attend_causally(*wrong, 0.1)
    for scaling in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scaled by"):
            attend_causally(query, key, value, scaling)
