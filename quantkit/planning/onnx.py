"""What ONNX graphs mean for a plan: their precision, their size, and which layers do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from quantkit.checkpoint.reader import Checkpoint
from quantkit.ggml_types import GGUF
from quantkit.recipe import ExportSpec, Recipe
from quantkit.records import LinearPlan, OnnxPlan
from quantkit.schemes import GROUP_SIZES, ONNX, ONNX_CHANNEL_BLOCK

GRAPH_SCALE_BYTES: Mapping[str, int] = MappingProxyType({"fp32": 4, "fp16": 2})
"""What a graph computes in -> bytes of a scale."""

_BITS = {"int4": 4, "int8": 8}
_FLOATS = frozenset({"fp16", "fp32"})


def has_schemes(export: ExportSpec) -> bool:
    """Whether a format has a place for codes under a scheme."""
    return export.format != GGUF and export.precision not in _FLOATS


def only_onnx(recipe: Recipe) -> bool:
    """Whether codes go into ONNX graphs alone."""
    wanted = [export for export in recipe.export if has_schemes(export)]
    return bool(wanted) and all(export.format == ONNX for export in wanted)


def graph_layer_bytes(linear: LinearPlan, activations: str) -> int:
    """Return the bytes of a quantized layer's codes, scales and zero points in a graph.

    Rows are cut into blocks; a scale for a whole row is repeated for each.
    """
    bits = linear.scheme.weight_bits
    block = ONNX_CHANNEL_BLOCK if linear.group_size is None else linear.group_size
    blocks = -(-linear.in_features // block)
    row = blocks * (block * bits // 8 + GRAPH_SCALE_BYTES[activations])
    if not linear.scheme.symmetric:
        row += -(-blocks * bits // 8)
    return linear.out_features * row


def finish_graph(
    graph: OnnxPlan, linears: Sequence[LinearPlan], checkpoint: Checkpoint
) -> OnnxPlan:
    """Return the plan of a graph with its precision and size, now that the layers are known."""
    if not graph.quantized:
        return graph
    quantized = [linear for linear in linears if linear.quantized]
    size = graph.tensor_bytes
    for linear in quantized:
        info = checkpoint.tensors[f"{linear.name}.weight"]
        size += graph_layer_bytes(linear, graph.activations) - info.size
    precision = graph.precision or _name_precision(quantized, graph)
    notes = list(graph.notes)
    if graph.precision == "int4":
        others = sorted({each.scheme.name for each in linears if each.scheme.weight_bits != 4})
        if others:
            notes.append(f"precision int4, with layers in {', '.join(others)} by overrides")
    return replace(graph, precision=precision, tensor_bytes=size, notes=tuple(notes))


def _name_precision(quantized: Iterable[LinearPlan], graph: OnnxPlan) -> str:
    """The precision of most layers; that of the activations where none is quantized."""
    bits = [linear.scheme.weight_bits for linear in quantized]
    if not bits:
        return graph.activations
    return "int4" if 2 * bits.count(4) >= len(bits) else "int8"


def find_onnx_problems(
    recipe: Recipe, linears: Sequence[LinearPlan], graphs: Sequence[OnnxPlan]
) -> Iterator[str]:
    """Yield what an ONNX export asks for and the recipe does not give."""
    exports = [export for export in recipe.export if export.format == ONNX]
    for export in exports:
        yield from _find_mismatch(export, recipe, linears)
    names = [
        graph.precision or _name_precision([each for each in linears if each.quantized], graph)
        for graph in graphs
    ]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"two onnx exports have the precision {name}: write them by two jobs"
    if only_onnx(recipe) and recipe.quantize.kv_cache != "none":
        yield (
            f"kv_cache {recipe.quantize.kv_cache}: an ONNX graph has no place for the scales of "
            f"keys and values; use kv_cache none or export compressed-tensors"
        )
    if not only_onnx(recipe):
        yield from _find_small_groups(recipe, linears)


def _find_mismatch(
    export: ExportSpec, recipe: Recipe, linears: Sequence[LinearPlan]
) -> Iterator[str]:
    """Yield the schemes that are at odds with the precision of an export."""
    bits = _BITS.get(export.precision or "")
    if bits is None:
        return
    fits = {4: "w4a16, w4a16_asym", 8: "w8a16"}
    wrong: dict[str, list[str]] = {}
    for linear in linears:
        # What an override or an ignore pattern leaves in more bits is meant to have them.
        more = linear.scheme.name != recipe.quantize.scheme and linear.scheme.weight_bits > bits
        if linear.quantized and linear.scheme.weight_bits != bits and not more:
            wrong.setdefault(linear.scheme.name, []).append(linear.name)
    for scheme, names in wrong.items():
        more = f" and {len(names) - 1} more layers" if len(names) > 1 else ""
        yield (
            f"onnx precision {export.precision}: {names[0]}{more} has the scheme {scheme}; use "
            f"{fits[bits]}, or leave precision out"
        )
    if not any(linear.quantized for linear in linears):
        yield (
            f"onnx precision {export.precision}: no layer is quantized; use {fits[bits]}, or "
            f"precision fp16 or fp32"
        )


def _find_small_groups(recipe: Recipe, linears: Sequence[LinearPlan]) -> Iterator[str]:
    """Yield group sizes that ONNX graphs alone have."""
    small = [
        linear
        for linear in linears
        if linear.quantized and linear.group_size not in {None, *GROUP_SIZES}
    ]
    if small:
        known = ", ".join(map(str, GROUP_SIZES))
        yield (
            f"{small[0].name} ({len(small)} layers): group_size {small[0].group_size} is for ONNX "
            f"graphs alone; compressed-tensors has {known} and channel"
        )


def find_onnx_notes(recipe: Recipe) -> Iterator[str]:
    """Yield what an ONNX graph leaves out that other formats of the recipe have."""
    given = any(export.format == ONNX for export in recipe.export)
    if given and not only_onnx(recipe) and recipe.quantize.kv_cache != "none":
        yield "onnx: the key/value cache of the graph stays in float"
