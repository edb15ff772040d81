"""Everything that stands in the way of an encoder's job, one line each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from quantkit.recipe import AUTO, ExportSpec, Recipe
from quantkit.records import LinearPlan
from quantkit.schemes import ENCODER_SCHEMES, METHODS, ONNX, SCHEMES

OLDEST_OPSET = 18
"""torch's exporter writes none before it. LayerNormalization is there since 17, scales for each
channel since 13."""

_OFFERED = ", ".join(name for name in SCHEMES if name in ENCODER_SCHEMES)
_METHODS = ", ".join(name for name, row in METHODS.items() if row.transform != "awq")


def find_recipe_problems(recipe: Recipe, *, gate: bool) -> Iterator[str]:
    """Yield what the recipe asks for and encoders do not have."""
    quantize = recipe.quantize
    rows: list[tuple[str, str | None, str | None]] = [
        ("quantize", quantize.scheme, quantize.method)
    ]
    rows += [
        (f"quantize.overrides[{index}]", override.scheme, override.method)
        for index, override in enumerate(quantize.overrides)
    ]
    for where, scheme, method in rows:
        if scheme is not None and scheme not in ENCODER_SCHEMES:
            yield f"{where}.scheme {scheme} is for decoders (encoders: {_OFFERED})"
        if method is not None and method in METHODS and METHODS[method].transform == "awq":
            yield f"{where}.method {method} is for 4-bit weights (encoders: {_METHODS})"
    if quantize.kv_cache != "none":
        yield f"quantize.kv_cache {quantize.kv_cache}: an encoder has no KV cache; set it to none"
    if recipe.calibration is not None and recipe.calibration.assistant_only:
        yield "calibration.assistant_only is for chats, and an encoder reads texts; leave it out"
    if gate and recipe.gate is None:
        yield (
            "the recipe has no gate: add a `gate:` section with `data:`, or pass --no-gate and "
            "get an artifact marked UNJUDGED"
        )
    if gate and recipe.gate is not None and recipe.gate.runtime not in (AUTO, "onnxruntime"):
        yield (
            f"gate.runtime {recipe.gate.runtime} does not load ONNX encoders: set gate.runtime to "
            f"auto, which is onnxruntime for them"
        )
    yield from _export_problems(recipe.export)


def find_layer_problems(
    recipe: Recipe, linears: Sequence[LinearPlan], *, calibrated: bool
) -> Iterator[str]:
    """Yield what does not fit the layers of the encoder.

    Args:
        recipe: what is asked for.
        linears: the layers that could be quantized, under the recipe's schemes.
        calibrated: whether any export has layers in INT8.
    """
    quantized = [linear for linear in linears if linear.quantized]
    remedy = "add a `calibration:` section with `data:`"
    if recipe.calibration is None and calibrated:
        methods = sorted({each.method.name for each in quantized if each.method.needs_calibration})
        static = sorted({each.scheme.name for each in quantized if each.scheme.static})
        if methods:
            yield f"method {', '.join(methods)} needs calibration data: {remedy}, or use method rtn"
        if static:
            yield (
                f"scheme {', '.join(static)} stores scales of its inputs, which come from "
                f"calibration data: {remedy}, or use scheme w8a8"
            )
    for where, export in _named(recipe.export):
        if recipe.calibration is None and export.float_layers not in (0, AUTO):
            yield (
                f"{where}.float_layers {export.float_layers}: which layers are the most sensitive "
                f"is measured on calibration data: {remedy}"
            )
        if export.precision == "int8" and not quantized:
            yield (
                f"{where}.precision int8, but no layer would be in INT8: give quantize.scheme "
                f"w8a8 or w8a8_static"
            )
        count = export.float_layers
        if isinstance(count, int) and count > len(quantized):
            yield (
                f"{where}.float_layers {count} is more than the {len(quantized)} layers that would "
                f"be in INT8"
            )


def find_mixed_groups(groups: Iterable[Sequence[LinearPlan]]) -> Iterator[str]:
    """Yield the groups of layers whose one input would be rounded in two ways."""
    for group in groups:
        found: dict[str, str] = {}
        for linear in group:
            if linear.quantized:
                found.setdefault(linear.scheme.name, linear.name)
        if len(found) > 1:
            yield (
                f"layers {' and '.join(found.values())} read the same input, which is rounded "
                f"once: give them one scheme (they have {' and '.join(found)})"
            )


def _named(exports: Sequence[ExportSpec]) -> Iterator[tuple[str, ExportSpec]]:
    return ((f"export[{index}]", export) for index, export in enumerate(exports))


def _export_problems(exports: Sequence[ExportSpec]) -> Iterator[str]:
    for where, export in _named(exports):
        if export.format != ONNX:
            yield (
                f"{where}.format {export.format} is for decoders: an encoder is exported as onnx, "
                f"with precision int8, fp16 or fp32"
            )
            continue
        integer = export.precision in (None, "int8")
        if export.precision == "int4":
            yield f"{where}.precision int4 is for decoders: encoders have int8, fp16 and fp32"
        if export.embeddings == "int4" or (export.embeddings == "int8" and not integer):
            yield (
                f"{where}.embeddings {export.embeddings}: encoders have int8 with precision int8, "
                f"and float"
            )
        if export.activations == "fp16" and export.precision != "fp16":
            yield (
                f"{where}.activations fp16: an encoder computes in fp16 with precision fp16 alone"
            )
        if export.lm_head != "float":
            yield f"{where}.lm_head {export.lm_head}: an encoder has no output layer for tokens"
        if export.accuracy_level:
            yield (
                f"{where}.accuracy_level {export.accuracy_level} is for the 4-bit layers of "
                f"decoders; leave it out"
            )
        if export.opset is not None and export.opset < OLDEST_OPSET:
            yield (
                f"{where}.opset {export.opset} is too old for the exporter: leave it out, or ask "
                f"for {OLDEST_OPSET} or later"
            )
