"""Checkpoints of random weights are what transformers expects of such a Llama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import shapes
import torch
from safetensors.torch import load_file
from shapes import DEMO, SHAPES, make_config, write_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

TINY = SHAPES["tiny"]


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, by the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        tensors |= load_file(folder / name)
    assert tensors.keys() == index["weight_map"].keys()
    return tensors


def test_a_checkpoint_has_the_tensors_of_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a tensor is written in several pieces."""
    monkeypatch.setattr(shapes, "CHUNK", 10_000)
    written = write_checkpoint(TINY, tmp_path)
    tensors = load(tmp_path)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**make_config(TINY)))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert written == TINY.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        if tensor.dim() == 2:
            assert 0.018 < float(tensor.float().std()) < 0.022, name
        else:
            assert (tensor == 1).all()


def test_no_two_matrices_are_the_same(tmp_path: Path) -> None:
    """Each tensor has a seed of its own."""
    write_checkpoint(TINY, tmp_path)
    square = [tensor for tensor in load(tmp_path).values() if tensor.shape == (128, 128)]
    assert len(square) == 4
    assert len({tensor.float().sum().item() for tensor in square}) == 4


def test_a_shortened_model_has_the_first_blocks_of_the_whole(tmp_path: Path) -> None:
    """The same weights under the same names, and the head."""
    write_checkpoint(TINY, tmp_path / "whole")
    write_checkpoint(TINY.shortened(1), tmp_path / "short")
    whole, short = load(tmp_path / "whole"), load(tmp_path / "short")
    assert short.keys() == {name for name in whole if ".layers.1." not in name}
    assert all(torch.equal(whole[name], tensor) for name, tensor in short.items())
    assert json.loads((tmp_path / "short" / "config.json").read_text())["num_hidden_layers"] == 1


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written."""
    monkeypatch.setattr(shapes, "SPARE_BYTES", 10**18)
    with pytest.raises(SystemExit, match="are free"):
        write_checkpoint(TINY, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_demo_is_the_bundled_model() -> None:
    """Its dimensions are those of its config.json."""
    config = json.loads((DEMO / "config.json").read_text())
    ours = make_config(SHAPES["demo"])
    for key in ours.keys() & config.keys() - {"eos_token_id", "bos_token_id", "pad_token_id"}:
        assert config[key] == ours[key], key


def test_the_large_shapes_have_the_sizes_that_they_are_named_by() -> None:
    """In bytes of bfloat16."""
    assert SHAPES["16gb"].weight_bytes == 2 * 8_030_261_248  # Llama-3.1-8B
    assert 2.0e9 < SHAPES["2gb"].weight_bytes < 2.1e9
    assert SHAPES["0.5b"].block_weights == 14_909_440  # Qwen2-0.5B's, less its biases
