"""The kernels in Triton's interpreter, against torch: integers to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import QuantkitError
from quantkit.ggml_types import GGML_TYPES
from quantkit.numerics import kernels
from quantkit.numerics.affine import CodeSet, code_range
from quantkit.numerics.ggml.codec import encode_rows
from quantkit.numerics.ggml.encode_k_search import (
    AffineGrid,
    search_affine,
    search_symmetric,
)
from quantkit.numerics.linalg import factor_moment
from quantkit.numerics.packing import pack_rows
from quantkit.numerics.scale_candidates import COARSE
from quantkit.numerics.scale_search import search_scales
from quantkit.schemes import SCHEMES
from quantkit.solvers.gptq import compensate
from tests.numerics.kernels.cases import (
    CODE_SETS,
    SHAPES,
    descend_by_torch,
    exact_block,
    exact_descent,
    needed_of_square,
    normal_block,
    round_by_torch,
    same_bits,
)

pytestmark = [
    pytest.mark.kernels,
    # Sub-blocks of zeros are divided by, as in torch.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

EVERY_CODE_SET = pytest.mark.parametrize("scheme", CODE_SETS, ids=lambda scheme: scheme.name)


@EVERY_CODE_SET
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 999))
@settings(max_examples=12, derandomize=True, deadline=None)
def test_columns_are_rounded_as_torch_does(
    scheme: CodeSet, shape: tuple[int, int], seed: int
) -> None:
    """With ties, zeros of both signs, and the smallest of steps."""
    ours = exact_block(*shape, scheme, seed)
    theirs = ours.copy()

    kernels.round_columns(
        ours.block, ours.target, ours.lower, ours.steps, ours.offsets, scheme, ours.errors
    )

    round_by_torch(theirs, scheme)
    assert torch.equal(ours.target, theirs.target)
    assert torch.equal(ours.errors, theirs.errors)


@EVERY_CODE_SET
def test_columns_of_normal_weights_get_the_same_codes(scheme: CodeSet) -> None:
    """Nothing is exact here: products and sums are fused in the same places."""
    ours = normal_block(40, 64, scheme, seed=3)
    theirs = ours.copy()

    kernels.round_columns(
        ours.block, ours.target, ours.lower, ours.steps, ours.offsets, scheme, ours.errors
    )

    round_by_torch(theirs, scheme)
    assert torch.equal(ours.target, theirs.target)
    assert torch.allclose(ours.errors, theirs.errors, rtol=0, atol=1e-5)


def test_signs_of_zeros_are_kept() -> None:
    """Floating-point codes have them."""
    scheme = SCHEMES["fp8_dynamic"]
    ours = exact_block(5, 3, scheme, seed=0)
    theirs = ours.copy()
    kernels.round_columns(
        ours.block, ours.target, ours.lower, ours.steps, None, scheme, ours.errors
    )
    round_by_torch(theirs, scheme)
    assert same_bits(ours.target[:, 1:], theirs.target[:, 1:])


def test_a_tensor_that_is_not_contiguous_is_written_in_place() -> None:
    scheme = SCHEMES["w4a16"]
    ours = exact_block(5, 9, scheme, seed=1)
    theirs = ours.copy()
    wide = torch.zeros(5, 18)
    target = wide[:, ::2]
    target.copy_(ours.target)

    kernels.round_columns(ours.block, target, ours.lower, ours.steps, None, scheme, ours.errors)

    round_by_torch(theirs, scheme)
    assert torch.equal(target, theirs.target)
    assert not wide[:, 1::2].any()


@EVERY_CODE_SET
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 999))
@settings(max_examples=12, derandomize=True, deadline=None)
def test_descent_is_that_of_torch(scheme: CodeSet, shape: tuple[int, int], seed: int) -> None:
    """Of values and of the residual that follows them; a dead column keeps its codes."""
    values, steps, gain, offset, residual, inner = exact_descent(*shape, scheme, seed)
    expected, rest = values.clone(), residual.clone()

    kernels.descend_columns(values, steps, gain, offset, residual, inner, scheme)

    descend_by_torch(expected, steps, gain, offset, rest, inner, scheme)
    assert torch.equal(values, expected)
    assert torch.equal(residual, rest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("panel", [64, 192, 512])
@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (65, 70), (64, 300)])
def test_a_sum_of_squares_has_float32_digits(
    dtype: torch.dtype, panel: int, tokens: int, size: int
) -> None:
    """Within 2^-19 of the sum of magnitudes: products are exact, and sums are of float32."""
    generator = torch.Generator().manual_seed(tokens)
    rows = torch.randn(tokens, size, generator=generator).to(dtype)
    total = torch.ones(size, size)

    kernels.add_square(total, rows, panel)

    exact = rows.double().T @ rows.double() + 1
    bound = (rows.double().abs().T @ rows.double().abs() + 1) * 2**-19
    needed = needed_of_square(size, panel)
    assert bool(((total - exact).abs() <= bound)[needed].all())


def test_a_sum_of_squares_takes_rows_in_any_order() -> None:
    """Activations come as views: every second token, transposed."""
    base = torch.randn(40, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole, view = torch.zeros(20, 20), torch.zeros(20, 20)
    kernels.add_square(whole, base[::2].contiguous(), 512)
    kernels.add_square(view, base[::2].T.contiguous().T, 512)
    assert torch.equal(whole, view)


@pytest.mark.parametrize("name", ["w4a16", "w4a16_asym", "w8a16", "fp8_dynamic", "fp8_block"])
def test_the_cheapest_scales_are_those_of_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales and zero points of the search as a whole, under importances of columns and rows."""
    scheme = SCHEMES[name]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(9, 96, generator=generator)
    weight[2] = 0.0
    importance = torch.rand(96, generator=generator) + 0.1
    group_size = 32 if scheme.grouped else None
    found = search_scales(weight, scheme, group_size, torch.bfloat16, importance, COARSE)
    monkeypatch.setenv("QUANTKIT_KERNELS", "0")
    expected = search_scales(weight, scheme, group_size, torch.bfloat16, importance, COARSE)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@given(groups=st.integers(1, 3), size=st.sampled_from([1, 5, 32]), seed=st.integers(0, 999))
@settings(max_examples=15, derandomize=True, deadline=None)
def test_of_equal_costs_the_first_wins(groups: int, size: int, seed: int) -> None:
    """Scales come twice, and their costs are exact."""
    scheme = SCHEMES["w4a16_asym"]
    generator = torch.Generator().manual_seed(seed)
    grouped = torch.randint(-64, 65, (7, groups, size), generator=generator) / 16
    scales = (2.0 ** torch.randint(-3, 2, (4, 7, groups), generator=generator)).bfloat16()
    scales = torch.cat([scales, scales])
    zero = torch.randint(-8, 8, (4, 7, groups), generator=generator).to(torch.int8)
    zero = torch.cat([zero, zero])
    importance = torch.randint(0, 3, (1, groups, size), generator=generator).float()
    unit = torch.ones(7, groups)

    found = kernels.cheapest_scales(grouped, unit, scales, zero, importance, scheme)

    low, high = code_range(4)
    step, offset = scales.float().unsqueeze(3), zero.float().unsqueeze(3)
    values = (grouped / step).round().clamp(low - offset, high - offset)
    costs = ((values * step - grouped).square() * importance).sum(3)
    assert torch.equal(found, costs.argmin(0))


SHORT_GRIDS = (
    AffineGrid(15, -1.0, 0.1, 2, wraps=True),
    AffineGrid(3, -0.9, 0.05, 2),
    AffineGrid(3, -0.5, 0.1, 2, absolute=True, wraps=True),
)
"""With all that the grids of the types have, but for the many steps."""


@pytest.mark.parametrize("grid", SHORT_GRIDS)
def test_scales_and_minimums_of_k_quants_are_found_to_the_bit(grid: AffineGrid) -> None:
    """Ordinary blocks, and zeros, equal weights, weights of one sign, huge ones, tiny ones."""
    x = torch.randn(8, 150, generator=torch.Generator().manual_seed(2))
    x[:, 0], x[:, 1], x[:, 2] = 0.0, 0.5, x[:, 2].abs() + 1
    x[:, 3], x[:, 4], x[0, 5] = x[:, 3] * 1e30, x[:, 4] * 1e-30, 1e9
    weights = x.abs() + 0.5
    found, expected = kernels.search_affine(x, weights, grid), search_affine(x, weights, grid)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("top", [4, 32])
def test_scales_of_k_quants_without_minimum_are_found_to_the_bit(top: int) -> None:
    """Of zeros as well, and of blocks whose sums overflow."""
    x = torch.randn(4, 150, generator=torch.Generator().manual_seed(3))
    x[:, 0], x[:, 1], x[:, 2] = 0.0, 1e-16, x[:, 2] * 1e20
    found, codes = kernels.search_symmetric(x, x * x, top)
    scale, expected = search_symmetric(x, x * x, top)
    assert torch.allclose(found, scale, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes, expected)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    bits=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, derandomize=True, deadline=None)
def test_codes_are_packed_as_torch_packs_them(
    rows: int, columns: int, bits: int, seed: int
) -> None:
    low, high = code_range(bits)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, high + 1, (rows, columns), generator=generator).to(torch.int8)
    ours = kernels.pack_rows(codes, bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_KERNELS", "0")
        assert torch.equal(ours, pack_rows(codes, bits))


@pytest.mark.parametrize("name", ["w4a16_asym", "fp8_dynamic"])
def test_compensated_rounding_finds_the_same_codes_with_kernels(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks of columns, the second of them short."""
    scheme = SCHEMES[name]
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(20, 160, generator=generator)
    inputs = torch.randn(400, 160, generator=generator)
    factor = factor_moment(inputs.T @ inputs / 400, torch.arange(160), 0.01)
    assert factor is not None
    group_size = 32 if scheme.grouped else None
    scales = search_scales(weight, scheme, group_size, torch.bfloat16, torch.ones(160), COARSE)
    found = compensate(weight, *scales, scheme, factor)
    monkeypatch.setenv("QUANTKIT_KERNELS", "0")
    expected = compensate(weight, *scales, scheme, factor)
    assert torch.equal(found.view(torch.int8), expected.view(torch.int8))


def test_a_k_quant_has_the_same_bytes_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Q6_K, the quickest to search; without numba the kernels would be taken here."""
    weight = torch.randn(2, 256, generator=torch.Generator().manual_seed(5))
    found = encode_rows(GGML_TYPES["Q6_K"], weight, None)
    monkeypatch.setenv("QUANTKIT_KERNELS", "0")
    assert torch.equal(found, encode_rows(GGML_TYPES["Q6_K"], weight, None))


def test_a_kernel_that_does_not_work_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """All work here; one that computed something else would end the job in one line."""
    from quantkit.numerics.kernels import trial

    cpu = torch.device("cpu")
    trial.try_kernels(cpu)
    monkeypatch.setitem(trial._CHECKS, "add_square", lambda device: False)
    with pytest.raises(QuantkitError, match=r"kernel add_square .* finds something else"):
        trial.try_kernels(cpu)
