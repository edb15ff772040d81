"""An artifact against the checkpoint that it was made from: what is equal, what changed, how far.

A quantized weight is compared as it decodes. Where a scale per channel was folded into a norm in
front (AWQ, SmoothQuant), the norms' ratio tells it, and the weight is compared with the base's
weight times that scale. A scale between two linear layers leaves no such trace: rows and columns
of the base are then fitted, and what is told is the error beside that fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.checkpoint.skeleton import build_unchecked, tied_names
from quantkit.errors import ArtifactError
from quantkit.formats.configs import compare_configs
from quantkit.formats.decode import list_layers, read_stored_layer
from quantkit.formats.kv_scales import KV_SCALES
from quantkit.formats.layouts import PARTS, WEIGHT
from quantkit.formats.passthrough import is_same
from quantkit.formats.scale_checks import (
    LARGEST_BIAS,
    FittedScales,
    Spread,
    find_lonely_rows,
    measure_bias,
    measure_spread,
)
from quantkit.formats.table_rows import find_wrong_rows, measure_rows
from quantkit.numerics.affine import dequantize_layer

_LIMITS = {4: 0.5, 8: 0.1}
"""Bits of a code -> relative error beyond which a layer cannot be a rounding of the base's. Plain
rounding in one group a row makes about 0.2 and 0.01."""
_LEAST_COSINE = 0.5
"""Of a rounding: an error of 1.7 times the norm that is no part of the weight leaves as much."""
NEAR = _LIMITS[8] / 2
"""Relative error up to which nothing needs to have been folded."""
_SWEEPS = 3
ROWS_AND_COLUMNS = "rows and columns"
"""What was folded, where it is no norm's scale."""


@dataclass(frozen=True)
class ComparedLayer:
    """How far a quantized layer is from the base's weight."""

    name: str
    relative_error: float
    """||W' - W|| / ||W||, where W is the base's weight with what was folded into it."""
    folded: str | None = None
    """The norm that gave its scale, or `rows and columns`."""
    cosine: float = 1.0
    """Of the angle between W' and W."""
    spread: Spread = field(default_factory=Spread)
    """How the best factor on a short piece of a row varies."""
    bias: float = 0.0
    """Mean of the errors, relative to their root mean square."""
    fitted: FittedScales | None = field(default=None, compare=False, repr=False)
    """What fits best; it may explain little. Not in a `Comparison`."""

    def find_problem(self, bits: int, limit: float) -> str | None:
        """Say that the layer cannot be a rounding of the base's, if that is so.

        A rounding under a second moment may be far from the weight where inputs never go, but
        not in its direction.
        """
        if self.spread.is_wrong:
            return (
                f"layer {self.name} has scales that are not those of its codes: short pieces of "
                f"its rows are too large or too small by {100 * self.spread.found:.0f} %, and by "
                f"{100 * self.spread.usual:.1f} % is usual for such errors"
            )
        if self.bias > LARGEST_BIAS:
            return (
                f"layer {self.name} is off to one side: the mean of its errors is "
                f"{100 * self.bias:.0f} % of their size, and rounding to {bits} bits leaves almost "
                f"none; are its zero points right?"
            )
        if self.relative_error <= limit or self.cosine >= _LEAST_COSINE:
            return None
        return (
            f"layer {self.name} differs from the base's by {self.relative_error:.3g} of its norm "
            f"and points elsewhere (cosine {self.cosine:.2f}), which no rounding to {bits} bits "
            f"does"
        )


@dataclass(frozen=True)
class StoredCodes:
    """The quantized layers of an artifact, in whichever layout.

    tensors: names of all tensors that are parts of them. read: name of a layer -> the float32
    weight [O, I] that its codes stand for, and the bits of a code.
    """

    names: tuple[str, ...]
    tensors: frozenset[str]
    read: Callable[[str], tuple[Tensor, int]]


@dataclass(frozen=True)
class Comparison:
    """An artifact against its base."""

    base: str
    layers: tuple[ComparedLayer, ...]
    changed: tuple[str, ...]
    """Tensors that are not quantized and differ from the base's."""
    equal: int
    """Tensors that have the base's bytes."""
    problems: tuple[str, ...]

    @property
    def largest_error(self) -> float:
        """The largest relative error of a layer; 0 where none is quantized."""
        return max((layer.relative_error for layer in self.layers), default=0.0)


def compare_artifact(
    artifact: Checkpoint, base: Checkpoint, codes: StoredCodes | None = None
) -> Comparison:
    """Compare every tensor.

    Args:
        artifact: a compressed-tensors artifact or a checkpoint, or one with the layers of `codes`.
        base: what it was made from.
        codes: the quantized layers, where they are not those of compressed-tensors.

    Raises:
        CheckpointError: the base is quantized or damaged, or a tensor of the artifact is.
    """
    ties = tied_names(build_unchecked(base))
    codes = _find_codes(artifact) if codes is None else codes
    coded = codes.names
    problems = list(_compare_names(artifact, base, codes, ties))
    changed, equal = [], 0
    for name in sorted(artifact.tensors.keys() & base.tensors.keys()):
        if name.removesuffix(f".{WEIGHT}") in coded:
            continue
        if artifact.tensors[name].shape != base.tensors[name].shape:
            problems.append(
                f"tensor {name} has the shape {list(artifact.tensors[name].shape)}, the base's "
                f"{list(base.tensors[name].shape)}"
            )
        elif is_same(artifact, name, name, base):
            equal += 1
        else:
            changed.append(name)
            problems += _check_table(artifact, base, name)
    ratios = _find_ratios(artifact, base, changed)
    layers = []
    for name in coded:
        if f"{name}.{WEIGHT}" not in base.tensors:
            continue
        try:
            layer, bits = _compare_layer(codes, base, name, ratios)
        except ArtifactError as error:
            problems.append(str(error))
            continue
        layers.append(layer)
        problem = layer.find_problem(bits, _LIMITS[8 if bits == 8 else 4])
        if problem is None and not has_block(name):
            problem = _check_coded_table(codes, base, name)
        if problem is not None:
            problems.append(problem)
    problems += find_lonely_layers(layers, changed)
    problems += filter(None, [compare_configs(artifact, base)])
    return Comparison(
        base.source.name, without_fits(layers), tuple(changed), equal, tuple(problems)
    )


def find_lonely_layers(layers: Sequence[ComparedLayer], changed: Sequence[str]) -> Iterator[str]:
    """Yield a problem of each layer whose rows are scaled, and nothing takes that back.

    Args:
        layers: those of the whole model.
        changed: tensors that are not quantized and differ, which might: their blocks are left out.
    """
    unclear = {_block_of(name) for name in changed if ".weight" in name and "norm" not in name}
    blocks: dict[str, dict[str, FittedScales]] = {}
    for layer in layers:
        if layer.fitted is not None and _block_of(layer.name) not in unclear:
            blocks.setdefault(_block_of(layer.name), {})[layer.name] = layer.fitted
    scaled = {layer.name for layer in layers if layer.folded == ROWS_AND_COLUMNS}
    for fitted in blocks.values():
        yield from find_lonely_rows(fitted, [name for name in fitted if name in scaled])


def without_fits(layers: Sequence[ComparedLayer]) -> tuple[ComparedLayer, ...]:
    """Return the layers as they are reported: their figures, and no tensors."""
    return tuple(replace(layer, fitted=None) for layer in layers)


def _find_codes(artifact: Checkpoint) -> StoredCodes:
    """The quantized layers of a compressed-tensors artifact."""
    names = tuple(list_layers(artifact))

    def read(name: str) -> tuple[Tensor, int]:
        layer = read_stored_layer(artifact, name)
        return dequantize_layer(layer), layer.scheme.weight_bits

    parts = frozenset(f"{name}.{part}" for name in names for part in PARTS)
    return StoredCodes(names, parts, read)


def _compare_names(
    artifact: Checkpoint, base: Checkpoint, codes: StoredCodes, ties: Mapping[str, str]
) -> Iterator[str]:
    """Yield tensors that only one of both has."""
    scales = {name for name in artifact.tensors if name.rpartition(".")[2] in KV_SCALES}
    weights = {f"{name}.{WEIGHT}" for name in codes.names}
    mine = (artifact.tensors.keys() - codes.tensors - scales) | weights
    # A tied tensor may be stored twice or once.
    lost = sorted(base.tensors.keys() - mine - ties.keys())
    if lost:
        yield f"{len(lost)} tensors of the base are missing, for instance {lost[0]}"
    added = sorted(mine - base.tensors.keys() - ties.keys())
    if added:
        yield f"{len(added)} tensors are not in the base, for instance {added[0]}"


def _check_table(artifact: Checkpoint, base: Checkpoint, name: str) -> Iterator[str]:
    """Look at the rows of a changed matrix that belongs to no block."""
    if len(base.tensors[name].shape) != 2 or has_block(name):
        return
    rows = measure_rows(read_tensor(artifact, name), read_tensor(base, name))
    problem = find_wrong_rows(name, rows)
    if problem is not None:
        yield problem


def _check_coded_table(codes: StoredCodes, base: Checkpoint, name: str) -> str | None:
    found, _ = codes.read(name)
    rows = measure_rows(found, read_tensor(base, f"{name}.{WEIGHT}"))
    return find_wrong_rows(f"{name}.{WEIGHT}", rows)


def has_block(name: str) -> bool:
    """Whether a tensor belongs to a block; embeddings and output layers do not."""
    return any(part.isdigit() for part in name.split("."))


def _find_ratios(
    artifact: Checkpoint, base: Checkpoint, changed: Sequence[str]
) -> dict[str, Tensor]:
    """Changed vectors -> the base's divided by the artifact's, in float32."""
    ratios = {}
    for name in changed:
        if not name.endswith(f".{WEIGHT}") or len(base.tensors[name].shape) != 1:
            continue
        ratio = read_tensor(base, name).float() / read_tensor(artifact, name).float()
        # A weight of zero tells nothing of what it was divided by.
        ratios[name] = torch.nan_to_num(ratio, nan=1.0, posinf=1.0, neginf=1.0)
    return ratios


def _compare_layer(
    codes: StoredCodes, base: Checkpoint, name: str, ratios: Mapping[str, Tensor]
) -> tuple[ComparedLayer, int]:
    """Compare one layer under the explanation that fits best; return its bits, too.

    Raises:
        ArtifactError: it cannot be decoded.
        CheckpointError: the base's weight is damaged.
    """
    found, bits = codes.read(name)
    weight = read_tensor(base, f"{name}.{WEIGHT}").float()
    if found.shape != weight.shape:
        raise ArtifactError(
            f"layer {name} is {list(found.shape)}, the base's is {list(weight.shape)}"
        )
    block = _block_of(name)
    candidates = {
        norm: ratio
        for norm, ratio in ratios.items()
        if _block_of(norm) == block and len(ratio) == weight.shape[1]
    }
    return explain_layer(name, found, weight, candidates), bits


def explain_layer(
    name: str, found: Tensor, weight: Tensor, ratios: Mapping[str, Tensor]
) -> ComparedLayer:
    """Compare a layer under the fold that explains it best.

    Args:
        found: float32 [O, I], as it decodes; weight: that of the base.
        ratios: norm's weight -> the base's divided by the artifact's, float32 [I], for the norms
            that may stand in front.
    """
    error, folded, base = _relative_error(found, weight), None, weight
    for norm, ratio in ratios.items():
        # The norm's output shrank by the ratio, so the weight grew by it.
        scaled = weight * ratio
        candidate = _relative_error(found, scaled)
        if candidate < error:
            error, folded, base = candidate, norm.removesuffix(f".{WEIGHT}"), scaled
    spread = measure_spread(found, base)
    # Where few columns hold most of a weight, a fold that leaves them alone is a small error.
    fitted, scales = _fit_rows_and_columns(found, weight)
    if error > NEAR:
        candidate = _relative_error(found, fitted)
        spread = min(spread, measure_spread(found, fitted), key=lambda each: each.found)
        # A fit always gains a little: only what explains much was folded.
        if candidate <= 0.8 * error:
            error, folded, base = candidate, ROWS_AND_COLUMNS, fitted
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), base.flatten(), dim=0)
    return ComparedLayer(
        name,
        error,
        folded,
        float(cosine),
        spread,
        measure_bias(found, base),
        scales,
    )


def _block_of(name: str) -> str:
    """The name up to the number of its block."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def _relative_error(found: Tensor, weight: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(weight))
    difference = float(torch.linalg.vector_norm(found - weight))
    return difference / norm if norm else float(difference > 0)


def _fit_rows_and_columns(found: Tensor, weight: Tensor) -> tuple[Tensor, FittedScales]:
    """The base with each row and each column scaled as it comes nearest to `found`.

    Alternating least squares from scales of 1.
    """
    rows = torch.ones(len(weight), 1)
    for _ in range(_SWEEPS):
        scaled = weight * rows
        columns = _fit(found, scaled, 0)
        scaled = weight * columns
        rows = _fit(found, scaled, 1)
    return scaled * rows, FittedScales(rows.flatten(), columns.flatten())


def _fit(found: Tensor, weight: Tensor, dim: int) -> Tensor:
    """The factors that bring `weight` nearest to `found`; 1 where there is nothing to scale."""
    power = (weight * weight).sum(dim, keepdim=True)
    factor = (found * weight).sum(dim, keepdim=True) / power
    return torch.where(power > 0, factor, torch.ones_like(factor))
