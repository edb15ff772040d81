import gguf
import numpy as np
import pytest
import torch

from quantkit.ggml_types import GGML_TYPES
from quantkit.numerics.ggml.packing import PACKED_HERE, pack, unpack

KINDS = sorted(PACKED_HERE)


def random_bytes(name: str, rows: int = 3, blocks: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    size = (rows, blocks * GGML_TYPES[name].block_bytes)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("name", KINDS)
def test_any_bytes_survive_the_round_trip(name: str) -> None:
    data = random_bytes(name)
    assert torch.equal(pack(unpack(GGML_TYPES[name], data)), data)


@pytest.mark.parametrize("name", KINDS)
def test_blocks_have_the_shapes_and_ranges_of_their_type(name: str) -> None:
    kind = GGML_TYPES[name]
    blocks = unpack(kind, random_bytes(name))
    columns = 5 * kind.block
    assert blocks.codes.shape == (3, columns)
    assert blocks.codes.dtype == torch.int8
    assert (blocks.d.shape, blocks.d.dtype) == ((3, 5), torch.float16)
    assert (blocks.m is not None) == kind.has_minimum
    assert (blocks.sub_scales is not None) == (kind.sub_scales is not None)
    if name != "Q8_0":
        assert (blocks.codes.min(), blocks.codes.max()) == kind.codes
    if blocks.sub_scales is not None and kind.sub_scales is not None:
        assert blocks.sub_scales.shape == (3, columns // kind.sub_block)
        assert blocks.sub_scales.min() >= kind.sub_scales[0]
        assert blocks.sub_scales.max() <= kind.sub_scales[1]


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_those_of_gguf_py(name: str) -> None:
    data = random_bytes(name, blocks=64)
    # Any bytes do but those of scales that are not finite.
    fields = data.unflatten(1, (64, -1))
    fields[:, :, 1] &= 0xBF
    if GGML_TYPES[name].has_minimum:
        fields[:, :, 3] &= 0xBF
    expected = gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])
    weights = unpack(GGML_TYPES[name], data).dequantize()
    assert np.array_equal(weights.numpy(), expected)


def test_a_view_of_other_bytes_is_unpacked_like_a_copy() -> None:
    wide = random_bytes("Q4_0", rows=6)
    kind = GGML_TYPES["Q4_0"]
    assert torch.equal(unpack(kind, wide[::2]).codes, unpack(kind, wide[::2].clone()).codes)
    data = wide[:, kind.block_bytes :]
    assert torch.equal(pack(unpack(kind, data)), data)


def test_no_rows_are_packed_to_no_rows() -> None:
    for name in KINDS:
        data = random_bytes(name, rows=0)
        assert pack(unpack(GGML_TYPES[name], data)).shape == data.shape


def test_codes_and_scales_out_of_range_are_errors() -> None:
    blocks = unpack(GGML_TYPES["Q4_0"], random_bytes("Q4_0"))
    blocks.codes[1, 3] = 8
    with pytest.raises(ValueError, match=r"code 8 is outside of -8\.\.7 of Q4_0"):
        pack(blocks)
    blocks = unpack(GGML_TYPES["IQ4_XS"], random_bytes("IQ4_XS"))
    assert blocks.sub_scales is not None
    blocks.sub_scales[0, 0] = -33
    with pytest.raises(ValueError, match=r"scale of a sub-block -33 is outside"):
        pack(blocks)


def test_rows_that_are_not_whole_blocks_are_errors() -> None:
    with pytest.raises(ValueError, match="19 bytes are not whole blocks of 18 bytes of Q4_0"):
        unpack(GGML_TYPES["Q4_0"], torch.zeros(1, 19, dtype=torch.uint8))


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="Q4_K is none of"):
        unpack(GGML_TYPES["Q4_K"], torch.zeros(1, 144, dtype=torch.uint8))
