import sys

import pytest
import torch

from quantkit.ggml_types import GGML_TYPES
from quantkit.numerics.ggml.codec import encode_rows
from quantkit.numerics.ggml.packing import pack
from quantkit.numerics.ggml.simple import SIMPLE_KINDS, encode_eight_bits_at_once, encode_simple
from tests.ggml_oracle import encode_with_ggml
from tests.numerics.ggml.tensors import IMPORTANCES, TENSORS, normal

KINDS = sorted(SIMPLE_KINDS)


@pytest.fixture(params=["torch", "numba"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With numba and as if it were not installed."""
    if request.param == "torch":
        monkeypatch.setitem(sys.modules, "quantkit.numerics.ggml.simple_compiled", None)
    else:
        pytest.importorskip("numba")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_those_of_llama_cpp(name: str, tensor: str) -> None:
    kind, weight = GGML_TYPES[name], TENSORS[tensor]()
    data = pack(encode_simple(kind, weight, None))
    assert torch.equal(data, encode_with_ggml(kind, weight, None))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("matrix", IMPORTANCES)
@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_those_of_llama_cpp_with_an_importance_matrix(name: str, matrix: str) -> None:
    kind = GGML_TYPES[name]
    for tensor, make in TENSORS.items():
        weight = make()
        importance = IMPORTANCES[matrix](weight.shape[1])
        data = pack(encode_simple(kind, weight, importance))
        assert torch.equal(data, encode_with_ggml(kind, weight, importance)), tensor


def test_eight_bits_are_rounded_away_from_zero_at_every_half() -> None:
    # The scale is exactly 1, so the codes are the rounded weights; numpy and torch round to even.
    steps = torch.arange(-254, 255) / 2
    below, above = (torch.nextafter(steps, torch.tensor(limit)) for limit in (-200.0, 200.0))
    weight = torch.cat([steps, below.clamp(-127, 127), above.clamp(-127, 127)])
    weight = torch.nn.functional.pad(weight, (0, -len(weight) % 31)).reshape(1, -1, 31)
    weight = torch.nn.functional.pad(weight, (0, 1), value=127.0).flatten(1)
    blocks = encode_simple(GGML_TYPES["Q8_0"], weight, None)
    assert torch.equal(blocks.d, torch.ones_like(blocks.d))
    exact = weight.double()
    expected = exact.sign() * (exact.abs() + 0.5).floor()
    assert torch.equal(blocks.codes.double(), expected)


def test_an_importance_matrix_lowers_the_loss_that_it_weighs() -> None:
    weight = normal(16)
    importance = IMPORTANCES["heavy tails"](512)
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        losses = [
            ((encode_simple(GGML_TYPES[name], weight, matrix).dequantize() - weight) ** 2).mul(
                importance
            )
            for matrix in (importance, None)
        ]
        assert losses[0].sum() < 0.9 * losses[1].sum()


@pytest.mark.usefixtures("way")
def test_rows_of_a_slice_are_encoded_like_a_copy() -> None:
    weight = normal(8, 1024)[::2, ::2]
    assert not weight.is_contiguous()
    for name in KINDS:
        kind = GGML_TYPES[name]
        for importance in (None, torch.ones(512)):
            data = pack(encode_simple(kind, weight, importance))
            assert torch.equal(data, pack(encode_simple(kind, weight.contiguous(), importance)))


@pytest.mark.parametrize("threads", [1, 2])
def test_eight_bits_at_once_are_the_bytes_of_llama_cpp(threads: int) -> None:
    pytest.importorskip("numba")
    kind, before = GGML_TYPES["Q8_0"], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tensor, make in TENSORS.items():
            weight = make()
            data = encode_eight_bits_at_once(weight)
            assert data is not None
            assert torch.equal(data, encode_with_ggml(kind, weight, None)), tensor
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e8])
def test_eight_bits_at_once_leave_what_does_not_fit_to_others(value: float) -> None:
    weight = normal()
    weight[3, 40] = value
    assert encode_eight_bits_at_once(weight) is None


def test_eight_bits_at_once_need_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quantkit.numerics.ggml.simple_compiled", None)
    assert encode_eight_bits_at_once(normal()) is None
    kind = GGML_TYPES["Q8_0"]
    data = encode_rows(kind, normal(), None)
    assert torch.equal(data, encode_with_ggml(kind, normal(), None))


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="IQ4_NL is none of Q4_0"):
        encode_simple(GGML_TYPES["IQ4_NL"], normal(), None)
