"""What the recipe's patterns mean for each linear layer of the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType

from torch import nn

from quantkit.checkpoint.skeleton import summarize_names
from quantkit.checkpoint.structure import Structure, output_embedding_name
from quantkit.errors import nearest
from quantkit.recipe import AUTO, BEST, Override, QuantizeSpec
from quantkit.records import LinearPlan
from quantkit.schemes import BEST_METHODS, EFFORTS, METHODS, SCHEMES, Method, Scheme


@dataclass(frozen=True)
class Assignment:
    """Every linear layer of the blocks with what will be done to it."""

    linears: Mapping[str, LinearPlan]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def assign(
    spec: QuantizeSpec,
    skeleton: nn.Module,
    structure: Structure,
    chosen: Mapping[str, str] = MappingProxyType({}),
    methods: Mapping[str, Method] = METHODS,
) -> Assignment:
    """Resolve `ignore`, then `overrides` (the first match wins), then the recipe's own settings.

    A layer with the scheme `none` is left as it is. Patterns are shell patterns on full names.
    `chosen` has the schemes of the layers that the recipe leaves open (`scheme: auto`), and
    `methods` what the recipe may name.
    """
    groups = [group for block in structure.blocks for group in block.groups]
    planned = [name for group in groups for name in group.linears]
    scalable = {name for group in groups if group.fold is not None for name in group.linears}
    linears = {
        name: _plan_linear(
            spec, name, skeleton.get_submodule(name), name in scalable, chosen, methods
        )
        for name in planned
    }
    others = _other_layers(skeleton, planned)
    problems = [
        *find_unmatched(spec, [*planned, *others]),
        *_overrides_of_others(spec, planned, others),
        *_unbuilt_head(spec, output_embedding_name(skeleton)),
    ]
    notes = find_idle_overrides(spec, [*planned, *others])
    return Assignment(MappingProxyType(linears), tuple(problems), tuple(notes))


def open_layers(spec: QuantizeSpec, structure: Structure) -> list[str]:
    """Name the layers whose scheme the recipe leaves open, in the order of the forward."""
    return [
        name
        for block in structure.blocks
        for group in block.groups
        for name in group.linears
        if _scheme_name(spec, name) == AUTO
    ]


def _plan_linear(
    spec: QuantizeSpec,
    name: str,
    module: nn.Module,
    scalable: bool,
    chosen: Mapping[str, str],
    methods: Mapping[str, Method],
) -> LinearPlan:
    override = first_override(spec, name)
    scheme_name = _scheme_name(spec, name)
    scheme = SCHEMES[chosen[name] if scheme_name == AUTO else scheme_name]
    group_size = spec.group_size if override.group_size is None else override.group_size
    grouped = scheme.grouped and isinstance(group_size, int)
    out_features, in_features = module.get_parameter("weight").shape
    return LinearPlan(
        name=name,
        out_features=out_features,
        in_features=in_features,
        has_bias=module._parameters.get("bias") is not None,
        scheme=scheme,
        group_size=int(group_size) if grouped else None,
        method=_choose_method(override.method or spec.method, scheme, scalable, methods),
        effort=EFFORTS[spec.effort],
    )


def _choose_method(
    name: str, scheme: Scheme, scalable: bool, methods: Mapping[str, Method]
) -> Method:
    """Resolve `best`; nothing is scaled where nothing in front can take the scale."""
    if name != BEST:
        return methods[name]
    method = METHODS[BEST_METHODS[scheme.name]]
    if method.transform is None or scalable:
        return method
    return METHODS[method.rounder]


def _scheme_name(spec: QuantizeSpec, name: str) -> str:
    if is_ignored(spec, name):
        return "none"
    return first_override(spec, name).scheme or spec.scheme


def first_override(spec: QuantizeSpec, name: str) -> Override:
    """Return the override that a layer has: the first that matches, else one that says nothing."""
    matching = (override for override in spec.overrides if fnmatchcase(name, override.match))
    return next(matching, Override(match="*"))


def is_ignored(spec: QuantizeSpec, name: str) -> bool:
    """Whether an ignore pattern matches a layer."""
    return any(fnmatchcase(name, pattern) for pattern in spec.ignore)


def _other_layers(skeleton: nn.Module, planned: Collection[str]) -> list[str]:
    """Linear layers and embeddings that the walk does not visit."""
    inside = set(planned)
    return [
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and name not in inside
    ]


def find_unmatched(spec: QuantizeSpec, names: list[str]) -> Iterator[str]:
    """Yield patterns that match none of `names`: silently doing nothing would be a trap."""
    rows = [(f"quantize.ignore[{index}]", pattern) for index, pattern in enumerate(spec.ignore)]
    rows += [
        (f"quantize.overrides[{index}].match", override.match)
        for index, override in enumerate(spec.overrides)
    ]
    for where, pattern in rows:
        if not any(fnmatchcase(name, pattern) for name in names):
            yield f"{where} {pattern!r} matches no layer{_suggest(pattern, names)}"


def _suggest(pattern: str, names: list[str]) -> str:
    if pattern.startswith("re:"):
        return "; write a shell pattern as *.down_proj, not a regular expression"
    parts = [name.split(".") for name in names]
    tails = ["*." + ".".join(words[-count:]) for count in (1, 2) for words in parts]
    found = nearest(pattern, dict.fromkeys([*tails, *names]))
    if found:
        return found
    ends = dict.fromkeys("*." + words[-1] for words in parts if len(words) > 1)
    return f" (layers of this model: {', '.join(ends)})"


def _overrides_of_others(
    spec: QuantizeSpec, planned: list[str], others: list[str]
) -> Iterator[str]:
    """Overrides that ask for layers outside of the blocks to be quantized."""
    for index, override in enumerate(spec.overrides):
        if override.scheme == "none" or any(fnmatchcase(name, override.match) for name in planned):
            continue
        found = [name for name in others if fnmatchcase(name, override.match)]
        if found:
            yield (
                f"quantize.overrides[{index}].match {override.match!r} names "
                f"{', '.join(summarize_names(found))}: quantizing layers outside of the decoder "
                f"blocks is not built yet"
            )


def _unbuilt_head(spec: QuantizeSpec, head: str | None) -> Iterator[str]:
    if head is not None and _scheme_name(spec, head) != "none":
        yield f"quantizing {head} is not built yet: add {head} to quantize.ignore"


def find_idle_overrides(spec: QuantizeSpec, names: list[str]) -> Iterator[str]:
    """Yield overrides that are the first match of no layer that is not ignored."""
    for index, override in enumerate(spec.overrides):
        matched = [name for name in names if fnmatchcase(name, override.match)]
        if matched and all(
            is_ignored(spec, name) or first_override(spec, name) is not override for name in matched
        ):
            yield (
                f"quantize.overrides[{index}].match {override.match!r} has no effect: all of its "
                f"layers are ignored or taken by an override before it"
            )
