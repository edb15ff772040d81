"""What an export in ModelOpt's layout means for a plan: one algorithm, its size, what does not fit.

TensorRT-LLM names one algorithm for all layers that are quantized, and has others than
compressed-tensors (`quantkit.formats.modelopt.layout`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch

from quantkit.planning.assignment import Assignment
from quantkit.planning.sizes import layer_bytes
from quantkit.recipe import AUTO, Recipe
from quantkit.records import KvCachePlan, LinearPlan, ModeloptPlan
from quantkit.schemes import MODELOPT, MODELOPT_ALGORITHMS, MODELOPT_GROUP_SIZES

_NUMBER_BYTES = 4
"""Of a scale in float32."""
_FP8_STATIC = "fp8_static"
_VLLM_SCHEMES = (_FP8_STATIC, "fp8_dynamic")
"""What vLLM's reader of ModelOpt's layout has of them."""


def _exports(recipe: Recipe) -> bool:
    return any(export.format == MODELOPT for export in recipe.export)


def share_scales(recipe: Recipe, assignment: Assignment) -> Assignment:
    """Say of which layers all rows have one scale: TensorRT-LLM's FP8 has no others."""
    if not _exports(recipe):
        return assignment
    linears = {
        name: replace(linear, one_scale=linear.scheme.name == _FP8_STATIC)
        for name, linear in assignment.linears.items()
    }
    return replace(assignment, linears=MappingProxyType(linears))


def plan_modelopt(
    recipe: Recipe,
    linears: Iterable[LinearPlan],
    kv_cache: KvCachePlan | None,
    scale_dtype: str,
    compressed_bytes: int,
) -> ModeloptPlan | None:
    """Say what the artifact will be; None where the recipe wants none, or nothing is quantized.

    Args:
        scale_dtype: torch name of the model's dtype.
        compressed_bytes: of the same layers in compressed-tensors, without a cache.
    """
    quantized = [linear for linear in linears if linear.quantized]
    if not _exports(recipe) or not quantized:
        return None
    size = compressed_bytes
    for linear in quantized:
        size += _layer_bytes(linear, scale_dtype) - layer_bytes(linear, scale_dtype)
    if kv_cache is not None:
        size += 2 * len(kv_cache.attentions) * _NUMBER_BYTES
    return ModeloptPlan(MODELOPT_ALGORITHMS[quantized[0].scheme.name], size)


def _layer_bytes(linear: LinearPlan, scale_dtype: str) -> int:
    """Return the bytes of a layer's tensors, bias apart."""
    rows, columns = linear.out_features, linear.in_features
    dtype: torch.dtype = getattr(torch, scale_dtype)
    scheme = linear.scheme
    size = rows * columns * scheme.weight_bits // 8
    if scheme.grouped:
        groups = columns // (linear.group_size or columns)
        return size + rows * groups * _NUMBER_BYTES + columns * dtype.itemsize
    size += (1 if linear.one_scale else rows) * _NUMBER_BYTES
    size += scheme.static * _NUMBER_BYTES
    return size + (columns * dtype.itemsize if scheme.weight_kind == "int" else 0)


def find_modelopt_problems(
    recipe: Recipe,
    linears: Sequence[LinearPlan],
    fused: Iterable[Sequence[str]],
    *,
    gate: bool,
) -> Iterator[str]:
    """Yield what the recipe asks for and the layout has no place for.

    Args:
        fused: names of layers that servers make one of.
    """
    if not _exports(recipe):
        return
    quantized = [each for each in linears if each.scheme.name in MODELOPT_ALGORITHMS]
    spec = recipe.quantize
    if spec.scheme == AUTO and len(set(spec.candidates) - {"none"}) > 1:
        yield (
            "format modelopt has one scheme for all layers that are quantized: with scheme auto, "
            "quantize.candidates may name none and one other"
        )
    elif spec.scheme != AUTO and not any(linear.quantized for linear in linears):
        known = ", ".join(MODELOPT_ALGORITHMS)
        yield f"format modelopt: no layer has a scheme that it has (known: {known})"
    forms = list(dict.fromkeys((each.scheme.name, each.group_size) for each in quantized))
    if len(forms) > 1:
        words = ", ".join(f"{name}{f' g{size}' if size else ''}" for name, size in forms)
        yield (
            f"format modelopt has one scheme and group_size for all layers that are quantized, and "
            f"there are {words}: leave the others in 16 bits (scheme none), or export "
            f"compressed-tensors"
        )
    yield from _find_misfits(quantized)
    yield from _find_split_scales(linears, fused)
    if spec.kv_cache == "fp8_per_head":
        yield (
            "kv_cache fp8_per_head: format modelopt has one scale for the keys of a layer and one "
            "for its values; use kv_cache fp8"
        )
    if gate and recipe.gate is not None and recipe.gate.runtime == "vllm":
        for name in sorted({name for name, _ in forms} - set(_VLLM_SCHEMES)):
            yield (
                f"gate.runtime vllm: its reader of ModelOpt's layout has no "
                f"{MODELOPT_ALGORITHMS[name]} ({name}); use gate.runtime auto"
            )


def _find_misfits(quantized: Iterable[LinearPlan]) -> Iterator[str]:
    sizes, odd, scaled = [], [], []
    for linear in quantized:
        if linear.scheme.grouped and linear.group_size not in MODELOPT_GROUP_SIZES:
            sizes.append(linear)
        if linear.scheme.weight_bits == 4 and linear.out_features % 2:
            odd.append(linear)
        if linear.one_scale and linear.method.transform is not None:
            scaled.append(linear)
    if sizes:
        known = " or ".join(map(str, MODELOPT_GROUP_SIZES))
        yield (
            f"{_name(sizes)}: format modelopt has no group_size {sizes[0].group_size or 'channel'} "
            f"for w4a16; use {known}"
        )
    if odd:
        yield (
            f"{_name(odd)}: {odd[0].out_features} rows cannot be packed in pairs, as format "
            f"modelopt has them; leave these layers out with an ignore pattern"
        )
    if scaled:
        yield (
            f"{_name(scaled)}: format modelopt has one scale for all rows of an FP8 layer, which "
            f"method {scaled[0].method.name} would divide row by row; use method gptq or rtn"
        )


def _find_split_scales(
    linears: Iterable[LinearPlan], fused: Iterable[Sequence[str]]
) -> Iterator[str]:
    """Yield layers that servers round again, since each is solved under a scale of its own."""
    known = {linear.name: linear for linear in linears if linear.one_scale}
    split: list[LinearPlan] = []
    for names in fused:
        members = [known[name] for name in names if name in known]
        if len({(linear.method.rounder, linear.effort.name) for linear in members}) > 1:
            split += members
    if split:
        yield (
            f"{_name(split)}: format modelopt has one scale for FP8 layers that a server makes one "
            f"of, which is found for one method and effort; give q, k and v, and gate and up, the "
            f"same"
        )


def _name(linears: Sequence[LinearPlan]) -> str:
    return f"{linears[0].name} ({len(linears)} layer{'s' if len(linears) != 1 else ''})"


def find_modelopt_notes(recipe: Recipe, linears: Iterable[LinearPlan]) -> Iterator[str]:
    """Yield what TensorRT-LLM does otherwise than one might think."""
    if not _exports(recipe):
        return
    used = {linear.scheme.name for linear in linears if linear.quantized}
    if _FP8_STATIC in used:
        yield (
            "modelopt: all rows of an FP8 layer, and of layers with the same input, share one "
            "scale, in the other formats of this job too"
        )
    if "w8a8_static" in used:
        yield (
            "modelopt: W8A8_SQ_PER_CHANNEL is for TensorRT-LLM's engines; its PyTorch backend has "
            "no such layer and refuses it"
        )
    if recipe.quantize.kv_cache != "none":
        yield (
            "modelopt: TensorRT-LLM's PyTorch backend takes 1 for the scales of an FP8 key/value "
            "cache, whatever is stored"
        )
