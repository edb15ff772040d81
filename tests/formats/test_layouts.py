"""Which tensors a scheme's layers have, and which scheme such tensors are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

from quantkit.formats.encoding import decode_layer, encode_part, specify_layer
from quantkit.formats.layouts import (
    INPUT_SCALE,
    PARTS,
    SCALE,
    InputRounding,
    Layout,
    find_misfits,
    find_scheme,
    lay_out,
    name_scheme,
    pack_weights_only,
    part_shapes,
)
from quantkit.formats.quantization_config import build_quantization_config
from quantkit.formats.shards import DTYPE_NAMES
from quantkit.numerics.affine import choose_absmax, quantize
from quantkit.planning.checks import find_misfits as find_planned_misfits
from quantkit.planning.sizes import layer_bytes
from quantkit.records import LinearPlan, QuantizedLayer
from quantkit.schemes import METHODS, SCHEMES, Scheme

QUANTIZED = [scheme for scheme in SCHEMES.values() if scheme.weight_kind != "none"]
CASES = [
    pytest.param(scheme, size, id=f"{scheme.name}-{size}")
    for scheme in QUANTIZED
    for size in ((None, 32, 128) if scheme.grouped else (None,))
]


def _plan(scheme: Scheme, size: int | None, rows: int, columns: int) -> LinearPlan:
    return LinearPlan("layer", rows, columns, False, scheme, size, METHODS["rtn"])


def _solve(scheme: Scheme, size: int | None, rows: int, columns: int) -> QuantizedLayer:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    scale, zero_point = choose_absmax(weight, scheme, size, torch.bfloat16)
    codes = quantize(weight, scale, zero_point, scheme)
    inputs = torch.tensor([0.25], dtype=torch.bfloat16) if scheme.static else None
    return QuantizedLayer("layer", scheme, size, codes, scale, zero_point, inputs)


@pytest.mark.parametrize(("scheme", "size"), CASES)
@pytest.mark.parametrize("shape", [(128, 256), (100, 384), (37, 128)], ids=str)
def test_a_layer_comes_back_from_its_tensors(
    scheme: Scheme, size: int | None, shape: tuple[int, int]
) -> None:
    """The tensors are those announced, and decode to the record, bit for bit."""
    layer = _solve(scheme, size, *shape)
    specs = specify_layer(_plan(scheme, size, *shape), "BF16")
    parts = {}
    for spec in specs:
        part = spec.name.removeprefix("layer.")
        parts[part] = encode_part(layer, part)
        assert (DTYPE_NAMES[parts[part].dtype], tuple(parts[part].shape)) == (
            spec.dtype,
            spec.shape,
        )
    absent = [part for part in PARTS if part not in parts]
    for part in absent:
        with pytest.raises(ValueError, match=f"has no {part}"):
            encode_part(layer, part)
    found = decode_layer("layer", lay_out(scheme, size), parts)
    assert (found.scheme, found.group_size) == (scheme, size)
    assert torch.equal(found.codes.view(torch.int8), layer.codes.view(torch.int8))
    assert torch.equal(found.scale, layer.scale)
    for one, other in (
        (found.zero_point, layer.zero_point),
        (found.input_scale, layer.input_scale),
    ):
        assert one is other is None or (one is not None and torch.equal(one, other))


@pytest.mark.parametrize(("scheme", "size"), CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_plan_predicts_the_bytes_of_every_layout(
    scheme: Scheme, size: int | None, dtype: str
) -> None:
    """To the byte, with rows that fill neither words nor blocks."""
    linear = _plan(scheme, size, 150, 384)
    specs = specify_layer(linear, {"bfloat16": "BF16", "float32": "F32"}[dtype])
    assert layer_bytes(linear, dtype) == sum(spec.size for spec in specs)


PRESETS = {
    "w4a16": "W4A16",
    "w4a16_asym": "W4A16_ASYM",
    "w8a16": "W8A16",
    "w4a8": "W4A8",
    "w4a8_fp8": "W4AFP8",
    "w8a8": "W8A8",
    "fp8_dynamic": "FP8_DYNAMIC",
    "fp8_block": "FP8_BLOCK",
}


@pytest.mark.parametrize(("ours", "theirs"), PRESETS.items())
def test_schemes_are_described_as_the_presets_of_compressed_tensors(ours: str, theirs: str) -> None:
    """Weights and inputs mean the same to a reader as the library's own names for them."""
    scheme = SCHEMES[ours]
    plan = _plan(scheme, 128 if scheme.grouped else None, 128, 128)
    config = build_quantization_config([plan], ["layer"])
    assert config is not None
    (group,) = config["config_groups"].values()
    found = QuantizationScheme.model_validate(group)
    preset = preset_name_to_scheme(theirs, ["Linear"])
    for part in ("weights", "input_activations"):
        one, other = getattr(found, part), getattr(preset, part)
        if other is None:
            assert one is None
            continue
        # How a scale was observed is not what a reader needs.
        skipped = {"observer", "observer_kwargs"}
        assert one.model_dump(exclude=skipped) == other.model_dump(exclude=skipped)


@pytest.mark.parametrize(("scheme", "size"), CASES)
def test_a_layout_is_found_to_be_its_scheme(scheme: Scheme, size: int | None) -> None:
    """Whichever container it lies in."""
    layout = lay_out(scheme, size)
    for packed in (True, False):
        assert find_scheme(replace(layout, packed=packed)) is scheme
    assert name_scheme(layout) == scheme.name


def test_one_scale_a_tensor_is_one_a_row() -> None:
    """As llm-compressor's FP8 preset has it: read as the scheme with a scale a row."""
    layout = replace(lay_out(SCHEMES["fp8_static"], None), strategy="tensor")
    assert find_scheme(layout) is SCHEMES["fp8_static"]
    codes = torch.randn(5, 8).to(torch.float8_e4m3fn)
    parts = {"weight": codes, SCALE: torch.tensor([0.5]), INPUT_SCALE: torch.tensor([0.25])}
    found = decode_layer("layer", layout, parts)
    assert torch.equal(found.scale, torch.full((5, 1), 0.5))


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (pack_weights_only(3, True, 128), "w3a16"),
        (pack_weights_only(8, False, None), "w8a16_asym"),
        (Layout(False, "float", 8, True, "channel"), "fp8a16"),
        (
            Layout(
                False,
                "int",
                8,
                True,
                "channel",
                inputs=InputRounding("int", 8, False, False, "tensor"),
            ),
            "w8a8_static_asym_inputs",
        ),
        (
            Layout(
                True,
                "int",
                4,
                True,
                "group",
                128,
                inputs=InputRounding("int", 8, True, True, "tensor"),
            ),
            "w4a8_dynamic",
        ),
    ],
)
def test_other_layouts_get_a_name_after_the_same_pattern(layout: Layout, name: str) -> None:
    """They are no scheme of quantkit's and cannot be decoded, but they can be told."""
    assert find_scheme(layout) is None
    assert name_scheme(layout) == name


def test_a_scheme_is_not_laid_out_wrongly() -> None:
    """Nothing to lay out, or groups where there are none."""
    with pytest.raises(ValueError, match="not quantized"):
        lay_out(SCHEMES["none"], None)
    with pytest.raises(ValueError, match="no groups"):
        lay_out(SCHEMES["w8a8"], 128)


@pytest.mark.parametrize(
    ("rows", "columns", "fits"),
    [(256, 384, True), (128, 128, True), (256, 128, False), (200, 256, False), (256, 200, False)],
)
def test_blocks_that_the_library_would_decode_wrongly_are_known(
    rows: int, columns: int, fits: bool
) -> None:
    """compressed-tensors' own decompression is the judge of what `find_misfits` says."""
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    from quantkit.numerics.affine import dequantize_layer

    layer = _solve(SCHEMES["fp8_block"], None, rows, columns)
    layout = lay_out(layer.scheme, None)
    assert part_shapes(layout, rows, columns)[SCALE] == tuple(layer.scale.shape)
    try:
        right = torch.equal(dequantize(layer.codes, layer.scale.float()), dequantize_layer(layer))
    except RuntimeError:
        right = False
    assert right == fits == (not list(find_misfits(layout, rows, columns)))


@pytest.mark.parametrize("rows", [100, 128, 256, 384])
@pytest.mark.parametrize("columns", [100, 128, 256, 384])
def test_the_plan_refuses_what_readers_would_decode_wrongly(rows: int, columns: int) -> None:
    """Blocks over an edge, and a single block of columns, are known before any work."""
    linear = _plan(SCHEMES["fp8_block"], None, rows, columns)
    refused = bool(list(find_planned_misfits([linear])))
    assert refused == bool(list(find_misfits(lay_out(linear.scheme, None), rows, columns)))
