"""Recipe + an encoder's headers -> EncoderPlan, or one error that lists every problem."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import summarize_names
from quantkit.encoders.checks import (
    find_layer_problems,
    find_mixed_groups,
    find_recipe_problems,
)
from quantkit.encoders.model import describe_encoder
from quantkit.encoders.structure import EncoderStructure, find_structure
from quantkit.errors import PlanError
from quantkit.planning import check_disk
from quantkit.planning.assignment import (
    find_idle_overrides,
    find_unmatched,
    first_override,
    is_ignored,
)
from quantkit.recipe import BEST, ExportSpec, QuantizeSpec, Recipe
from quantkit.recipe.scopes import find_idle_keys
from quantkit.records import (
    EncoderInfo,
    EncoderPlan,
    GroupPlan,
    LinearPlan,
    SolvedEncoder,
)
from quantkit.schemes import BEST_METHODS, EFFORTS, ENCODER_SCHEMES, METHODS, SCHEMES, Method

_FLOAT32 = 4
_COPIES = 3.5
_REPORT_BYTES = 32_000_000
# What one batch of texts takes in the widest layer, forward by forward, and the exporter's graph.
_WORKING_BYTES = 200_000_000


def make_encoder_plan(recipe: Recipe, checkpoint: Checkpoint, *, gate: bool = True) -> EncoderPlan:
    """Say what a job will do with an encoder: the plan of its INT8 export, else of its first.

    Args:
        recipe: a validated recipe.
        checkpoint: opened, of an encoder; its weights are not read.
        gate: whether the artifact is to be judged, for which the recipe must have a gate.

    Raises:
        PlanError: the recipe does not fit the encoder; every problem is listed.
        CheckpointError: the encoder is not built, or its tensors do not fit its config.
        ResourceError: there is too little space where the recipe's output shall go.
    """
    plans = plan_exports(recipe, checkpoint, gate=gate)
    return next((plan for plan in plans if plan.precision == "int8"), plans[0])


def plan_exports(
    recipe: Recipe, checkpoint: Checkpoint, *, gate: bool = True
) -> tuple[EncoderPlan, ...]:
    """Return a plan for each export of the recipe, in its order; see `make_encoder_plan`."""
    info = describe_encoder(checkpoint)
    structure = find_structure(checkpoint, info)
    spec = _own_patterns(recipe.quantize, structure)
    linears = {name: _plan_linear(spec, name, structure) for name in _layers(structure)}
    integer = any(linear.quantized for linear in linears.values())
    precisions = [_precision_of(export, integer) for export in recipe.export]
    names = [*linears, *structure.tables, *structure.others]
    problems = [
        *find_recipe_problems(recipe, gate=gate),
        *find_idle_keys(recipe, "encoder", precisions),
        *find_unmatched(spec, names),
        *_overrides_of_others(spec, structure),
        *(f"export names {name} twice" for name in set(precisions) if precisions.count(name) > 1),
        *find_layer_problems(recipe, list(linears.values()), calibrated="int8" in precisions),
        *find_mixed_groups(
            [linears[name] for name in group.linears]
            for group in structure.groups
            if "int8" in precisions
        ),
    ]
    if problems:
        raise PlanError(list(dict.fromkeys(problems)))
    plans = tuple(
        _plan_export(recipe, spec, checkpoint, info, structure, linears, export, precision)
        for export, precision in zip(recipe.export, precisions, strict=True)
    )
    if recipe.output is not None:
        check_disk(Path(recipe.output), sum(plan.disk_bytes for plan in plans))
    return plans


def looks_at_texts(quantized: Sequence[LinearPlan], float_layers: int | str) -> bool:
    """Whether texts are of use: to a method, a static scale, or the choice of `float_layers`."""
    needed = any(linear.needs_statistics for linear in quantized)
    return needed or (bool(quantized) and float_layers != 0)


def settle_plan(plan: EncoderPlan, solved: SolvedEncoder) -> EncoderPlan:
    """Return a plan with the sizes that come of what was solved.

    Layers that stayed in float take more, and so do the factors of smoothed inputs.
    """
    codes = {layer.name for layer in solved.layers}
    added = sum(
        _saved(linear.out_features, linear.in_features)
        for group in plan.groups
        for linear in group.linears
        if linear.quantized and linear.name not in codes
    )
    smoothed = {layer.group: layer.smoothing for layer in solved.layers}
    added += sum(_FLOAT32 * factor.numel() for factor in smoothed.values() if factor is not None)
    return _with_size(plan, plan.artifact_bytes + added)


def _layers(structure: EncoderStructure) -> list[str]:
    return [name for group in structure.groups for name in group.linears]


def _own_patterns(spec: QuantizeSpec, structure: EncoderStructure) -> QuantizeSpec:
    """Leave out the default of `ignore`, which is about the output layer of decoders."""
    names = [*structure.shapes]
    default = spec.ignore == QuantizeSpec().ignore
    if default and not any(fnmatchcase(name, spec.ignore[0]) for name in names):
        return spec.model_copy(update={"ignore": ()})
    return spec


def _scheme_name(spec: QuantizeSpec, name: str) -> str:
    if is_ignored(spec, name):
        return "none"
    return first_override(spec, name).scheme or spec.scheme


def _plan_linear(spec: QuantizeSpec, name: str, structure: EncoderStructure) -> LinearPlan:
    override = first_override(spec, name)
    wanted = _scheme_name(spec, name)
    # Another scheme is among the problems.
    scheme = SCHEMES[wanted if wanted in ENCODER_SCHEMES else "none"]
    out_features, in_features = structure.shapes[name]
    return LinearPlan(
        name=name,
        out_features=out_features,
        in_features=in_features,
        has_bias=name in structure.biased,
        scheme=scheme,
        group_size=None,
        method=_choose_method(override.method or spec.method, scheme.name),
        effort=EFFORTS[spec.effort],
    )


def _choose_method(name: str, scheme: str) -> Method:
    return METHODS[BEST_METHODS[scheme] if name == BEST else name]


def _precision_of(export: ExportSpec, integer: bool) -> str:
    return export.precision or ("int8" if integer else "fp32")


def _plan_export(
    recipe: Recipe,
    spec: QuantizeSpec,
    checkpoint: Checkpoint,
    info: EncoderInfo,
    structure: EncoderStructure,
    linears: dict[str, LinearPlan],
    export: ExportSpec,
    precision: str,
) -> EncoderPlan:
    """The plan of one export without problems."""
    integer = precision == "int8"
    if not integer:
        linears = {name: replace(each, scheme=SCHEMES["none"]) for name, each in linears.items()}
    groups = tuple(
        GroupPlan(tuple(linears[name] for name in group.linears), None)
        for group in structure.groups
    )
    tables: tuple[str, ...] = ()
    if integer and export.embeddings in (None, "int8"):
        tables = tuple(name for name in structure.tables if _scheme_name(spec, name) != "none")
    stored = [checkpoint.tensors[name] for name in structure.tensors.values()]
    parameters = sum(math.prod(tensor.shape) for tensor in stored)
    quantized = [linear for linear in linears.values() if linear.quantized]
    saved = sum(_saved(linear.out_features, linear.in_features) for linear in quantized)
    saved += sum(_saved(*structure.shapes[name]) for name in tables)
    notes = _notes(recipe, spec, info, structure, quantized, export)
    plan = EncoderPlan(
        model=checkpoint.source.name,
        info=info,
        groups=groups,
        tables=tables,
        precision=precision,
        notes=tuple(dict.fromkeys(notes)),
        parameters=parameters,
        baseline_bytes=sum(tensor.size for tensor in stored),
        artifact_bytes=0,
        bits_per_weight=0.0,
        memory_bytes=_memory_bytes(parameters, groups),
        disk_bytes=0,
    )
    floats = sum(_float_bytes(each.shape, export, precision) for each in stored)
    plan = _with_size(plan, floats + structure.constant_bytes - saved)
    sides = sum(path.stat().st_size for path in checkpoint.side_files)
    return replace(plan, disk_bytes=2 * plan.artifact_bytes + sides + _REPORT_BYTES)


def _float_bytes(shape: Sequence[int], export: ExportSpec, precision: str) -> int:
    """Bytes of a tensor in float; with fp16 alone, vectors stay in float32."""
    half = precision == "fp16" and (len(shape) > 1 or export.activations == "fp16")
    return math.prod(shape) * (2 if half else _FLOAT32)


def _saved(rows: int, columns: int) -> int:
    """Bytes that a float32 matrix loses as INT8 with a scale for each row."""
    return _FLOAT32 * rows * columns - (rows * columns + _FLOAT32 * rows)


def _with_size(plan: EncoderPlan, artifact_bytes: int) -> EncoderPlan:
    bits = 8 * artifact_bytes / plan.parameters
    return replace(plan, artifact_bytes=artifact_bytes, bits_per_weight=bits)


def _memory_bytes(parameters: int, groups: Sequence[GroupPlan]) -> int:
    """The model three and a half times, statistics, and a batch.

    The float weights are there as the model has them, transposed in the exporter's graph, and as
    the bytes of the file that is being written (or, later, widened from the codes to check it);
    codes and what was solved are a half at the most.
    """
    calibrated = [
        group.linears[0].in_features
        for group in groups
        if any(linear.needs_statistics for linear in group.linears)
    ]
    statistics = sum(_FLOAT32 * n * n for n in calibrated)
    return int(_COPIES * _FLOAT32 * parameters) + statistics + _WORKING_BYTES


def _overrides_of_others(spec: QuantizeSpec, structure: EncoderStructure) -> Iterator[str]:
    """Overrides that ask for layers outside of the encoder's own to be quantized."""
    planned = _layers(structure)
    for index, override in enumerate(spec.overrides):
        if override.scheme == "none" or any(fnmatchcase(name, override.match) for name in planned):
            continue
        found = [
            name
            for name in (*structure.others, *structure.tables)
            if fnmatchcase(name, override.match)
        ]
        if found:
            yield (
                f"quantize.overrides[{index}].match {override.match!r} names "
                f"{', '.join(summarize_names(found))}: an override can leave these in float "
                f"(scheme none), and no more"
            )


def _notes(
    recipe: Recipe,
    spec: QuantizeSpec,
    info: EncoderInfo,
    structure: EncoderStructure,
    quantized: Sequence[LinearPlan],
    export: ExportSpec,
) -> Iterator[str]:
    """What the user should know: what stays as it is, and what is asked for in vain."""
    yield from info.notes
    yield from structure.notes
    names = [*_layers(structure), *structure.tables, *structure.others]
    yield from find_idle_overrides(spec, names)
    if not quantized:
        if export.precision is None:
            yield "nothing will be quantized: every layer is ignored or has the scheme none"
        else:
            yield f"precision {export.precision}: no layer is quantized"
        return
    if any(linear.effort.whole_model for linear in quantized):
        yield "effort best: the layers of an encoder are rounded each for its own output's sake"
    if any(override.group_size is not None for override in spec.overrides):
        yield "group_size has no effect: INT8 weights of encoders have one scale a row"
    if recipe.calibration is not None:
        if not looks_at_texts(quantized, export.float_layers):
            yield "the calibration data is not used: no layer's method looks at it"
        elif recipe.calibration.range != "mse" and not any(
            linear.scheme.static for linear in quantized
        ):
            yield "calibration.range has no effect: scales of inputs are dynamic"
