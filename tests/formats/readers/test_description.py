"""What a config says about its quantization, and what is refused with its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import ArtifactError
from quantkit.formats.readers.description import StoredQuantization, find_quantization
from tests.formats.readers.packers import awq_config, fp8_config, gptq_config


def find(folder: Path, described: dict[str, Any] | None) -> StoredQuantization | None:
    config = {} if described is None else {"quantization_config": described}
    return find_quantization(folder, config)


def test_a_config_without_a_description_is_not_quantized(tmp_path: Path) -> None:
    """And no file beside it says otherwise."""
    assert find(tmp_path, None) is None


def test_both_layouts_of_gptq(tmp_path: Path) -> None:
    """The first stores zero points less one; `format` is GPTQModel's newer key."""
    first = find(tmp_path, gptq_config(sym=True, desc_act=True, group_size=-1))
    assert first == StoredQuantization(
        "gptq", "config.json", bits=4, group_size=None, symmetric=True, zero_offset=1
    )
    second = find(tmp_path, gptq_config(checkpoint_format="gptq_v2", bits=8))
    assert second == StoredQuantization(
        "gptq", "config.json", bits=8, group_size=32, symmetric=False
    )
    newer = gptq_config(format="gptq_v2", checkpoint_format=None)
    assert find(tmp_path, newer) == StoredQuantization(
        "gptq", "config.json", bits=4, group_size=32, symmetric=False
    )


@pytest.mark.parametrize(
    "told",
    [
        {"meta": {"quantizer": ["optimum:2.0", "gptqmodel:2.1.0"]}},
        {"meta": {"quantizer": "gptqmodel:5.0"}},
        {"autoround_version": "0.15.1"},
    ],
)
def test_writers_that_subtract_from_whole_words_are_known(
    tmp_path: Path, told: dict[str, Any]
) -> None:
    """Their zero points of 0 can be read back."""
    found = find(tmp_path, gptq_config(**told))
    assert found is not None
    assert found.borrowing


def test_layers_may_differ_where_the_config_has_rules_for_them(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`."""
    found = find(tmp_path, gptq_config(dynamic={r"+:.*\.down_proj": {"bits": 8}}))
    assert found is not None
    assert found.mixed


def test_awq_and_the_names_of_its_first_keys(tmp_path: Path) -> None:
    """`w_bit` and `q_group_size` became `bits` and `group_size`."""
    described = awq_config(modules_to_not_convert=["lm_head"])
    expected = StoredQuantization(
        "awq",
        "config.json",
        bits=4,
        group_size=32,
        symmetric=False,
        not_converted=("lm_head",),
    )
    assert find(tmp_path, described) == expected
    older = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    found = find(tmp_path, {"quant_method": "awq", **older})
    assert found is not None
    assert (found.bits, found.group_size, found.symmetric) == (4, 32, False)
    assert find(tmp_path, awq_config(zero_point=False)).symmetric  # type: ignore[union-attr]


def test_fp8_with_blocks_and_without(tmp_path: Path) -> None:
    """An absent block size is 128 x 128, as transformers takes it; null is none."""
    found = find(tmp_path, fp8_config(ignored_layers=["lm_head"], weight_block_size=[64, 32]))
    assert found == StoredQuantization(
        "fp8", "config.json", bits=8, block_size=(64, 32), not_converted=("lm_head",)
    )
    absent = fp8_config()
    del absent["weight_block_size"]
    assert find(tmp_path, absent).block_size == (128, 128)  # type: ignore[union-attr]
    static = find(tmp_path, fp8_config(weight_block_size=None, activation_scheme="static"))
    assert static is not None
    assert (static.block_size, static.static_activations) == (None, True)


@pytest.mark.parametrize(
    ("file", "described", "method"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "sym": True}, "gptq"),
        ("quantize_config.json", {"bits": 4, "quant_method": "awq"}, "awq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 64, "zero_point": True}, "awq"),
    ],
)
def test_the_files_of_the_first_writers_are_read(
    tmp_path: Path, file: str, described: dict[str, Any], method: str
) -> None:
    """Where config.json says nothing; what it says comes first."""
    (tmp_path / file).write_text(json.dumps(described))
    found = find(tmp_path, None)
    assert found is not None
    assert (found.method, found.where) == (method, file)
    assert find(tmp_path, fp8_config()).method == "fp8"  # type: ignore[union-attr]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "3-bit GPTQ": (gptq_config(bits=3), r"codes of 3 bits cannot be read \(known: 2, 4, 8\)"),
    "8-bit AWQ": (awq_config(bits=8), r"codes of 8 bits cannot be read \(known: 4\)"),
    "no bits": (gptq_config(bits=None), "codes of None bits"),
    "true for bits": (gptq_config(bits=True), "codes of True bits"),
    "no groups": (gptq_config(group_size=0), "group_size 0 is neither"),
    "words for groups": (awq_config(group_size="128"), "group_size '128' is neither"),
    "marlin": (gptq_config(checkpoint_format="marlin"), "GPTQ in the layout 'marlin'"),
    "is_marlin_format": (gptq_config(is_marlin_format=True), "GPTQ in the layout 'marlin'"),
    "other words": (gptq_config(pack_dtype="int16"), "packed into 'int16'"),
    "sym as text": (gptq_config(sym="yes"), "sym 'yes' is neither true nor false"),
    "gemv": (awq_config(version="gemv"), "AWQ in the layout 'gemv'"),
    "llm-awq": (awq_config(backend="llm-awq"), "AWQ in the layout 'llm-awq'"),
    "blocks": (fp8_config(weight_block_size=[128]), "is not two positive numbers"),
    "blocks of nothing": (fp8_config(weight_block_size=[0, 128]), "is not two positive"),
    "blocks as text": (fp8_config(weight_block_size="128"), "is not two positive"),
    "fp4 experts": (fp8_config(expert_dtype="fp4"), "experts in 'fp4' cannot be read"),
    "another tool": ({"quant_method": "bitsandbytes"}, "quantized by 'bitsandbytes'"),
    "nobody": ({"bits": 4}, "quantized by 'none'"),
    "rotations": (
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}},
        "transform_config describes more than codes and scales",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    """One line that names the file and what was found there."""
    described, says = REFUSED[name]
    with pytest.raises(ArtifactError, match=says) as caught:
        find(tmp_path, described)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_description_that_is_no_object_is_refused(tmp_path: Path) -> None:
    """In config.json and beside it."""
    with pytest.raises(ArtifactError, match="quantization_config is not an object"):
        find_quantization(tmp_path, {"quantization_config": [4]})
    (tmp_path / "quantize_config.json").write_text("[4]")
    with pytest.raises(ArtifactError, match="is not a JSON object"):
        find_quantization(tmp_path, {})


@pytest.mark.parametrize("size", [2**40, 2**70])
def test_a_group_larger_than_any_matrix_is_refused(tmp_path: Path, size: int) -> None:
    """torch cannot divide by the second."""
    with pytest.raises(ArtifactError, match="group_size"):
        find(tmp_path, gptq_config(group_size=size))


@pytest.mark.parametrize(
    "names", [["x"] * 200_000, ["*a"] * 2000, ["[" * 5000]], ids=["many", "patterns", "long"]
)
def test_endless_exclusions_are_refused(tmp_path: Path, names: list[str]) -> None:
    """Every layer would be matched with every pattern."""
    with pytest.raises(ArtifactError, match="excluded"):
        find(tmp_path, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": names})


def test_patterns_hold_for_the_modules_around_a_layer(tmp_path: Path) -> None:
    """As ModelOpt's readers take them; a name is no pattern of other names."""
    ignore = ["lm_head", "*.experts", "model.layers.[01]*"]
    found = find(tmp_path, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ignore})
    assert found is not None
    names = ["lm_head", "a.experts.3.up", "model.layers.0.q", "model.layers.2.q", "lm_head2"]

    assert found.list_left_out(names) == set(names[:3])
