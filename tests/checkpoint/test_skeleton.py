from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, read_tensor
from quantkit.checkpoint.skeleton import (
    build_skeleton,
    summarize_names,
    tied_names,
    unknown_tensors,
)
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import CheckpointError
from tests.helpers import make_pico_model

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "gemma2"]


@pytest.fixture(scope="module")
def picos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("picos")
    return {
        family: make_pico_model(
            root / family,
            family=family,
            hidden=32,
            intermediate=48,
            vocab=64,
            tied=family != "qwen2",
            tokenizer=False,
        )
        for family in FAMILIES
    }


@pytest.fixture
def folder(picos: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(picos["llama"], tmp_path / "model"))


def open_folder(folder: Path) -> Checkpoint:
    return open_checkpoint(resolve_source(str(folder)))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_filled_skeleton_is_the_model_that_transformers_loads(
    picos: dict[str, Path], family: str
) -> None:
    """Meta parameters, real buffers; with the tensors put in, the logits are bit-equal."""
    checkpoint = open_folder(picos[family])
    skeleton = build_skeleton(checkpoint)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not any(buffer.is_meta for buffer in skeleton.buffers())
    assert not skeleton.training

    state = {name: read_tensor(checkpoint, name) for name in checkpoint.tensors}
    state |= {name: state[source] for name, source in tied_names(skeleton).items()}
    skeleton.load_state_dict(state, assign=True, strict=True)
    reference = AutoModelForCausalLM.from_pretrained(picos[family]).eval()
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert torch.equal(skeleton(ids).logits, reference(ids).logits)


def test_tied_head_is_one_parameter(picos: dict[str, Path]) -> None:
    """Also on the meta device; an untied model has none."""
    tied, untied = (build_skeleton(open_folder(picos[family])) for family in ("llama", "qwen2"))

    assert tied_names(tied) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert tied.get_parameter("lm_head.weight") is tied.get_parameter("model.embed_tokens.weight")
    assert tied_names(untied) == {}


def test_missing_tensor_is_named(folder: Path) -> None:
    """A checkpoint must have every parameter of its model."""
    tensors = load_file(folder / "model.safetensors")
    for layer in (0, 1):
        del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")

    with pytest.raises(
        CheckpointError, match=r"lacks 2 tensors .*: model\.layers\.\*\.mlp\.up_proj\.weight"
    ):
        build_skeleton(open_folder(folder))


def test_other_names_are_shown(folder: Path) -> None:
    """A checkpoint of another naming shows one of its names."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", "transformer."): value for name, value in tensors.items()}
    save_file(renamed, folder / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"it has transformer\.embed_tokens\.weight"):
        build_skeleton(open_folder(folder))


def test_other_shape_is_named(folder: Path) -> None:
    """Config and weights of two models in one folder."""
    edit_config(folder, intermediate_size=64)

    with pytest.raises(
        CheckpointError, match=r"mlp\.\w+_proj\.weight in .* has the shape \[\d+, \d+\], but"
    ):
        build_skeleton(open_folder(folder))


def test_tensors_without_a_place_are_known(folder: Path) -> None:
    """They are copied, so somebody must be able to say so; a stored tied head has its place."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_folder(folder)

    unknown = unknown_tensors(checkpoint, build_skeleton(checkpoint))

    assert unknown == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama"}, "does not know it; did you mean 'llama'?"),
        (
            {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}},
            "brings its own code (auto_map), which quantkit does not run",
        ),
        ({"model_type": None}, "has no model_type"),
        ({"model_type": "clip_vision_model"}, "is not a causal language model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "not yet built"),
        ({"head_dim": 1 << 29}, "inv_freq takes 1,073,741,824 bytes"),
        ({"num_hidden_layers": 10**9}, "announces 1000000000 layers"),
        (
            {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}},
            "announces 1000000000 layers ('num_hidden_layers')",
        ),
        ({"model_type": "gpt2", "n_layer": 10**9}, "announces 1000000000 layers ('n_layer')"),
        ({"parts": [{"decoder_layers": 10**9}]}, "announces 1000000000 layers ('decoder_layers')"),
        ({"layer_types": ["full_attention"] * 1000}, "announces 1000 layers ('layer_types')"),
        ({"hybrid_override_pattern": "M" * 1000}, "announces 1000 layers ('hybrid"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"dtype": "float7"}, "config.json"),
    ],
)
def test_config_that_cannot_be_used_is_explained(
    folder: Path, changes: dict[str, Any], words: str
) -> None:
    """One line that names the file and the reason."""
    edit_config(folder, **changes)

    with pytest.raises(CheckpointError) as caught:
        build_skeleton(open_folder(folder))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_named_by_a_known_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    """auto_map beside a model type that transformers knows is ignored, as is a kernel's name."""
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit_config(
        folder,
        auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.C"},
        _attn_implementation="somebody/kernels",
        attn_implementation="somebody/kernels",
        experts_implementation="somebody/kernels",
    )

    skeleton = build_skeleton(open_folder(folder))

    assert type(skeleton).__module__.startswith("transformers.")
    assert not (tmp_path / "ran").exists()


def test_names_are_joined_over_their_numbers() -> None:
    """Only whole numbers between dots are layers."""
    names = ["a.0.b1.w", "a.11.b1.w", "a.2.c.3", "d"]

    assert summarize_names(names) == ("a.*.b1.w", "a.*.c.*", "d")
