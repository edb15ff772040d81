"""Layers that the writers' own code packed, against the weights that their own code unpacked.

golden.safetensors holds, for layers of random weights [32, 64] in groups of 32, the tensors that
AutoGPTQ 0.8 (`qlinear_cuda.QuantLinear.pack`) and auto-round 0.15.1 (`qlinear_torch_zp`, and
`WQLinear_GEMM.from_linear` for AWQ) wrote, and `weight`: what AutoGPTQ's forward of the identity
and AutoAWQ 0.2.9's `dequantize_gemm` gave in float32; for auto-round the weight that was packed.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file

from quantkit.checkpoint.headers import read_header
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.readers.awq import find_awq_layer, read_awq_codes
from quantkit.formats.readers.description import StoredQuantization
from quantkit.formats.readers.gptq import find_gptq_layer, read_gptq_codes
from quantkit.formats.readers.layers import dequantize_codes
from quantkit.records import Source

GOLDEN = Path(__file__).with_name("golden.safetensors")

GPTQ = {
    "autogptq-4-asym-act": StoredQuantization(
        "gptq", "config.json", bits=4, group_size=32, symmetric=False, zero_offset=1
    ),
    "autogptq-8-sym": StoredQuantization(
        "gptq", "config.json", bits=8, group_size=32, zero_offset=1
    ),
    # Some zero points are 0: stored less one, they borrowed from their neighbours.
    "autoround-4-asym-zero": StoredQuantization(
        "gptq",
        "config.json",
        bits=4,
        group_size=32,
        symmetric=False,
        zero_offset=1,
        borrowing=True,
    ),
}
AWQ = StoredQuantization("awq", "config.json", bits=4, group_size=32, symmetric=False)


@pytest.fixture(scope="module")
def golden() -> Checkpoint:
    """The file as a checkpoint."""
    source = Source("golden", GOLDEN.parent, None)
    tensors = MappingProxyType(read_header(GOLDEN))
    return Checkpoint(source, MappingProxyType({}), tensors, ())


@pytest.mark.parametrize("name", GPTQ)
def test_gptq_layers_have_the_weights_of_their_writers(golden: Checkpoint, name: str) -> None:
    """Bit for bit."""
    layer = find_gptq_layer(golden, GPTQ[name], name)
    codes = read_gptq_codes(golden, GPTQ[name], layer)
    assert torch.equal(dequantize_codes(codes), load_file(GOLDEN)[f"{name}.weight"])
    assert (codes.group_index is not None) == name.endswith("-act")


def test_awq_layers_have_the_weights_of_their_writers(golden: Checkpoint) -> None:
    """Bit for bit."""
    layer = find_awq_layer(golden, AWQ, "autoawq-4-asym")
    codes = read_awq_codes(golden, AWQ, layer)
    assert torch.equal(dequantize_codes(codes), load_file(GOLDEN)["autoawq-4-asym.weight"])
