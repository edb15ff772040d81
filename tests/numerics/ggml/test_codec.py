import re

import gguf
import numpy as np
import pytest
import torch

from quantkit.ggml_types import GGML_TYPES
from quantkit.numerics.ggml import codec
from quantkit.numerics.ggml.codec import decode, encode, encode_rows, pack, unpack
from tests.ggml_oracle import encode_with_ggml
from tests.numerics.ggml.tensors import IMPORTANCES, TENSORS, normal

QUANTIZED = [kind for kind in GGML_TYPES.values() if kind.quantized]
FLOATS = [kind for kind in GGML_TYPES.values() if not kind.quantized]


@pytest.mark.parametrize("kind", GGML_TYPES.values(), ids=lambda kind: kind.name)
def test_every_type_has_the_bytes_of_llama_cpp(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three rows at a time, so that the last chunk is a smaller one.
    monkeypatch.setattr(codec, "_CHUNK", 1600)
    weight = normal(8)
    for importance in (None, IMPORTANCES["uniform"](512)):
        expected = encode_with_ggml(kind, weight, importance)
        assert torch.equal(encode_rows(kind, weight, importance), expected)
        if kind.quantized:
            assert torch.equal(pack(encode(kind, weight, importance)), expected)


@pytest.mark.parametrize("kind", GGML_TYPES.values(), ids=lambda kind: kind.name)
def test_every_type_is_decoded_as_by_gguf_py(kind) -> None:
    data = encode_rows(kind, TENSORS["trained"]()[:8], None)
    if kind.name == "F32":
        expected = data.numpy().view(np.float32)
    else:
        expected = gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind.name])
    weights = decode(kind, data)
    assert weights.dtype == torch.float32
    assert np.array_equal(weights.numpy(), expected)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_bytes_survive_the_round_trip_over_blocks(kind) -> None:
    data = encode_rows(kind, normal(), None)
    assert torch.equal(pack(unpack(kind, data)), data)


@pytest.mark.parametrize("tensor", TENSORS)
def test_floating_point_has_the_bytes_of_llama_cpp(tensor: str) -> None:
    weight = TENSORS[tensor]()
    for kind in FLOATS:
        assert torch.equal(encode_rows(kind, weight, None), encode_with_ggml(kind, weight, None))


def test_floating_point_rounds_ties_to_even() -> None:
    step = 2.0**-8  # half of the step of bfloat16 at 1, 4 steps of float16
    weight = torch.tensor([[1 + step, 1 + 3 * step, 1 + step / 8, 1 + 3 * step / 8]])
    halves = decode(GGML_TYPES["F16"], encode_rows(GGML_TYPES["F16"], weight, None))
    assert halves.tolist() == [[1 + step, 1 + 3 * step, 1.0, 1 + step / 2]]
    bfloats = decode(GGML_TYPES["BF16"], encode_rows(GGML_TYPES["BF16"], weight, None))
    assert bfloats.tolist() == [[1.0, 1 + 4 * step, 1.0, 1.0]]


def test_what_float16_cannot_hold_is_an_error() -> None:
    kind = GGML_TYPES["F16"]
    assert decode(kind, encode_rows(kind, torch.tensor([[65519.0]]), None)) == 65504.0
    with pytest.raises(ValueError, match=r"weights of up to 6\.55e\+04 do not fit F16"):
        encode_rows(kind, torch.tensor([[1.0, -65520.0]]), None)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_scales_that_float16_cannot_hold_are_errors(kind) -> None:
    weight = normal(2)
    weight[1, 300] = 3e8
    for importance in (None, torch.ones(512)):
        for call in (encode, encode_rows):
            with pytest.raises(ValueError, match=rf"3e\+08 are too large for {kind.name}"):
                call(kind, weight, importance)


@pytest.mark.parametrize("kind", GGML_TYPES.values(), ids=lambda kind: kind.name)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_errors(kind, value: float) -> None:
    weight = normal(2)
    weight[1, 300] = value
    message = f"weight has {value} in row 1, column 300: {kind.name} holds finite values only"
    with pytest.raises(ValueError, match=re.escape(message)):
        encode_rows(kind, weight, None)


def test_an_importance_matrix_that_cannot_be_one_is_an_error() -> None:
    kind = GGML_TYPES["Q4_K"]
    for value in (torch.nan, torch.inf, -1.0):
        importance = torch.ones(512)
        importance[7] = value
        with pytest.raises(ValueError, match=rf"importance of column 7 is {value}"):
            encode(kind, normal(), importance)
    with pytest.raises(
        ValueError, match=r"importance is torch.float32 \[256\], not float32 \[512\]"
    ):
        encode(kind, normal(), torch.ones(256))
    with pytest.raises(ValueError, match=r"importance is torch.float64"):
        encode(kind, normal(), torch.ones(512, dtype=torch.float64))


def test_columns_that_are_not_whole_blocks_are_errors() -> None:
    with pytest.raises(ValueError, match="288 columns are not whole blocks of 256 of IQ4_XS"):
        encode_rows(GGML_TYPES["IQ4_XS"], normal(2, 288), None)
    with pytest.raises(ValueError, match="40 columns are not whole blocks of 32 of Q8_0"):
        encode(GGML_TYPES["Q8_0"], normal(2, 40), None)
    for kind in QUANTIZED:
        with pytest.raises(ValueError, match="are not whole blocks"):
            decode(kind, torch.zeros(1, kind.block_bytes + 1, dtype=torch.uint8))


def test_weights_of_another_kind_are_errors() -> None:
    with pytest.raises(ValueError, match=r"weight is torch.bfloat16 \[8, 512\], not float32"):
        encode_rows(GGML_TYPES["Q8_0"], normal().bfloat16(), None)
    with pytest.raises(ValueError, match="F16 has no codes"):
        encode(GGML_TYPES["F16"], normal(), None)
    with pytest.raises(ValueError, match="F16 has no codes"):
        unpack(GGML_TYPES["F16"], torch.zeros(1, 2, dtype=torch.uint8))


def test_empty_weights_are_errors() -> None:
    for shape in ((0, 512), (512, 0)):
        with pytest.raises(ValueError, match="is empty"):
            encode_rows(GGML_TYPES["Q8_0"], torch.zeros(shape), None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", GGML_TYPES.values(), ids=lambda kind: kind.name)
def test_a_gpu_chooses_the_same_bytes(kind) -> None:
    for tensor, make in TENSORS.items():
        weight = make()
        for importance in (None, IMPORTANCES["heavy tails"](weight.shape[1])):
            there = None if importance is None else importance.cuda()
            data = encode_rows(kind, weight.cuda(), there).cpu()
            assert torch.equal(data, encode_with_ggml(kind, weight, importance)), tensor
