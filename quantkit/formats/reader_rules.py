"""Whether the layers of an artifact are stored as its readers will look for them.

The readers' rules: which group of config.json a layer is in (`quantkit.formats.config_groups`),
which tensors with which dtypes and shapes a group has (`quantkit.formats.layouts`), and which
layers vLLM makes one of (`packed_modules_mapping` of its models), so that they must be alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.formats.config_groups import (
    find_config_groups,
    find_ignored,
    is_ignored,
    order_groups,
)
from quantkit.formats.decode import find_shape, list_layers
from quantkit.formats.layouts import (
    INPUT_SCALE,
    PACKED,
    PARTS,
    WEIGHT,
    Layout,
    name_scheme,
    part_dtypes,
    part_shapes,
)

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Last parts of the names of layers that vLLM makes one of."""


@dataclass(frozen=True)
class ClaimedLayer:
    """A linear layer and how its readers take it to be stored."""

    name: str
    layout: Layout | None
    """None: as a weight in 16 bits."""
    shape: tuple[int, int]
    """Of its weight, [O, I]."""


def claim_layers(artifact: Checkpoint, linears: Iterable[str]) -> tuple[ClaimedLayer, ...]:
    """Say for each linear layer what readers will take it for.

    Args:
        artifact: opened.
        linears: names of the linear layers of the model; those without a weight, or with one whose
            shape is not known, are left out: that is for others to tell.

    Raises:
        ArtifactError: a target in the config makes no sense.
    """
    groups, ignored = find_config_groups(artifact.config), find_ignored(artifact.config)
    claimed = []
    for name in sorted({*linears, *list_layers(artifact)}):
        if not any(f"{name}.{part}" in artifact.tensors for part in (WEIGHT, PACKED)):
            continue
        found = [] if is_ignored(name, ignored) else order_groups(name, groups)
        layout = found[0].layout if found else None
        with suppress(ArtifactError):
            claimed.append(ClaimedLayer(name, layout, find_shape(artifact, name)))
    return tuple(claimed)


def check_layers(artifact: Checkpoint, claimed: Iterable[ClaimedLayer]) -> Iterator[str]:
    """Compare every layer's tensors with those that its readers look for; yield the problems."""
    coded = set(list_layers(artifact))
    for layer in claimed:
        stored = {
            part: artifact.tensors[f"{layer.name}.{part}"]
            for part in PARTS
            if f"{layer.name}.{part}" in artifact.tensors
        }
        if layer.layout is None:
            if layer.name in coded:
                yield f"layer {layer.name} holds codes, but no group of config.json is for it"
            continue
        if layer.name not in coded:
            yield f"layer {layer.name} is not quantized, but config.json says that it is"
            continue
        expected, dtypes = part_shapes(layer.layout, *layer.shape), part_dtypes(layer.layout)
        scheme = name_scheme(layer.layout)
        missing = [part for part in expected if part not in stored]
        if missing:
            yield f"layer {layer.name} lacks {', '.join(missing)}, which {scheme} has"
        for part, info in stored.items():
            if part not in expected:
                yield f"layer {layer.name} has {part}, for which {scheme} has no place"
            elif (info.shape or (1,)) != expected[part] or info.dtype not in dtypes[part]:
                yield (
                    f"tensor {info.name} is {info.dtype} {list(info.shape)}, but {scheme} has "
                    f"{' or '.join(dtypes[part])} {list(expected[part])}"
                )


def check_fused(artifact: Checkpoint, claimed: Iterable[ClaimedLayer]) -> Iterator[str]:
    """Yield a problem for layers that vLLM makes one of and that are not alike."""
    layers = {layer.name: layer for layer in claimed}
    for members in find_fused(layers):
        layouts = {layers[name].layout for name in members}
        if len(layouts) > 1:
            words = ", ".join(f"{name} {_describe(layers[name].layout)}" for name in members)
            yield f"vLLM makes one layer of these, which must have one scheme: {words}"
            continue
        names = [f"{name}.{INPUT_SCALE}" for name in members]
        if not all(name in artifact.tensors for name in names):
            continue
        try:
            scales = [float(read_tensor(artifact, name).reshape(-1)[0]) for name in names]
        except CheckpointError:
            # What is damaged is told once, by the check of all values.
            continue
        if len(set(scales)) > 1:
            found = ", ".join(
                f"{name} {scale:g}" for name, scale in zip(names, scales, strict=True)
            )
            yield f"vLLM rounds the input of these with one scale, but they have several: {found}"


def find_fused(layers: Mapping[str, object]) -> Iterator[tuple[str, ...]]:
    """Yield the names of layers that vLLM makes one of."""
    for name in sorted(layers):
        parent, _, leaf = name.rpartition(".")
        for group in FUSED:
            members = tuple(f"{parent}.{part}" for part in group)
            if leaf == group[0] and all(member in layers for member in members):
                yield members


def _describe(layout: Layout | None) -> str:
    if layout is None:
        return "none"
    group = f"/{layout.group_size}" if layout.group_size is not None else ""
    return f"{name_scheme(layout)}{group}"
