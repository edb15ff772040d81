from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.checkpoint.families import Family, load_family
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.checkpoint.source import resolve_source
from quantkit.checkpoint.structure import apply_family, find_groups, output_embedding_name
from quantkit.checkpoint.trace import trace_blocks
from quantkit.errors import CheckpointError
from quantkit.records import FoldPlan
from tests.helpers import make_pico_model, write_shards


def make(root: Path, family: str) -> Checkpoint:
    folder = make_pico_model(
        root / family, family=family, hidden=32, intermediate=48, vocab=64, tokenizer=False
    )
    return open_checkpoint(resolve_source(str(folder)))


def make_other(folder: Path, family: str, **settings: Any) -> Checkpoint:
    """A model whose config is not like Llama's."""
    config = AutoConfig.for_model(family, vocab_size=64, pad_token_id=0, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    config.save_pretrained(folder)
    tied = model.all_tied_weights_keys
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    write_shards(folder, state)
    return open_checkpoint(resolve_source(str(folder)))


def short(checkpoint: Checkpoint, index: int = 1) -> list[list[str]]:
    """The groups of one block, each layer by the last part of its name."""
    block = find_groups(checkpoint).blocks[index]
    return [[name.rpartition(".")[2] for name in group.linears] for group in block.groups]


LLAMA_GROUPS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_fallback_finds_what_the_data_file_says(tmp_path: Path, family: str) -> None:
    """Groups, their order and the fused layers are the same; the trace knows no folds."""
    checkpoint = make(tmp_path, family)
    structure = find_groups(checkpoint)
    traced = trace_blocks(checkpoint)

    assert structure.family == family
    assert structure.notes == ()
    assert len(structure.blocks) == len(traced) == 2
    for known, found in zip(structure.blocks, traced, strict=True):
        assert found.prefix == known.prefix
        assert found.fused == known.fused
        assert [group.linears for group in found.groups] == [g.linears for g in known.groups]
        assert all(group.fold is None for group in found.groups)


def test_data_file_places_the_folds(tmp_path: Path) -> None:
    """v_proj feeds o_proj once for each query head of a key/value head."""
    folds = [group.fold for group in find_groups(make(tmp_path, "qwen3")).blocks[1].groups]

    inside = "model.layers.1"
    assert folds == [
        FoldPlan(f"{inside}.input_layernorm", "norm"),
        FoldPlan(f"{inside}.self_attn.v_proj", "linear", 2, 8),
        FoldPlan(f"{inside}.post_attention_layernorm", "norm"),
        FoldPlan(f"{inside}.mlp.up_proj", "linear"),
    ]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("olmo2", LLAMA_GROUPS),
        ("gemma2", LLAMA_GROUPS),
        ("stablelm", LLAMA_GROUPS),
        ("phi3", [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]),
        (
            "cohere",
            [["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj"], ["down_proj"]],
        ),
    ],
)
def test_families_without_a_data_file_are_traced(
    tmp_path: Path, family: str, expected: list[list[str]]
) -> None:
    """Norms behind the projections, fused and parallel layouts, every block."""
    checkpoint = make(tmp_path, family)

    assert find_groups(checkpoint).family == "structural"
    assert [short(checkpoint, index) for index in (0, 1)] == [expected, expected]


def test_linear_layers_with_a_forward_of_their_own_are_traced(tmp_path: Path) -> None:
    """Falcon's multiply without torch's linear."""
    checkpoint = make_other(
        tmp_path, "falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )

    assert short(checkpoint) == [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]]


def test_layers_outside_of_the_blocks_are_noted(tmp_path: Path) -> None:
    """OPT's projections between embedding and blocks are in no group, and that is said."""
    checkpoint = make_other(
        tmp_path,
        "opt",
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        max_position_embeddings=32,
    )
    skeleton = build_skeleton(checkpoint)

    assert find_groups(checkpoint, skeleton).notes == (
        "left alone: model.decoder.project_out (in no input group)",
        "left alone: model.decoder.project_in (in no input group)",
    )
    assert output_embedding_name(skeleton) == "lm_head"


def test_matrices_that_are_no_linear_layers_are_noted(tmp_path: Path) -> None:
    """Experts kept as one tensor, and their router, are not quantized: nothing is silent."""
    checkpoint = make_other(
        tmp_path,
        "gpt_oss",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    structure = find_groups(checkpoint)

    assert short(checkpoint) == [["q_proj", "k_proj", "v_proj"], ["o_proj"]]
    assert (
        "left alone: model.layers.*.mlp.experts.down_proj (not a linear layer)" in structure.notes
    )
    assert "left alone: model.layers.*.mlp.router.weight (not a linear layer)" in structure.notes


def test_tracing_takes_no_memory_for_the_weights(tmp_path: Path) -> None:
    """Blocks of ten gigabytes are traced within a few megabytes: no matrix is filled."""
    checkpoint = make(tmp_path, "olmo2")
    wide = dict(checkpoint.config, hidden_size=2**13, intermediate_size=2**16, head_dim=2**11)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    (first, _) = trace_blocks(Checkpoint(checkpoint.source, wide, checkpoint.tensors, ()))

    assert [len(group.linears) for group in first.groups] == [3, 1, 2, 1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_model_without_a_list_of_blocks_is_explained(tmp_path: Path) -> None:
    """Where nothing of the kind is called, a family file is what helps."""
    checkpoint = make(tmp_path, "olmo2")
    empty = dict(checkpoint.config, num_hidden_layers=0)

    with pytest.raises(CheckpointError, match="no list of decoder blocks"):
        trace_blocks(Checkpoint(checkpoint.source, empty, checkpoint.tensors, ()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks": "model.layer"}, "layer"),
        ({"blocks": "model.norm"}, "is not a list of blocks"),
        ({"final_norm": "model.ln_f"}, "ln_f"),
    ],
)
def test_data_file_that_does_not_fit_is_explained(
    tmp_path: Path, change: dict[str, str], words: str
) -> None:
    """It names what the model does not have."""
    family = load_family("llama")
    assert family is not None
    wrong = Family.model_validate({**family.model_dump(), **change})

    with pytest.raises(CheckpointError, match="family file llama does not describe") as caught:
        apply_family(wrong, build_skeleton(make(tmp_path, "llama")))
    assert words in str(caught.value)
