"""Everything that stands in the way of a job, and what its owner should know."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, cast

from torch import nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import summarize_names
from quantkit.checkpoint.structure import Structure
from quantkit.ggml_types import GGUF
from quantkit.planning.assignment import Assignment
from quantkit.planning.onnx import only_onnx
from quantkit.recipe import BEST, Recipe
from quantkit.recipe.scopes import find_idle_keys
from quantkit.records import LinearPlan
from quantkit.schemes import (
    BEST_METHODS,
    BLOCK_SIZE,
    FORMAT_SCHEMES,
    GROUP_SIZES,
    METHODS,
    RUNTIME_NOTES,
    RUNTIME_SCHEMES,
    SCHEMES,
)

_FLOATS = ("BF16", "F16", "F32")
_KERNEL_MULTIPLE = 32


def find_problems(
    recipe: Recipe,
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    structure: Structure,
    assignment: Assignment,
    *,
    gate: bool,
) -> Iterator[str]:
    """Yield one line for each problem: what, where, and the remedy."""
    quantized = quantized_linears(assignment)
    solved = [linear for linear in assignment.linears.values() if linear.solved]
    yield from join_layers(find_misfits(quantized))
    yield from join_layers(_odd_dtypes(solved, checkpoint))
    yield from join_layers(_unscalable(quantized, structure))
    yield from join_layers(_unsolvable(quantized))
    if not only_onnx(recipe):
        yield from _split_fusions(structure, assignment)
    yield from _lacking_formats(recipe, quantized)
    if gate:
        yield from _lacking_runtime(recipe, quantized)
    yield from _missing_data(recipe, solved, gate=gate)
    yield from _too_long(recipe, skeleton, solved, gate=gate)
    yield from find_idle_keys(recipe, "decoder")


def find_notes(recipe: Recipe, assignment: Assignment) -> Iterator[str]:
    """Yield what works, but not everywhere or not as one might think."""
    quantized = quantized_linears(assignment)
    if not only_onnx(recipe):
        yield from _note_servers(quantized)
    yield from join_layers(_without_transform(recipe, quantized))
    for name in dict.fromkeys(each.method.name for each in quantized if each.method.solver):
        yield f"method {name} is a solver of your own: its time and memory are not predicted"
    calibrated = [each for each in assignment.linears.values() if each.needs_statistics]
    spec = recipe.calibration
    if spec is None:
        return
    if not calibrated:
        if recipe.quantize.kv_cache == "none" and not recipe.measures:
            yield "the calibration data is not used: no layer's method looks at it"
        return
    tokens = spec.samples * spec.sequence_length
    widest = max(linear.in_features for linear in calibrated)
    if tokens < widest:
        yield (
            f"{tokens} calibration tokens are fewer than the {widest} inputs of the widest layer: "
            f"its second moment is singular; raise samples or sequence_length"
        )


def _note_servers(quantized: Sequence[LinearPlan]) -> Iterator[str]:
    """What vLLM and transformers do not have everywhere."""
    yield from join_layers(_without_cpu_kernel(quantized))
    used = {linear.scheme.name for linear in quantized}
    for (scheme, _), text in RUNTIME_NOTES.items():
        if scheme in used:
            yield text


def quantized_linears(assignment: Assignment) -> list[LinearPlan]:
    """Return the layers that get codes, in the order of the forward."""
    return [linear for linear in assignment.linears.values() if linear.quantized]


_Finding = tuple[str, str]
"""A layer's full name and what is to be said about it."""


def join_layers(findings: Iterable[_Finding]) -> Iterator[str]:
    """Yield one line for all layers of which the same is to be said."""
    lines: dict[str, list[str]] = {}
    for name, text in findings:
        lines.setdefault(text, []).append(name)
    for text, names in lines.items():
        count = f"{len(names)} layer{'s' if len(names) != 1 else ''}"
        yield f"{', '.join(summarize_names(names))} ({count}): {text}"


def find_misfits(quantized: Iterable[LinearPlan]) -> Iterator[_Finding]:
    """Yield layers whose shape their scheme cannot have."""
    for linear in quantized:
        features, bits = linear.in_features, linear.scheme.weight_bits
        packs = not linear.scheme.grouped or features * bits % 32 == 0
        if linear.group_size is not None and features % linear.group_size:
            fitting = [str(size) for size in GROUP_SIZES if features % size == 0]
            fitting += ["channel"] if packs else []
            remedy = f"use {' or '.join(fitting)}, or " if fitting else ""
            yield (
                linear.name,
                f"group_size {linear.group_size} does not divide in_features {features}; {remedy}"
                f"leave these layers out with an override or an ignore pattern",
            )
        elif not packs:
            yield (
                linear.name,
                f"in_features {features} is not a multiple of {32 // bits}, so rows of {bits}-bit "
                f"codes cannot be packed; leave these layers out with an ignore pattern",
            )
        elif linear.scheme.granularity == "block" and not _is_whole(linear):
            yield (
                linear.name,
                f"{linear.out_features}x{features} is not made of whole blocks of {BLOCK_SIZE} x "
                f"{BLOCK_SIZE}, two or more in a row, and transformers would decode it with the "
                f"wrong scales; use scheme fp8_dynamic for these layers with an override",
            )


def _is_whole(linear: LinearPlan) -> bool:
    """Whether readers find the blocks' size in the shape of the scales."""
    rows, columns = linear.out_features, linear.in_features
    if rows % BLOCK_SIZE or columns % BLOCK_SIZE:
        return False
    return columns > BLOCK_SIZE or rows == BLOCK_SIZE


def _odd_dtypes(quantized: Iterable[LinearPlan], checkpoint: Checkpoint) -> Iterator[_Finding]:
    for linear in quantized:
        info = checkpoint.tensors[f"{linear.name}.weight"]
        if info.dtype not in _FLOATS:
            yield (
                linear.name,
                f"the weight is {info.dtype}, which cannot be quantized; start from a checkpoint "
                f"in {', '.join(_FLOATS)}",
            )


def _unscalable(quantized: Iterable[LinearPlan], structure: Structure) -> Iterator[_Finding]:
    """Layers whose method scales their input, which nothing in front can take."""
    folded = {
        name
        for block in structure.blocks
        for group in block.groups
        if group.fold is not None
        for name in group.linears
    }
    for linear in quantized:
        if linear.method.transform is not None and linear.name not in folded:
            yield (
                linear.name,
                f"method {linear.method.name} scales inputs, and no family file says what can "
                f"take the scale in front of these layers; use method gptq or rtn",
            )


def _unsolvable(quantized: Iterable[LinearPlan]) -> Iterator[_Finding]:
    """Layers for which a custom solver would have to choose floating-point codes."""
    for linear in quantized:
        if linear.method.solver is None:
            continue
        if linear.scheme.weight_kind != "int":
            yield (
                linear.name,
                f"method {linear.method.name} chooses integer codes, and those of scheme "
                f"{linear.scheme.name} are floating-point: use an integer scheme, or a method of "
                f"quantkit for these layers",
            )
        elif linear.one_scale:
            yield (
                linear.name,
                f"method {linear.method.name} is given one layer, and an export of the recipe "
                f"stores a scale that several share: use a method of quantkit for these layers",
            )


def _without_transform(recipe: Recipe, quantized: Iterable[LinearPlan]) -> Iterator[_Finding]:
    """Layers for which `best` would scale the input, if something in front could take the scale."""
    if recipe.quantize.method != BEST:
        return
    for linear in quantized:
        best = BEST_METHODS[linear.scheme.name]
        if linear.method.name != best and linear.method.name == METHODS[best].rounder:
            yield (
                linear.name,
                f"method {linear.method.name} instead of {best}: no family file says what can take "
                f"a scale in front of these layers",
            )


def _split_fusions(structure: Structure, assignment: Assignment) -> Iterator[str]:
    """Layers that vLLM makes one of, but that would be stored differently."""
    lines: dict[str, int] = {}
    for block in structure.blocks:
        for names in block.fused:
            linears = [assignment.linears[name] for name in names]
            if len({(linear.scheme.name, linear.group_size) for linear in linears}) > 1:
                members = ", ".join(
                    f"{summarize_names([linear.name])[0]} {_describe(linear)}" for linear in linears
                )
                lines[members] = lines.get(members, 0) + 1
    for members, count in lines.items():
        yield (
            f"{members} ({count} block{'s' if count != 1 else ''}): vLLM makes one layer of these; "
            f"give all of them the same scheme and group_size"
        )


def _describe(linear: LinearPlan) -> str:
    if not linear.quantized:
        return "none"
    return f"{linear.scheme.name}/{linear.group_size or 'channel'}"


def _lacking_formats(recipe: Recipe, quantized: Iterable[LinearPlan]) -> Iterator[str]:
    """Schemes that the readers of an export format do not have."""
    used = sorted({linear.scheme.name for linear in quantized})
    for export in recipe.export:
        if export.format == GGUF:
            # Its files have types of their own.
            continue
        known = FORMAT_SCHEMES.get(export.format, frozenset())
        for scheme in used:
            if scheme not in known:
                yield f"format {export.format} has no scheme {scheme}{_offer(scheme, known)}"


def _lacking_runtime(recipe: Recipe, quantized: Iterable[LinearPlan]) -> Iterator[str]:
    """Schemes that the runtime lacks in which the recipe wants to be judged."""
    runtime = "auto" if recipe.gate is None else recipe.gate.runtime
    known = RUNTIME_SCHEMES.get(runtime)
    if known is None:
        return
    for scheme in sorted({linear.scheme.name for linear in quantized} - known):
        yield f"gate.runtime {runtime} has no scheme {scheme}{_offer(scheme, known)}"


def _offer(wanted: str, known: Collection[str]) -> str:
    """Name the scheme that is the most like the wanted one, and all that there are."""
    target = SCHEMES[wanted]

    def distance(name: str) -> tuple[int, bool, bool]:
        scheme = SCHEMES[name]
        return (
            abs(scheme.weight_bits - target.weight_bits),
            scheme.weight_kind != target.weight_kind,
            scheme.activations != target.activations,
        )

    offered = [name for name in SCHEMES if name in known and name != "none"]
    if not offered:
        return "; it has none that is built"
    return f"; the nearest that it has is {min(offered, key=distance)} (all: {', '.join(offered)})"


def _missing_data(recipe: Recipe, quantized: Iterable[LinearPlan], *, gate: bool) -> Iterator[str]:
    if recipe.calibration is None:
        remedy = "add a `calibration:` section with `data:`"
        methods = sorted({each.method.name for each in quantized if each.method.needs_calibration})
        static = sorted({each.scheme.name for each in quantized if each.scheme.static})
        if methods:
            yield (
                f"method {', '.join(methods)} needs calibration data: {remedy}, or use method rtn"
            )
        if static:
            yield (
                f"scheme {', '.join(static)} stores scales of its inputs, which come from "
                f"calibration data: {remedy}, or use a scheme with dynamic activations"
            )
        if recipe.quantize.kv_cache != "none":
            yield (
                f"kv_cache {recipe.quantize.kv_cache} stores scales of keys and values, which come "
                f"from calibration data: {remedy}, or use kv_cache none"
            )
    if gate and recipe.gate is None:
        yield (
            "the recipe has no gate: add a `gate:` section with `data:`, or pass --no-gate and "
            "get an artifact marked UNJUDGED"
        )


def _too_long(
    recipe: Recipe, skeleton: nn.Module, quantized: Iterable[LinearPlan], *, gate: bool
) -> Iterator[str]:
    """Windows longer than the positions that the model was made for."""
    config = cast(Any, skeleton).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return
    calibrated = (
        recipe.quantize.kv_cache != "none"
        or recipe.measures
        or any(linear.needs_statistics for linear in quantized)
    )
    for name, spec, used in (
        ("calibration", recipe.calibration, calibrated),
        ("gate", recipe.gate, gate),
    ):
        if used and spec is not None and spec.sequence_length > limit:
            yield (
                f"{name}.sequence_length {spec.sequence_length} is more than the model's "
                f"{limit} positions: use {limit} or less"
            )


def _without_cpu_kernel(quantized: Iterable[LinearPlan]) -> Iterator[_Finding]:
    for linear in quantized:
        if linear.in_features % _KERNEL_MULTIPLE or linear.out_features % _KERNEL_MULTIPLE:
            yield (
                linear.name,
                f"{linear.out_features}x{linear.in_features} is not made of multiples of "
                f"{_KERNEL_MULTIPLE}, which vLLM's CPU kernels need",
            )
