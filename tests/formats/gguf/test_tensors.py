"""The tensors of a GGUF file, compared bit for bit with those of llama.cpp's converter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.errors import CheckpointError
from quantkit.formats.gguf.architecture import read_architecture
from quantkit.formats.gguf.tensors import (
    GgufTensor,
    lay_out_tensors,
    make_values,
    order_rows,
    permute_rows,
)
from tests.formats.gguf.models import CASES, Case, make_case, reopen

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/gguf/architectures.json").read_text())[
    "cases"
]


def lay_out(checkpoint: Checkpoint) -> dict[str, GgufTensor]:
    tensors = lay_out_tensors(checkpoint, read_architecture(checkpoint))
    named = {tensor.name: tensor for tensor in tensors}
    assert len(named) == len(tensors)
    return named


def values_of(checkpoint: Checkpoint, tensor: GgufTensor) -> Tensor:
    weight = None if tensor.source is None else read_tensor(checkpoint, tensor.source)
    return make_values(tensor, weight)


@pytest.mark.parametrize("case", CASES)
def test_the_tensors_are_those_of_llama_cpps_converter(case: str, tmp_path: Path) -> None:
    checkpoint = make_case(tmp_path, CASES[case])
    tensors = lay_out(checkpoint)
    golden = GOLDEN[case]["tensors"]
    assert tensors.keys() == golden.keys()
    for name, (shape, *expected) in golden.items():
        values = values_of(checkpoint, tensors[name])
        assert values.shape == tensors[name].shape
        assert "x".join(map(str, values.shape)) == shape, name
        if tensors[name].source is None:
            # Powers differ in the last bit from one kind of CPU to another.
            np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6)
        else:
            assert hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16] == expected[0], name


def test_rows_are_dealt_out_within_each_head() -> None:
    # Two heads of four channels: transformers turns 0 with 2 and 1 with 3.
    assert order_rows(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_packed_rows_are_permuted_as_the_weights_are(tmp_path: Path) -> None:
    checkpoint = make_case(tmp_path, CASES["llama"])
    for name, heads in (("blk.1.attn_q.weight", 4), ("blk.1.attn_k.weight", 2)):
        tensor = lay_out(checkpoint)[name]
        assert tensor.heads == heads
        assert tensor.source is not None
        weight = read_tensor(checkpoint, tensor.source).float()
        packed = weight.numpy().view(np.uint8)
        moved = permute_rows(tensor, torch.from_numpy(packed)).numpy().view(np.float32)
        assert np.array_equal(moved, make_values(tensor, weight).numpy())
        assert not np.array_equal(moved, weight.numpy())


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_only_llamas_rows_are_permuted(case: str, tmp_path: Path) -> None:
    assert all(
        tensor.heads is None for tensor in lay_out(make_case(tmp_path, CASES[case])).values()
    )


def test_tensors_know_their_block_and_their_part_in_the_mix(tmp_path: Path) -> None:
    tensors = lay_out(make_case(tmp_path, CASES["phi3"]))
    fused = tensors["blk.1.attn_qkv.weight"]
    assert (fused.block, fused.role, fused.quantizable) == (1, "attn_qkv", True)
    norm = tensors["blk.1.attn_norm.weight"]
    assert (norm.block, norm.role, norm.quantizable) == (1, "other", False)
    assert (tensors["output.weight"].block, tensors["output.weight"].role) == (None, "output")


def test_llama3_frequencies_are_those_that_transformers_computes(tmp_path: Path) -> None:
    checkpoint = make_case(tmp_path, CASES["llama3"])
    factors = values_of(checkpoint, lay_out(checkpoint)["rope_freqs.weight"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    plain = 1.0 / 500000.0 ** (torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)
    assert (factors.min(), factors.max()) == (1, 8)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Checkpoint:
    """Write a checkpoint again with other tensors."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return reopen(folder)


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def test_a_tied_output_layer_that_is_stored_again_is_left_out(tmp_path: Path) -> None:
    make_case(tmp_path, CASES["qwen3"])
    same = change(tmp_path, lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()}))
    assert "output.weight" not in lay_out(same)


def test_an_output_layer_that_is_not_the_embedding_is_kept(tmp_path: Path) -> None:
    make_case(tmp_path, CASES["qwen3"])
    other = change(tmp_path, lambda weights: weights.update({HEAD: weights[EMBEDDING] * 2}))
    assert lay_out(other)["output.weight"].source == HEAD


def test_gemma2_cannot_have_an_output_layer_of_its_own(tmp_path: Path) -> None:
    make_case(tmp_path, CASES["gemma2"])
    other = change(tmp_path, lambda weights: weights.update({HEAD: weights[EMBEDDING] * 2}))
    with pytest.raises(CheckpointError, match="no output layer of its own for gemma2"):
        lay_out(other)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    make_case(tmp_path, CASES["llama"])
    less = change(tmp_path, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"pico lacks .*model\.layers\.\*\.mlp\.up_proj"):
        lay_out(less)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_norm.weight", "model.vision.weight", "lm_head.bias"]
)
def test_a_tensor_without_a_place_is_named(name: str, tmp_path: Path) -> None:
    make_case(tmp_path, CASES["llama"])
    more = change(tmp_path, lambda weights: weights.update({name: torch.ones(16)}))
    with pytest.raises(CheckpointError, match="without a place in a GGUF file of llama: "):
        lay_out(more)


def test_a_bias_that_llama_cpp_would_not_add_is_refused(tmp_path: Path) -> None:
    biases = ("q_proj", "k_proj", "v_proj", "o_proj")
    case = Case("qwen3", config={"attention_bias": True}, biases=biases)
    with pytest.raises(CheckpointError, match=r"place .* qwen3: .*o_proj\.bias"):
        lay_out(make_case(tmp_path, case))


def test_stored_buffers_of_old_checkpoints_are_not_needed(tmp_path: Path) -> None:
    make_case(tmp_path, CASES["llama"])
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    more = change(tmp_path, lambda weights: weights.update({name: torch.ones(8)}))
    assert name not in {tensor.source for tensor in lay_out(more).values()}


@pytest.mark.parametrize(
    ("name", "weight", "fault"),
    [
        (EMBEDDING, torch.ones(299, 64), "has 299 rows, vocab_size is 300"),
        ("model.norm.weight", torch.ones(64, 1), "has the shape"),
        ("model.layers.0.self_attn.q_proj.weight", torch.ones(62, 64), "62 rows for 4 heads of 16"),
        ("model.norm.weight", torch.ones(64, dtype=torch.int8), "is I8: GGUF files are made of"),
    ],
)
def test_a_tensor_with_another_shape_or_dtype_is_refused(
    name: str, weight: Tensor, fault: str, tmp_path: Path
) -> None:
    make_case(tmp_path, CASES["llama"])
    with pytest.raises(CheckpointError, match=fault):
        lay_out(change(tmp_path, lambda weights: weights.update({name: weight})))


def test_a_made_tensor_needs_no_weight_and_another_one_does() -> None:
    made = GgufTensor("rope_freqs.weight", None, (2,), values=(1.0, 8.0))
    assert make_values(made, None).tolist() == [1.0, 8.0]
    with pytest.raises(ValueError, match=r"token_embd\.weight is made of model\.embed"):
        make_values(replace(made, name="token_embd.weight", source=EMBEDDING, values=None), None)
