import pytest
import torch

from quantkit.ggml_types import GGML_TYPES
from quantkit.numerics.ggml.nonlinear import NONLINEAR_KINDS, encode_nonlinear, nearest_codes
from quantkit.numerics.ggml.packing import pack
from tests.ggml_oracle import encode_with_ggml
from tests.numerics.ggml.tensors import IMPORTANCES, TENSORS, normal

KINDS = sorted(NONLINEAR_KINDS)
VALUES = torch.tensor(GGML_TYPES["IQ4_NL"].values)


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_those_of_llama_cpp(name: str, tensor: str) -> None:
    kind, weight = GGML_TYPES[name], TENSORS[tensor]()
    data = pack(encode_nonlinear(kind, weight, None))
    assert torch.equal(data, encode_with_ggml(kind, weight, None))


@pytest.mark.parametrize("matrix", IMPORTANCES)
@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_those_of_llama_cpp_with_an_importance_matrix(name: str, matrix: str) -> None:
    kind = GGML_TYPES[name]
    for tensor, make in TENSORS.items():
        weight = make()
        importance = IMPORTANCES[matrix](weight.shape[1])
        data = pack(encode_nonlinear(kind, weight, importance))
        assert torch.equal(data, encode_with_ggml(kind, weight, importance)), tensor


def test_codes_stand_for_the_nearest_values_and_for_the_larger_of_two_as_near() -> None:
    levels = torch.cat([torch.arange(-1200, 1200) / 8, normal(1, 4096)[0] * 80])
    distances = (levels[:, None] - VALUES).abs()
    # The last of the least distances belongs to the largest value.
    expected = 15 - distances.flip(1).argmin(1)
    assert torch.equal(nearest_codes(levels).long(), expected)


def test_codes_of_what_is_not_finite_are_the_outermost() -> None:
    codes = nearest_codes(torch.tensor([-torch.inf, torch.inf, torch.nan, 1e30, -1e30]))
    assert codes.tolist() == [0, 15, 15, 15, 0]


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="Q4_0 is none of IQ4_NL, IQ4_XS"):
        encode_nonlinear(GGML_TYPES["Q4_0"], normal(), None)
