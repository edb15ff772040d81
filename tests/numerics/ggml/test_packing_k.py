from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from quantkit.ggml_types import GGML_TYPES, GgmlType
from quantkit.numerics.ggml.packing_k import pack_k, unpack_k

K_QUANTS = [GGML_TYPES[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")]


def random_bytes(kind: GgmlType, rows: int, columns: int) -> Tensor:
    """Any bytes are a tensor; scales that are not numbers are left out, being hard to compare."""
    generator = torch.Generator().manual_seed(1)
    shape = (rows, kind.row_bytes(columns))
    data = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    blocks = unpack_k(kind, data)
    blocks.d[~blocks.d.isfinite()] = 1.0
    if blocks.m is not None:
        blocks.m[~blocks.m.isfinite()] = 1.0
    return pack_k(blocks)


@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
def test_unpacked_bytes_are_the_weights_that_ggufs_own_reader_finds(kind: GgmlType) -> None:
    data = random_bytes(kind, 7, 768)
    kind_of_gguf = gguf.GGMLQuantizationType[kind.name]
    expected = gguf.quants.dequantize(data.numpy(), kind_of_gguf)
    found = unpack_k(kind, data).dequantize().numpy()
    assert found.shape == expected.shape == (7, 768)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
def test_packing_undoes_unpacking_of_any_bytes(kind: GgmlType) -> None:
    generator = torch.Generator().manual_seed(2)
    shape = (5, kind.row_bytes(512))
    data = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    packed = pack_k(unpack_k(kind, data))
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, data)


@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
def test_unpacked_integers_keep_to_the_ranges_of_the_type(kind: GgmlType) -> None:
    blocks = unpack_k(kind, random_bytes(kind, 16, 1024))
    for found, limits in (
        (blocks.codes, kind.codes),
        (blocks.sub_scales, kind.sub_scales),
        (blocks.sub_minimums, kind.sub_minimums),
    ):
        assert (found is None) == (limits is None)
        if found is not None and limits is not None:
            assert found.dtype == torch.int8
            assert (found.min().item(), found.max().item()) == limits


def test_a_type_without_super_blocks_is_not_served() -> None:
    with pytest.raises(ValueError, match="Q8_0 is no K-quant"):
        unpack_k(GGML_TYPES["Q8_0"], torch.zeros(1, 34, dtype=torch.uint8))
