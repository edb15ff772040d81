"""The hyperparameters of a GGUF file, compared with those of llama.cpp's converter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantkit.errors import CheckpointError
from quantkit.formats.gguf.architecture import (
    ARCHITECTURES,
    describe_architecture,
    label_size,
    note_differences,
    read_architecture,
)
from quantkit.formats.gguf.header import Value
from quantkit.formats.gguf.tensors import lay_out_tensors
from quantkit.ggml_types import FILE_TYPES
from tests.formats.gguf.models import CASES, describe_headers, make_case

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/gguf/architectures.json").read_text())[
    "cases"
]


def as_stored(value: Value) -> list[Any]:
    """Kind and content, rounded as the file rounds it."""
    content = value.content
    return [value.kind, float(np.float32(content)) if value.kind == "float32" else content]


@pytest.mark.parametrize("case", CASES)
def test_the_metadata_is_what_llama_cpps_converter_writes(case: str, tmp_path: Path) -> None:
    checkpoint = make_case(tmp_path, CASES[case])
    architecture = read_architecture(checkpoint)
    tensors = lay_out_tensors(checkpoint, architecture)
    parameters = sum(tensor.parameters for tensor in tensors)
    metadata = describe_architecture(architecture, parameters, "pico", FILE_TYPES["F32"])
    assert metadata.pop("general.name") == Value("string", "pico")
    assert {key: as_stored(value) for key, value in metadata.items()} == GOLDEN[case]["metadata"]


def test_every_architecture_is_in_the_golden_table() -> None:
    assert {case.family for case in CASES.values()} == set(ARCHITECTURES)
    assert set(GOLDEN) == set(CASES)


def test_the_file_type_is_the_number_of_llama_cpp() -> None:
    architecture = read_architecture(describe_headers("llama", **SMALL))
    metadata = describe_architecture(architecture, 1, "pico", FILE_TYPES["Q4_K_M"])
    assert metadata["general.file_type"] == Value("uint32", 15)


def test_numbers_of_weights_are_written_as_people_say_them() -> None:
    assert [label_size(count) for count in (5_800_000, 112_345, 1_235_814_400, 7_615_616_512)] == [
        "5.8M",
        "112K",
        "1.2B",
        "7.6B",
    ]
    assert [label_size(count) for count in (94, 70_553_706_496, 1_100_000_000_000)] == [
        "0.09K",
        "71B",
        "1.1T",
    ]


def test_an_architecture_that_is_not_built_is_refused_with_those_that_are() -> None:
    checkpoint = replace(describe_headers("llama", **SMALL), config={"model_type": "mixtral"})
    with pytest.raises(
        CheckpointError, match=r"'mixtral' are not built; built are gemma2, .*qwen3"
    ):
        read_architecture(checkpoint)


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "eos_token_id": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
GEMMA = {**SMALL, "head_dim": 16, "query_pre_attn_scalar": 16}


@pytest.mark.parametrize(
    ("family", "config", "fault"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation silu, not gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic' is not built for llama; built are default, linear, yarn, llama3",
        ),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic' is not built for qwen2",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor must be 1",
        ),
        ("qwen2", {"head_dim": 32}, "fill hidden_size 64, but head_dim is 32"),
        ("phi3", {"head_dim": 32}, "fill hidden_size 64, but head_dim is 32"),
        (
            "phi3",
            {
                "original_max_position_embeddings": 128,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 128,
                    "attention_factor": 1.5,
                    "long_factor": [1.0] * 8,
                    "short_factor": [1.0] * 8,
                },
            },
            "attention_factor of rope_type longrope is not built",
        ),
        ("qwen3", {"rope_parameters": {**YARN, "factor": None}}, "factor is None, which is no pos"),
        ("gemma2", {**GEMMA, "sliding_window": None}, "sliding_window is not set"),
        ("qwen3", {"rope_parameters": {**YARN, "mscale": 0.7}}, "mscale of rope_type yarn is not"),
        ("qwen3", {"rope_parameters": {**YARN, "truncate": False}}, "truncate must be true"),
        ("gemma2", {**GEMMA, "query_pre_attn_scalar": 256}, "by 16 .* -0.5, .* is 256"),
        ("gemma2", {**GEMMA, "attn_logit_softcapping": None}, "with attn_logit_softcapping None"),
        ("gemma3_text", {**GEMMA, "attn_logit_softcapping": 50.0}, "with attn_logit_softcapping 5"),
        ("gemma2", {**GEMMA, "final_logit_softcapping": None}, "without final_logit_softcapping"),
        (
            "gemma3_text",
            {**GEMMA, "layer_types": ["full_attention", "sliding_attention"]},
            "every 6th layer of gemma3",
        ),
        ("gemma3_text", {**GEMMA, "use_bidirectional_attention": True}, "causal attention"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(
    family: str, config: dict[str, Any], fault: str
) -> None:
    checkpoint = describe_headers(family, **{**SMALL, **config})
    with pytest.raises(CheckpointError, match=fault):
        read_architecture(checkpoint)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", 0), ("max_position_embeddings", 1 << 31), ("rms_norm_eps", 0.0)],
)
def test_numbers_that_cannot_be_are_refused(key: str, value: float) -> None:
    checkpoint = describe_headers("mistral", **SMALL)
    wrong = replace(checkpoint, config={**checkpoint.config, key: value})
    with pytest.raises(CheckpointError, match=f"{key} is {value}, which is no"):
        read_architecture(wrong)


def test_a_gemma3_without_sliding_layers_has_no_window() -> None:
    checkpoint = describe_headers("gemma3_text", **GEMMA, layer_types=["full_attention"] * 2)
    architecture = read_architecture(checkpoint)
    metadata = describe_architecture(architecture, 1, "pico", FILE_TYPES["F16"])
    assert "gemma3.attention.sliding_window" not in metadata


def test_another_base_of_the_rotary_embedding_is_written_for_gemma2_too() -> None:
    rope = {"rope_type": "default", "rope_theta": 20000.0}
    architecture = read_architecture(describe_headers("gemma2", **GEMMA, rope_parameters=rope))
    metadata = describe_architecture(architecture, 1, "pico", FILE_TYPES["F16"])
    assert metadata["gemma2.rope.freq_base"] == Value("float32", 20000.0)


def test_a_sliding_window_that_llama_cpp_lacks_is_noted_where_texts_can_be_longer() -> None:
    def notes(window: int | None) -> tuple[str, ...]:
        config = {**SMALL, "max_position_embeddings": 512, "sliding_window": window}
        return note_differences(read_architecture(describe_headers("mistral", **config)))

    assert len(notes(128)) == 1
    assert "beyond 128 tokens" in notes(128)[0]
    assert notes(512) == notes(None) == ()


def test_it_is_said_when_llama_cpp_takes_the_long_factors_of_longrope() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 128,
        "long_factor": [1.0] * 8,
        "short_factor": [1.0] * 8,
    }
    config = {**SMALL, "original_max_position_embeddings": 128, "rope_parameters": rope}
    (note,) = note_differences(read_architecture(describe_headers("phi3", **config)))
    assert "a context of 128 tokens at the most" in note
