"""Which type each tensor has, compared with what llama.cpp's quantizer chose."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
import pytest

from quantkit.errors import InputError
from quantkit.formats.gguf.architecture import read_architecture
from quantkit.formats.gguf.mixes import (
    Mix,
    choose_types,
    fit_candidates,
    fitting_type,
    nearest_file_type,
)
from quantkit.formats.gguf.tensors import GgufTensor, lay_out_tensors
from quantkit.ggml_types import FILE_TYPES, GGML_TYPES
from tests.formats.gguf.models import MIXED, describe_headers

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/gguf/mixes.json").read_text())["cases"]


def mix_of(
    family: str, config: dict[str, Any], file_type: str, has_importance: bool
) -> tuple[tuple[GgufTensor, ...], Mix]:
    checkpoint = describe_headers(family, **config)
    architecture = read_architecture(checkpoint)
    tensors = lay_out_tensors(checkpoint, architecture)
    return tensors, choose_types(FILE_TYPES[file_type], tensors, architecture, has_importance)


def shorten(tensors: tuple[GgufTensor, ...], mix: Mix) -> dict[str, str]:
    """Types of the layers over the blocks, as the golden table writes them."""
    types: dict[str, list[str]] = {}
    for tensor in tensors:
        if len(tensor.shape) > 1:
            types.setdefault(tensor.name.split(".")[-2], []).append(mix.types[tensor.name].name)
    return {
        stem: ", ".join(f"{len(list(run))} {name}" for name, run in groupby(types[stem]))
        for stem in sorted(types)
    }


@pytest.mark.parametrize("case", MIXED)
def test_every_tensor_has_the_type_that_llama_cpp_gives_it(case: str) -> None:
    family, config = MIXED[case]
    checkpoint = describe_headers(family, **config)
    architecture = read_architecture(checkpoint)
    tensors = lay_out_tensors(checkpoint, architecture)
    compared = 0
    for name, file_type in FILE_TYPES.items():
        plain = GOLDEN[case][name]
        for has_importance in (False, True):
            weighed = GOLDEN[case].get(f"{name} imatrix", plain)
            expected = weighed if has_importance else plain
            if expected is None:
                assert file_type.needs_importance
                assert not has_importance
                with pytest.raises(InputError, match="choose Q2_K, or calibrate"):
                    choose_types(file_type, tensors, architecture, has_importance)
                continue
            mix = choose_types(file_type, tensors, architecture, has_importance)
            assert shorten(tensors, mix) == expected, (name, has_importance)
            compared += 1
    assert compared >= 2 * len(FILE_TYPES) - 1


def test_the_golden_table_knows_every_case_and_every_rule() -> None:
    assert set(GOLDEN) == set(MIXED)
    text = json.dumps(GOLDEN)
    assert all(f" {name}" in text for name in GGML_TYPES if name != "F32")


def test_file_types_have_the_numbers_of_gguf_py() -> None:
    for name, file_type in FILE_TYPES.items():
        known = "ALL_F32" if name == "F32" else f"MOSTLY_{name}"
        assert file_type.number == gguf.LlamaFileType[known]


def test_norms_and_biases_stay_in_float32_in_every_file() -> None:
    family, config = MIXED["qwen2-80"]
    for file_type in FILE_TYPES:
        tensors, mix = mix_of(family, {**config, "num_hidden_layers": 2}, file_type, True)
        small = [tensor.name for tensor in tensors if len(tensor.shape) == 1]
        assert len(small) == 2 * 5 + 1
        assert {mix.types[name].name for name in small} == {"F32"}


def test_the_types_are_in_the_order_of_the_tensors() -> None:
    tensors, mix = mix_of(*MIXED["llama-6"], "Q4_K_M", False)
    assert list(mix.types) == [tensor.name for tensor in tensors]


def test_a_type_that_does_not_fit_is_replaced_and_said_once_for_each_kind_of_layer() -> None:
    _, mix = mix_of(*MIXED["llama-288-columns"], "Q4_K_S", False)
    assert (
        "blk.*.attn_q.weight: 288 columns are not whole blocks of Q4_K, so 9 of them get Q5_0"
    ) in mix.notes
    assert (
        "token_embd.weight: 288 columns are not whole blocks of Q6_K, so it gets Q8_0" in mix.notes
    )
    assert len(mix.notes) == len(set(mix.notes))


def test_nothing_is_said_where_every_type_fits() -> None:
    assert mix_of(*MIXED["llama-6"], "Q4_K_M", False)[1].notes == ()


def test_every_type_has_something_to_fall_back_to() -> None:
    for kind in GGML_TYPES.values():
        assert fitting_type(kind, 512) == kind
        assert fitting_type(kind, 288).block <= 32
        assert fitting_type(kind, 48).block == 1


def test_candidates_with_the_same_stand_in_are_one() -> None:
    names = ["Q3_K", "Q2_K", "Q4_K", "Q4_K", "Q6_K", "Q8_0"]
    assert fit_candidates(names, 512) == ("Q3_K", "Q2_K", "Q4_K", "Q6_K", "Q8_0")
    assert fit_candidates(names, 288) == ("Q4_0", "Q5_0", "Q8_0")
    assert fit_candidates(names, 48) == ("F16",)


@pytest.mark.parametrize(
    ("most", "name"),
    [("Q3_K", "Q3_K_M"), ("Q4_K", "Q4_K_M"), ("Q6_K", "Q6_K"), ("Q2_K", "Q2_K"), ("F16", "F16")],
)
def test_a_file_without_a_mix_is_called_after_what_most_weights_of_the_blocks_have(
    most: str, name: str
) -> None:
    """By weights: there are more small layers than large ones, and the embedding is the largest."""
    tensors, _ = mix_of(*MIXED["llama-6"], "Q8_0", False)
    types = {tensor.name: most if tensor.role.startswith("ffn_") else "Q5_0" for tensor in tensors}
    assert nearest_file_type(tensors, types).name == name
