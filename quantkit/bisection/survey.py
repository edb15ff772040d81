"""The units of a model, and what their weights alone tell: how far they are, and what is broken."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantkit.bisection.folds import apply_scales, find_scales, relative_error
from quantkit.bisection.reading import Weights
from quantkit.bisection.records import Form, Scales, Unit
from quantkit.bisection.remedies import can_round, round_as
from quantkit.checkpoint.skeleton import tied_names
from quantkit.checkpoint.structure import Structure
from quantkit.errors import ArtifactError
from quantkit.formats.comparison import ComparedLayer
from quantkit.formats.scale_checks import measure_bias, measure_spread
from quantkit.formats.table_rows import find_wrong_rows, measure_rows
from quantkit.records import Event, Progress

_PLAIN = Form("none", 16, None, 0)
_EQUAL = 1e-6
"""Relative error of a weight up to which it is the original's, but for float32's last digits."""
_LARGEST_PLAIN_ERROR = 0.03
"""Of a weight without codes: a fold is rounded to 16 bits, and an estimate of it is less exact."""
_TIMES_USUAL = 3.0
"""What rounding explains, from which on a layer may be broken ..."""
_TIMES_PEERS = 2.0
"""... if this is also so many times what layers of its kind have, relative to plain rounding."""
_TIMES_ALONE = 6.0
"""Without such layers to compare with."""
_SAMPLED_ROWS = 512
_NEARER = 0.5
"""Share of a layer's columns, those that are nearest to the original's, ..."""
_TIMES_NEARER = 2.0
"""... and plain rounding's error of such a share, from which on they too may be broken. Under a
second moment, columns that inputs hardly reach are anywhere, and may be many."""
_LIMITS = {8: 0.1}
_USUAL_LIMIT = 0.5
"""As in `formats/comparison.py`: relative error beyond which a layer may be no rounding at all."""


@dataclass(frozen=True)
class Pair:
    """Artifact and original, by the names of one model."""

    skeleton: nn.Module
    structure: Structure
    found: Weights
    base: Weights
    ties: Mapping[str, str]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Full names of the blocks."""
        return tuple(block.prefix for block in self.structure.blocks)

    @property
    def strangers(self) -> tuple[str, ...]:
        """Names of the artifact's tensors that the original's model has no place for."""
        known = {name for name, _ in self.skeleton.named_parameters(remove_duplicate=False)}
        known |= {name for name, _ in self.skeleton.named_buffers()}
        return tuple(sorted(self.found.names - known))

    def read(self, weights: Weights, name: str) -> Tensor:
        """Read a tensor, or the one that it is tied to.

        Raises:
            ArtifactError: the artifact has neither.
            CheckpointError: it is damaged.
        """
        source = name if name in weights.names else self.ties.get(name)
        if source is None or source not in weights.names:
            raise ArtifactError(
                f"the artifact has no tensor {name}: `quantkit verify` lists what is missing"
            )
        return weights.read(source)


def pair_up(skeleton: nn.Module, structure: Structure, found: Weights, base: Weights) -> Pair:
    """Bring an artifact and its original together."""
    return Pair(skeleton, structure, found, base, tied_names(skeleton))


def list_modules(pair: Pair) -> dict[int | None, dict[str, tuple[str, ...]]]:
    """Return block (None: outside) -> module -> full names of its tensors, in the model's order.

    What is tied and not stored for itself belongs to what it is tied to.
    """
    modules: dict[int | None, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, _ in pair.skeleton.named_parameters(remove_duplicate=False):
        if name in pair.ties and name not in pair.found.names:
            continue
        inside = (i for i, prefix in enumerate(pair.prefixes) if name.startswith(f"{prefix}."))
        modules[next(inside, None)][name.rpartition(".")[0]].append(name)
    return {
        block: {module: tuple(names) for module, names in found.items()}
        for block, found in modules.items()
    }


def survey(pair: Pair, tell: Progress) -> Iterator[Unit]:
    """Yield the units that differ from the original's, block by block, then those outside.

    Raises:
        ArtifactError: a tensor is missing, damaged or of another shape.
    """
    modules = list_modules(pair)
    for index, block in enumerate(pair.structure.blocks):
        inside = modules.get(index, {})
        found, base = ({}, {})
        for names in inside.values():
            for name in names:
                found[name], base[name] = _read_both(pair, name)
        weights = [
            {module: each[f"{module}.weight"] for module in inside if f"{module}.weight" in each}
            for each in (found, base)
        ]
        scales = find_scales(block.groups, *weights)
        for module, names in inside.items():
            tensors = {name: (found[name], base[name]) for name in names}
            yield from _measure(pair, module, index, tensors, scales.get(module, Scales()))
        tell(Event("weights", index + 1, len(pair.structure.blocks), block.prefix))
    for module, names in modules.get(None, {}).items():
        tensors = {name: _read_both(pair, name) for name in names}
        yield from _measure(pair, module, None, tensors, Scales())


def _read_both(pair: Pair, name: str) -> tuple[Tensor, Tensor]:
    found, base = pair.read(pair.found, name), pair.read(pair.base, name)
    if found.shape != base.shape:
        raise ArtifactError(
            f"tensor {name} has the shape {list(found.shape)}, the original's {list(base.shape)}"
        )
    return found, base


def _measure(
    pair: Pair,
    module: str,
    block: int | None,
    tensors: Mapping[str, tuple[Tensor, Tensor]],
    scales: Scales,
) -> Iterator[Unit]:
    """Yield the unit of a module; nothing where its tensors are the original's."""
    restored = {name: apply_scales(base, scales) for name, (_, base) in tensors.items()}
    errors = {name: relative_error(tensors[name][0], restored[name]) for name in tensors}
    if max(errors.values()) <= _EQUAL:
        return
    form = pair.found.forms.get(module, _PLAIN)
    main = f"{module}.weight" if f"{module}.weight" in tensors else next(iter(tensors))
    weight, found = restored[main], tensors[main][0]
    usual = 0.0
    if form.scheme != "none" and weight.dim() == 2 and can_round(form, weight.shape[1]):
        # A part of the rows tells it: the encoders of GGUF's types are slow.
        part = weight[:: max(1, len(weight) // _SAMPLED_ROWS)]
        rounded = round_as(part, form)
        usual = relative_error(rounded, part)
        if _measure_nearer(found, weight) <= _TIMES_NEARER * _measure_nearer(rounded, part):
            # Then a rounding explains all of it, however far the other half is.
            usual = max(usual, errors[main])
    plain_size = weight.numel() * 2
    if pair.base.checkpoint is not None and main in pair.base.checkpoint.tensors:
        plain_size = pair.base.checkpoint.tensors[main].size
    yield Unit(
        name=module,
        block=block,
        tensors=tuple(tensors),
        form=form if form.size else replace(form, size=plain_size),
        scales=scales,
        relative_error=errors[main],
        usual_error=usual,
        flaw=_find_flaw(module, block, form, found, weight, errors[main]),
        plain_size=plain_size,
    )


def _measure_nearer(found: Tensor, weight: Tensor) -> float:
    """Return the relative error of the columns of `weight` [O, I] that `found` is nearest to."""
    nearer = _find_nearer(found, weight)
    return relative_error(found[:, nearer], weight[:, nearer])


def _find_nearer(found: Tensor, weight: Tensor) -> Tensor:
    """Return the columns of `weight` [O, I] that `found` is nearest to, in their order."""
    errors = (found - weight).square().sum(0) / weight.square().sum(0).clamp(min=1e-30)
    # NaN, of a damaged weight, is far, and sorted last.
    return errors.argsort()[: math.ceil(_NEARER * len(errors))].sort().values


def _find_flaw(
    module: str, block: int | None, form: Form, found: Tensor, weight: Tensor, error: float
) -> str | None:
    """Say why a weight is no rounding of the original's, by itself."""
    if block is None and weight.dim() == 2:
        rows = find_wrong_rows(f"{module}.weight", measure_rows(found, weight))
        if rows is not None:
            return rows
    if form.scheme == "none":
        if error <= _LARGEST_PLAIN_ERROR:
            return None
        return (
            f"{module} is not quantized, and its weight differs from the original's by "
            f"{100 * error:.3g} % of its norm"
        )
    if weight.dim() != 2:
        return None
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), weight.flatten(), dim=0)
    spread = measure_spread(found, weight)
    if not spread.is_wrong:
        nearer = _find_nearer(found, weight)
        spread = measure_spread(found[:, nearer], weight[:, nearer])
    compared = ComparedLayer(
        module,
        error,
        cosine=float(cosine),
        spread=spread,
        bias=measure_bias(found, weight),
    )
    return compared.find_problem(form.bits, _LIMITS.get(form.bits, _USUAL_LIMIT))


def find_flaws(units: Sequence[Unit]) -> tuple[Unit, ...]:
    """Add the flaws that show beside other layers of the same kind."""
    peers: dict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        if unit.block is not None and unit.usual_error:
            peers[unit.kind].append(unit)
    return tuple(_compare(unit, peers[unit.kind]) for unit in units)


def _compare(unit: Unit, kind: Iterable[Unit]) -> Unit:
    """Say where an error is no rounding's: beside plain rounding, and beside the unit's peers."""
    if unit.flaw is not None or not unit.usual_error:
        return unit
    own = unit.relative_error / unit.usual_error
    others = [peer.relative_error / peer.usual_error for peer in kind if peer.name != unit.name]
    usual = statistics.median(others) if others else 0.0
    broken = own > max(_TIMES_USUAL, _TIMES_PEERS * usual) if others else own > _TIMES_ALONE
    if not broken:
        return unit
    beside = f", and {usual:.2g} times is usual for layers of its kind" if others else ""
    return replace(
        unit,
        flaw=(
            f"layer {unit.name} differs from the original's by {100 * unit.relative_error:.3g} % "
            f"of its norm: {own:.3g} times what plain rounding to {unit.form.scheme} makes{beside}"
        ),
    )
