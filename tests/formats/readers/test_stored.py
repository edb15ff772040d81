"""Layers of GPTQ, AWQ and FP8 checkpoints, against numbers packed one by one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.errors import ArtifactError
from quantkit.formats.readers.layers import as_quantized_layer
from quantkit.formats.readers.stored import StoredModel, open_stored, read_codes, read_weight
from quantkit.numerics.affine import dequantize_layer
from quantkit.records import Source
from tests.formats.readers.packers import (
    Foreign,
    draw_codes,
    make_awq,
    make_fp8,
    make_gptq,
    pack_gptq,
)
from tests.helpers import make_pico_model

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block with 64 and 96 features."""
    return make_pico_model(
        tmp_path_factory.mktemp("stored") / "model", intermediate=96, layers=1, tokenizer=False
    )


def open_model(made: Foreign) -> StoredModel:
    checkpoint = open_checkpoint(Source("pico", made.folder, None))
    found = open_stored(checkpoint)
    assert found is not None
    return found


@dataclass(frozen=True)
class Kind:
    """How a checkpoint is made, and how its layers are called."""

    make: Callable[..., Foreign]
    options: dict[str, Any]
    scheme: str
    group_size: int | None


KINDS = {
    "gptq": Kind(make_gptq, {}, "w4a16_asym", 32),
    "gptq-without-order": Kind(make_gptq, {"g_idx": False}, "w4a16_asym", 32),
    "gptq-act-order": Kind(make_gptq, {"desc_act": True}, "w4a16_asym", 32),
    "gptq-sym": Kind(make_gptq, {"sym": True, "group_size": 16}, "w4a16", 16),
    "gptq-ragged": Kind(make_gptq, {"group_size": 40}, "w4a16_asym", 40),
    "gptq-ragged-without-order": Kind(
        make_gptq, {"group_size": 40, "g_idx": False}, "w4a16_asym", 40
    ),
    "gptq-channel-8": Kind(make_gptq, {"bits": 8, "group_size": -1, "sym": True}, "w8a16", None),
    "gptq-2": Kind(make_gptq, {"bits": 2}, "w2a16_asym", 32),
    "gptq-v2": Kind(make_gptq, {"version": 2, "checkpoint_format": "gptq_v2"}, "w4a16_asym", 32),
    "awq": Kind(make_awq, {}, "w4a16_asym", 32),
    "awq-channel": Kind(make_awq, {"group_size": -1}, "w4a16_asym", None),
    "awq-sym": Kind(make_awq, {"zero_point": False}, "w4a16", 32),
    "fp8": Kind(make_fp8, {}, "fp8_block", None),
    "fp8-cut-blocks": Kind(make_fp8, {"weight_block_size": [40, 36]}, "fp8_block", None),
}


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_the_products_that_the_numbers_say(
    model: Path, tmp_path: Path, name: str
) -> None:
    """Bit for bit, for each layer; the headers alone tell shapes, bits and groups."""
    kind = KINDS[name]
    made = kind.make(model, tmp_path / "made", **kind.options)
    found = open_model(made)
    assert found.problems == ()
    assert found.layers.keys() == made.weights.keys()
    for layer, weight in made.weights.items():
        stored = found.layers[layer]
        assert stored.shape == tuple(weight.shape)
        assert (stored.scheme, stored.group_size) == (kind.scheme, kind.group_size)
        assert torch.equal(read_weight(found, layer), weight)
    assert found.parameters == open_checkpoint_parameters(model)


def open_checkpoint_parameters(folder: Path) -> int:
    """Weights of the 16-bit original."""
    checkpoint = open_checkpoint(Source("pico", folder, None))
    return sum(info.size // 2 for info in checkpoint.tensors.values())


@pytest.mark.parametrize(
    "name",
    [name for name, kind in KINDS.items() if kind.scheme in ("w4a16", "w4a16_asym", "w8a16")],
)
def test_codes_are_the_stored_ones_in_the_signed_convention(
    model: Path, tmp_path: Path, name: str
) -> None:
    """Codes and zero points shifted by half the range, scales untouched."""
    kind = KINDS[name]
    made = kind.make(model, tmp_path / "made", **kind.options)
    found = open_model(made)
    codes, numbers = read_codes(found, DOWN), made.codes[DOWN]
    half = 1 << (found.layers[DOWN].bits - 1)
    assert torch.equal(codes.codes.int(), numbers.codes.int() - half)
    assert torch.equal(codes.scale, numbers.scales)
    if found.layers[DOWN].symmetric:
        assert codes.zero_point is None
    else:
        assert codes.zero_point is not None
        assert torch.equal(codes.zero_point.int(), numbers.zeros.int() - half)
    if codes.group_index is None:
        record = as_quantized_layer(found.layers[DOWN], codes)
        assert torch.equal(dequantize_layer(record), made.weights[DOWN])
    else:
        assert codes.group_index.tolist() == list(numbers.groups)
        with pytest.raises(ValueError, match="not in the order of their groups"):
            as_quantized_layer(found.layers[DOWN], codes)


def test_whole_groups_in_another_order_need_no_index(model: Path, tmp_path: Path) -> None:
    """Their scales are put where their columns are, so they can be packed again."""
    made = make_gptq(model, tmp_path / "made")
    groups = [group for group in (2, 0, 1) for _ in range(32)]
    moved = draw_codes(64, 96, groups=groups, seed=9)
    parts = {f"{DOWN}.{part}": tensor for part, tensor in pack_gptq(moved, 4).items()}
    made.edit_tensors({**parts})
    found = open_model(made)
    codes = read_codes(found, DOWN)
    assert codes.group_index is None
    record = as_quantized_layer(found.layers[DOWN], codes)
    assert torch.equal(dequantize_layer(record), moved.weight)


def test_layers_with_rules_of_their_own_are_told_by_their_shapes(
    model: Path, tmp_path: Path
) -> None:
    """No regular expression of the config is run."""
    rules = {r"+:.*\.down_proj": {"bits": 8, "group_size": 48}}
    made = make_gptq(model, tmp_path / "made", dynamic=rules)
    other = draw_codes(64, 96, bits=8, group_size=48, seed=5)
    made.edit_tensors({f"{DOWN}.{part}": each for part, each in pack_gptq(other, 8).items()})
    found = open_model(made)
    assert found.problems == ()
    assert (found.layers[DOWN].scheme, found.layers[DOWN].group_size) == ("w8a16_asym", 48)
    assert torch.equal(read_weight(found, DOWN), other.weight)
    assert (found.layers[UP].scheme, found.layers[UP].group_size) == ("w4a16_asym", 32)


def zero_for_borrowing(zeros: Tensor) -> Tensor:
    """Store zero points that lie along the last dimension less one, a word at a time."""
    shifts = torch.arange(8) * 4
    words = (zeros.reshape(zeros.shape[0], -1, 8).long() << shifts).sum(dim=2) - 0x11111111
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def test_zero_points_of_zero_are_read_where_the_writer_borrowed(
    model: Path, tmp_path: Path
) -> None:
    """GPTQModel and auto-round subtract from the word, so adding to the word gives them back."""
    told = {"meta": {"quantizer": ["gptqmodel:4.0.0"]}}
    made = make_gptq(model, tmp_path / "made", **told)
    numbers = made.codes[DOWN]
    numbers.zeros[::3] = 0
    made.edit_tensors({f"{DOWN}.qzeros": zero_for_borrowing(numbers.zeros.T)})
    assert torch.equal(read_weight(open_model(made), DOWN), numbers.weight)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["number", "one"])
@pytest.mark.parametrize("part", ["weight_scale", "weight_scale_inv"])
def test_fp8_with_one_scale_a_tensor(
    model: Path, tmp_path: Path, part: str, shape: tuple[int, ...]
) -> None:
    """Under either name."""
    made = make_fp8(model, tmp_path / "made", weight_block_size=[999, 999])
    scale = torch.full(shape, 0.25)
    made.edit_tensors({f"{DOWN}.weight_scale_inv": None, f"{DOWN}.{part}": scale})
    made.edit_config(weight_block_size=None)
    found = open_model(made)
    assert found.layers[DOWN].scheme == "fp8_dynamic"
    codes = made.weights[DOWN] / made.weights[DOWN].abs().max() * 448
    assert torch.allclose(read_weight(found, DOWN), 0.25 * codes, rtol=1e-6)


def test_fp8_with_one_scale_a_row_and_static_activations(model: Path, tmp_path: Path) -> None:
    """The scale of the input is a part of the layer, and no weight of the model."""
    made = make_fp8(model, tmp_path / "made", weight_block_size=[1, 999])
    scales = {name: torch.rand(len(weight), 1) + 0.5 for name, weight in made.weights.items()}
    made.edit_tensors(
        {f"{name}.weight_scale_inv": None for name in scales}
        | {f"{name}.weight_scale": scale for name, scale in scales.items()}
        | {f"{name}.input_scale": torch.ones(1) for name in scales}
    )
    made.edit_config(weight_block_size=None, activation_scheme="static")
    found = open_model(made)
    assert found.problems == ()
    assert found.layers[UP].scheme == "fp8_static"
    assert found.parameters == open_checkpoint_parameters(model)
    rows = made.weights[UP] / made.weights[UP].abs().amax(dim=1, keepdim=True) * 448
    assert torch.allclose(read_weight(found, UP), scales[UP] * rows, rtol=1e-6)


Spoil = Callable[[Foreign], None]


@dataclass(frozen=True)
class Fault:
    """A checkpoint that is spoilt, and what is said about it."""

    make: Callable[..., Foreign]
    spoil: Spoil
    says: str


def tensors(**changes: Tensor | None) -> Spoil:
    """Change tensors of the layer `DOWN`."""
    return lambda made: made.edit_tensors(
        {f"{DOWN}.{part}": tensor for part, tensor in changes.items()}
    )


def config(**changes: Any) -> Spoil:
    """Change the quantization_config."""
    return lambda made: made.edit_config(**changes)


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def halves(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float16)


FAULTS = {
    "gptq without zero points": Fault(
        make_gptq, tensors(qzeros=None), f"layer {DOWN} has no qzeros$"
    ),
    "gptq without codes": Fault(make_gptq, tensors(qweight=None), f"layer {DOWN} has no qweight$"),
    "gptq with nothing but zero points": Fault(
        make_gptq, tensors(qweight=None, scales=None), f"{DOWN} has no qweight and no scales$"
    ),
    "gptq with short scales": Fault(
        make_gptq, tensors(scales=halves(2, 64)), "which do not fit each other for codes of 4 bits"
    ),
    "gptq with a short order": Fault(
        make_gptq, tensors(g_idx=ints(95)), "which do not fit each other"
    ),
    "gptq with codes of floats": Fault(
        make_gptq, tensors(qweight=halves(12, 64)), "not as GPTQ is"
    ),
    "gptq with an empty scale": Fault(make_gptq, tensors(scales=halves(0, 64)), "not as GPTQ is"),
    "gptq with other bits": Fault(
        make_gptq, config(bits=8), "holds codes of 4 bits, but config.json says 8"
    ),
    "gptq with other groups": Fault(
        make_gptq,
        config(group_size=128),
        f"layer {DOWN} has 3 groups for 96 columns, but config.json says groups of 128",
    ),
    "gptq twice": Fault(make_gptq, tensors(weight=halves(64, 96)), f"layer {DOWN} is stored twice"),
    "awq without zero points": Fault(make_awq, tensors(qzeros=None), f"{DOWN} has no qzeros$"),
    "awq with other groups": Fault(
        make_awq, config(group_size=64), "has 3 groups for 96 columns, but config.json says"
    ),
    "awq with short zero points": Fault(
        make_awq, tensors(qzeros=ints(3, 7)), "which do not fit each other"
    ),
    "awq in gptq's place": Fault(
        make_gptq, config(quant_method="awq", zero_point=True), "which do not fit each other"
    ),
    "awq with flat scales": Fault(make_awq, tensors(scales=halves(192)), "not as AWQ is"),
    "awq with scaled activations": Fault(
        make_awq,
        lambda made: made.edit_tensors({"model.layers.0.mlp.act.scales": halves(96)}),
        "layer model.layers.0.mlp.act has no qweight and no qzeros$",
    ),
    "a layer that the config leaves out": Fault(
        make_awq,
        config(modules_to_not_convert=[UP]),
        f"layer {UP} is quantized, but config.json says that it is not",
    ),
    "fp8 without a scale": Fault(
        make_fp8, tensors(weight_scale_inv=None), f"layer {DOWN} is FP8 and has no scale"
    ),
    "fp8 with two scales": Fault(
        make_fp8, tensors(weight_scale=torch.ones(1)), "has weight_scale_inv and weight_scale"
    ),
    "fp8 with a grid of another size": Fault(
        make_fp8,
        tensors(weight_scale_inv=torch.ones(2, 1)),
        "the scales do not fit the weight in blocks of 128 x 128, which config.json describes",
    ),
    "fp8 blocks in a config without": Fault(
        make_fp8,
        lambda made: (
            made.edit_config(weight_block_size=None),
            made.edit_tensors({f"{DOWN}.weight_scale_inv": torch.ones(2, 2)}),
        )[0],
        "the scales do not fit the weight, which config.json describes",
    ),
    "fp8 experts in one tensor": Fault(
        make_fp8,
        lambda made: made.edit_tensors(
            {"model.layers.0.experts.up": torch.zeros(2, 4, 4).to(torch.float8_e4m3fn)}
        ),
        "tensor model.layers.0.experts.up is F8_E4M3, and no scale of it is known",
    ),
    "a scale without a weight": Fault(
        make_fp8, tensors(weight=None), f"tensor {DOWN}.weight_scale_inv belongs to no quantized"
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_is_one_line_about_one_layer(
    model: Path, tmp_path: Path, name: str
) -> None:
    """Found in the headers, before a weight is read."""
    fault = FAULTS[name]
    made = fault.make(model, tmp_path / "made")
    fault.spoil(made)
    found = open_model(made)
    assert any(re.search(fault.says, line) for line in found.problems), found.problems
    assert all("\n" not in line for line in found.problems)


def test_a_description_of_nothing_is_a_problem(model: Path, tmp_path: Path) -> None:
    """A config that calls a plain model quantized."""
    made = make_gptq(model, tmp_path / "made")
    made.edit_config(quant_method="fp8")
    assert (
        "config.json describes a quantized model, but no layer is quantized"
        in open_model(made).problems
    )


VALUES = {
    "an order beyond the groups": Fault(
        make_gptq,
        tensors(g_idx=torch.full((96,), 3, dtype=torch.int32)),
        f"tensor {DOWN}.g_idx names group 3, but layer {DOWN} has 3 groups",
    ),
    "an order below them": Fault(
        make_gptq,
        tensors(g_idx=torch.full((96,), -1, dtype=torch.int32)),
        "names group -1, but",
    ),
    "zero points of a symmetric gptq": Fault(
        make_gptq,
        config(sym=True),
        r"zero points other than 8, but config.json describes symmetric weights \(sym\)",
    ),
    "zero points of a symmetric awq": Fault(
        make_awq,
        config(zero_point=False),
        r"zero points other than 8, but config.json says that there are none \(zero_point\)",
    ),
    "zero points that ran out of their bits": Fault(
        make_gptq,
        tensors(qzeros=torch.full((3, 8), -1, dtype=torch.int32)),
        "has stored zero points of 15, where zero - 1 ran out of its bits",
    ),
    "a scale that is no number": Fault(
        make_gptq,
        tensors(scales=torch.full((3, 64), float("nan"), dtype=torch.float16)),
        rf"tensor {DOWN}.scales .* NaN",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_make_no_sense_are_refused_when_they_are_read(
    model: Path, tmp_path: Path, name: str
) -> None:
    """The headers were in order."""
    fault = VALUES[name]
    made = fault.make(model, tmp_path / "made")
    fault.spoil(made)
    found = open_model(made)
    assert found.problems == ()
    with pytest.raises(ArtifactError, match=fault.says):
        read_weight(found, DOWN)


def test_a_symmetric_awq_model_may_lack_zero_points(model: Path, tmp_path: Path) -> None:
    """They are 8 then, as vLLM takes them."""
    made = make_awq(model, tmp_path / "made", zero_point=False)
    made.edit_tensors({f"{name}.qzeros": None for name in made.weights})
    found = open_model(made)
    assert found.problems == ()
    assert torch.equal(read_weight(found, DOWN), made.weights[DOWN])


def test_codes_of_fp8_are_not_offered(model: Path, tmp_path: Path) -> None:
    """They are no integers."""
    found = open_model(make_fp8(model, tmp_path / "made"))
    with pytest.raises(ValueError, match="fp8 layers are not read as codes"):
        read_codes(found, DOWN)


def test_scales_of_a_quantized_cache_are_no_weights(model: Path, tmp_path: Path) -> None:
    """They are set apart."""
    made = make_fp8(model, tmp_path / "made")
    scale = "model.layers.0.self_attn.k_scale"
    made.edit_tensors({scale: torch.ones(1)})
    found = open_model(made)
    assert found.cache_scales == (scale,)
    assert scale not in found.others
    assert found.parameters == open_checkpoint_parameters(model)


def test_a_layer_that_cannot_be_read_is_told_once(model: Path, tmp_path: Path) -> None:
    """Its other tensors are no problems of their own, and no weights of the model."""
    made = make_gptq(model, tmp_path / "made")
    made.edit_tensors({f"{DOWN}.qzeros": None})
    found = open_model(made)
    assert found.problems == (f"layer {DOWN} has no qzeros",)
    assert found.broken == {DOWN}
    assert found.parameters == open_checkpoint_parameters(model) - 64 * 96
