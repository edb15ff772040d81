"""Why each layer has its scheme or type: what `auto` measured and chose, rounded for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quantkit.ggml_types import GGML_TYPES
from quantkit.records import AllocatedUnit, Allocation, Report, UnitCost
from quantkit.report.layers import locate
from quantkit.report.rounding import ABSENT, format_bytes, format_significant
from quantkit.schemes import SCHEMES

_MEGABYTE = 1e6


@dataclass(frozen=True)
class AllocationRow:
    """One unit of layers. costs: divergence under each scheme of the table."""

    name: str
    chosen: str
    size: str
    costs: tuple[str, ...]
    why: str
    unit: AllocatedUnit


@dataclass(frozen=True)
class MapCell:
    """One unit on the map: its bits, how many other schemes are smaller, and a title."""

    bits: str
    tone: int
    title: str


@dataclass(frozen=True)
class AllocationTable:
    """The section of a report. noun: `scheme`, or `type` for those of a GGUF file. map_rows: for
    each kind of unit one cell a block, or None.
    """

    noun: str
    sentences: tuple[str, ...]
    schemes: tuple[str, ...]
    rows: tuple[AllocationRow, ...]
    blocks: tuple[int, ...]
    map_rows: tuple[tuple[str, tuple[MapCell | None, ...]], ...]


def allocation_table(report: Report) -> AllocationTable | None:
    """Return what a report says about the choice of schemes; None where none was made."""
    allocation = report.allocation
    if allocation is None or not allocation.units:
        return None
    schemes = tuple(
        sorted(
            {cost.scheme for unit in allocation.units for cost in unit.costs},
            key=lambda name: (_bits(name), name),
        )
    )
    blocks, map_rows = _draw_map(allocation, schemes)
    return AllocationTable(
        noun=name_choice(allocation),
        sentences=(
            _say_how(allocation),
            _say_what(allocation),
            *_say_price(allocation),
            _say_outcome(report, allocation),
        ),
        schemes=schemes,
        rows=tuple(_row(unit, schemes) for unit in allocation.units),
        blocks=blocks,
        map_rows=map_rows,
    )


def allocation_line(report: Report) -> str | None:
    """Say in one line what was chosen, for the command line; None where nothing was."""
    allocation = report.allocation
    if allocation is None:
        return None
    measured = _measured_kl(report)
    gate = "" if measured is None else f", measured {format_significant(measured)}"
    return (
        f"{_count_schemes(allocation)}; predicted KL {format_significant(allocation.predicted_kl)}"
        f"{gate}"
    )


def name_unit(unit: AllocatedUnit) -> str:
    """Return the full name of a layer, or `model.layers.0.mlp: gate_proj, up_proj`."""
    if len(unit.layers) == 1:
        return unit.layers[0]
    parents = {name.rpartition(".")[0] for name in unit.layers}
    if len(parents) > 1:
        return ", ".join(unit.layers)
    return f"{parents.pop()}: {', '.join(name.rpartition('.')[2] for name in unit.layers)}"


def name_choice(allocation: Allocation) -> str:
    """Return what was chosen: `scheme`, or `type` for those of a GGUF file."""
    return "type" if any(unit.chosen in GGML_TYPES for unit in allocation.units) else "scheme"


def _bits(name: str) -> float:
    """Bits per weight of a scheme's codes, or of a type with its scales."""
    if name in GGML_TYPES:
        return GGML_TYPES[name].bits_per_weight
    return SCHEMES[name].weight_bits


def _say_how(allocation: Allocation) -> str:
    units = "units of layers (layers that a server fuses are one)"
    if name_choice(allocation) == "type":
        units = "layers"
    return (
        f"Each of {len(allocation.units)} {units} was quantized alone, with each of its "
        f"candidates, and the KL divergence that this adds to the model's output was measured on "
        f"{allocation.tokens:,} calibration tokens."
    )


def _say_what(allocation: Allocation) -> str:
    if allocation.target_bits is not None:
        goal = (
            f"the least divergence within {allocation.target_bits:g} bits per weight of the whole "
            f"artifact"
        )
    else:
        goal = f"the fewest bytes with a predicted divergence of at most {allocation.max_kl:g}"
    return (
        f"Chosen was {goal}: {_count_schemes(allocation)}, {allocation.predicted_bits:.3f} bits "
        f"per weight."
    )


def _count_schemes(allocation: Allocation) -> str:
    counts = Counter(unit.chosen for unit in allocation.units)
    return ", ".join(f"{count} x {scheme}" for scheme, count in counts.most_common())


def _say_price(allocation: Allocation) -> Iterator[str]:
    taken = [step for unit in allocation.units for step in _steps(unit, down=True)]
    left = [step for unit in allocation.units for step in _steps(unit, down=False)]
    if taken and left:
        noun = name_choice(allocation)
        yield (
            f"Bytes went where they avoid the most: each step to a larger {noun} that was taken "
            f"avoids at least {_price(min(taken))} nats a MB, and the best one left out would "
            f"avoid {_price(max(left))}."
        )


def _say_outcome(report: Report, allocation: Allocation) -> str:
    predicted = (
        f"The divergences of the chosen {name_choice(allocation)}s add up to "
        f"{format_significant(allocation.predicted_kl)} nats per token"
    )
    measured = _measured_kl(report)
    if measured is None:
        return f"{predicted}; the artifact was not judged."
    return f"{predicted}; the gate measured {format_significant(measured)} on the artifact."


def _measured_kl(report: Report) -> float | None:
    for artifact in report.artifacts:
        if artifact.judgement.kl is not None:
            return artifact.judgement.kl.value
    return None


def _row(unit: AllocatedUnit, schemes: Sequence[str]) -> AllocationRow:
    costs = {cost.scheme: cost for cost in unit.costs}
    return AllocationRow(
        name=name_unit(unit),
        chosen=unit.chosen,
        size=format_bytes(costs[unit.chosen].size_bytes),
        costs=tuple(
            format_significant(costs[name].kl) if name in costs else ABSENT for name in schemes
        ),
        why=_explain(unit),
        unit=unit,
    )


def _explain(unit: AllocatedUnit) -> str:
    """Say what the chosen scheme avoids, and what the next larger one would."""
    if len(unit.costs) == 1:
        return "no other candidate fits"
    chosen, parts = _chosen(unit), []
    smaller, larger = _neighbour(unit, down=True), _neighbour(unit, down=False)
    if smaller is not None:
        step = _saving(smaller, chosen)
        parts.append(
            f"avoids {format_significant(smaller.kl - chosen.kl)} over {smaller.scheme}, "
            f"{_price(step)} a MB"
        )
    if larger is not None:
        step = _saving(chosen, larger)
        avoided = format_significant(chosen.kl - larger.kl)
        parts.append(f"{larger.scheme} would avoid {avoided}, {_price(step)} a MB")
    return "; ".join(parts)


def _chosen(unit: AllocatedUnit) -> UnitCost:
    return next(cost for cost in unit.costs if cost.scheme == unit.chosen)


def _neighbour(unit: AllocatedUnit, *, down: bool) -> UnitCost | None:
    """Return the next smaller or the next larger candidate."""
    size = _chosen(unit).size_bytes
    if down:
        smaller = [cost for cost in unit.costs if cost.size_bytes < size]
        return max(smaller, key=lambda cost: cost.size_bytes, default=None)
    larger = [cost for cost in unit.costs if cost.size_bytes > size]
    return min(larger, key=lambda cost: cost.size_bytes, default=None)


def _steps(unit: AllocatedUnit, *, down: bool) -> Iterator[float]:
    """Yield what the step to the chosen scheme avoids a MB, or the next one would."""
    chosen, other = _chosen(unit), _neighbour(unit, down=down)
    if other is not None:
        yield _saving(other, chosen) if down else _saving(chosen, other)


def _saving(small: UnitCost, large: UnitCost) -> float:
    return (small.kl - large.kl) / ((large.size_bytes - small.size_bytes) / _MEGABYTE)


def _price(saving: float) -> str:
    return format_significant(saving, 2)


def _draw_map(
    allocation: Allocation, schemes: Sequence[str]
) -> tuple[tuple[int, ...], tuple[tuple[str, tuple[MapCell | None, ...]], ...]]:
    """Return the blocks, and for each kind of unit the cells in their order."""
    cells: dict[str, dict[int, MapCell]] = {}
    for unit in allocation.units:
        places = [locate(name) for name in unit.layers]
        block = places[0][0]
        if block is None:
            continue
        kind = name_unit(AllocatedUnit(tuple(kind for _, kind in places), (), ""))
        bits = f"{_bits(unit.chosen):.2g}"
        title = f"{name_unit(unit)}: {unit.chosen}"
        tone = min(schemes.index(unit.chosen), 3)
        cells.setdefault(kind, {})[block] = MapCell(bits, tone, title)
    blocks = tuple(sorted({block for row in cells.values() for block in row}))
    return blocks, tuple(
        (kind, tuple(row.get(block) for block in blocks)) for kind, row in cells.items()
    )
