"""The kernels on a GPU against torch on the same GPU, at the sizes of real layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from quantkit.ggml_types import GGML_TYPES
from quantkit.numerics import kernels
from quantkit.numerics.affine import CodeSet, code_range, decode
from quantkit.numerics.ggml.codec import encode_rows
from quantkit.numerics.linalg import row_losses
from quantkit.numerics.packing import pack_rows
from quantkit.numerics.scale_search import search_scales
from quantkit.records import LayerStats
from quantkit.schemes import EFFORTS, SCHEMES
from quantkit.solvers.gptq import round_compensated
from tests.numerics.kernels.cases import (
    CODE_SETS,
    descend_by_torch,
    exact_block,
    exact_descent,
    needed_of_square,
    normal_block,
    round_by_torch,
)

pytestmark = pytest.mark.gpu

ROWS = 4096
EVERY_CODE_SET = pytest.mark.parametrize("scheme", CODE_SETS, ids=lambda scheme: scheme.name)


@contextmanager
def without_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_KERNELS", "0")
        yield


def normal(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def test_every_kernel_is_used_here(cuda: torch.device) -> None:
    """Each was compiled and found what torch finds."""
    assert kernels.missing_kernels(cuda) == ()
    assert kernels.kernels_available(cuda)


@EVERY_CODE_SET
@pytest.mark.parametrize(("columns", "rows"), [(128, ROWS), (128, 1), (77, 1000)])
def test_columns_are_rounded_as_torch_does(
    cuda: torch.device, scheme: CodeSet, columns: int, rows: int
) -> None:
    """To the bit where no operation rounds, and twice the same."""
    first = exact_block(columns, rows, scheme, 0, cuda)
    again, theirs = first.copy(), first.copy()
    for case in (first, again):
        kernels.round_columns(
            case.block, case.target, case.lower, case.steps, case.offsets, scheme, case.errors
        )
    round_by_torch(theirs, scheme)
    assert torch.equal(first.target, theirs.target)
    assert torch.equal(first.errors, theirs.errors)
    assert torch.equal(first.target, again.target)


@EVERY_CODE_SET
def test_columns_of_normal_weights_get_the_same_codes(cuda: torch.device, scheme: CodeSet) -> None:
    """All but one in ten thousand, should this torch fuse other operations than the kernel."""
    ours = normal_block(128, ROWS, scheme, 1, cuda)
    again, theirs = ours.copy(), ours.copy()
    for case in (ours, again):
        kernels.round_columns(
            case.block, case.target, case.lower, case.steps, case.offsets, scheme, case.errors
        )
    round_by_torch(theirs, scheme)
    assert (ours.target != theirs.target).float().mean().item() <= 1e-4
    assert torch.equal(ours.target, again.target)
    assert torch.equal(ours.errors, again.errors)


@EVERY_CODE_SET
def test_descent_is_that_of_torch(cuda: torch.device, scheme: CodeSet) -> None:
    values, steps, gain, offset, residual, inner = exact_descent(128, ROWS, scheme, 2, cuda)
    expected, rest = values.clone(), residual.clone()
    kernels.descend_columns(values, steps, gain, offset, residual, inner, scheme)
    descend_by_torch(expected, steps, gain, offset, rest, inner, scheme)
    assert (values != expected).float().mean().item() <= 1e-4
    assert torch.allclose(residual, rest, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "size"), [(4096, 2048), (1000, 300), (1, 4096)])
def test_a_sum_of_squares_has_float32_digits(
    cuda: torch.device, dtype: torch.dtype, tokens: int, size: int
) -> None:
    """Within 2^-16 of the sum of magnitudes, for thousands of tokens; twice the same."""
    rows = normal(cuda, tokens, size).to(dtype)
    first, again = torch.ones(size, size, device=cuda), torch.ones(size, size, device=cuda)
    for total in (first, again):
        kernels.add_square(total, rows, 512)
    exact = rows.double().T @ rows.double() + 1
    bound = (rows.double().abs().T @ rows.double().abs() + 1) * 2**-16
    needed = needed_of_square(size, 512).to(cuda)
    assert bool(((first - exact).abs() <= bound)[needed].all())
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", ["w4a16", "w4a16_asym", "w8a16", "fp8_dynamic", "fp8_block"])
def test_searched_scales_cost_no_more_than_those_of_torch(cuda: torch.device, name: str) -> None:
    """Nearly all are the same; where sums differ in their last digit, neither is better."""
    scheme, weight = SCHEMES[name], normal(cuda, 1000, 2048)
    importance = normal(cuda, 2048, seed=1).square() + 0.1
    group_size = 128 if scheme.grouped else None
    found = search_scales(weight, scheme, group_size, torch.bfloat16, importance)
    with without_kernels():
        expected = search_scales(weight, scheme, group_size, torch.bfloat16, importance)
    assert (found[0] != expected[0]).float().mean().item() <= 1e-3


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_have_the_bytes_of_the_cpu(cuda: torch.device, name: str, weighted: bool) -> None:
    """Which are llama.cpp's."""
    weight = normal(cuda, 64, 2048)
    importance = normal(cuda, 2048, seed=1).square() if weighted else None
    found = encode_rows(GGML_TYPES[name], weight, importance)
    on_cpu = None if importance is None else importance.cpu()
    assert torch.equal(found.cpu(), encode_rows(GGML_TYPES[name], weight.cpu(), on_cpu))


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_packed_as_on_the_cpu(cuda: torch.device, bits: int) -> None:
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (3001, 4097), device=cuda).to(torch.int8)
    assert torch.equal(pack_rows(codes, bits).cpu(), pack_rows(codes.cpu(), bits))


@pytest.mark.parametrize("name", ["w4a16", "w4a16_asym", "w8a16", "fp8_dynamic", "fp8_block"])
def test_a_layer_is_rounded_as_well_as_without_kernels(cuda: torch.device, name: str) -> None:
    """Its loss is the same within a thousandth, and it is the same layer every time."""
    scheme, weight = SCHEMES[name], normal(cuda, 512, 1024) / 32
    inputs = normal(cuda, 4096, 1024, seed=1) * (normal(cuda, 1024, seed=2).exp() + 0.1)
    moment = inputs.T @ inputs / len(inputs)
    stats = LayerStats(
        second_moment=moment,
        tokens=len(inputs),
        mean=inputs.mean(0),
        absmax=inputs.abs().amax(0),
        sample=inputs[:64],
    )

    def solve() -> tuple[Tensor, float]:
        group_size = 128 if scheme.grouped else None
        found = round_compensated(
            weight, scheme, group_size, torch.bfloat16, stats, EFFORTS["normal"]
        )
        error = decode(found.codes, found.scale, found.zero_point, scheme) - weight
        return found.codes.view(torch.int8), float(row_losses(error, moment).sum())

    (codes, loss), (again, _) = solve(), solve()
    with without_kernels():
        _, expected = solve()
    assert loss == pytest.approx(expected, rel=1e-3)
    assert torch.equal(codes, again)
