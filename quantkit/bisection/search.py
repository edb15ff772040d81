"""What is guilty: restored alone, what brings the artifact nearer to its original."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quantkit.bisection.bench import Bench, Part, measure
from quantkit.bisection.records import AGAIN, ORIGINAL, Remedy, Suspect, Trial, Unit
from quantkit.bisection.remedies import count_bytes
from quantkit.bisection.scores import Scores, judge_scores
from quantkit.recipe import GateSpec
from quantkit.records import Judgement

_ENOUGH = 0.5
"""Of `max_kl`: blocks are guilty until what is left would be so little."""
MOST_OF_THE_LOSS = 0.9
"""The same without a limit on KL."""


@dataclass(frozen=True)
class Setting:
    """What a search works with. shapes: of each unit's weight, [O, I]; () for vectors."""

    bench: Bench
    quick: Part
    find_whole: Callable[[], Part]
    """Returns the windows of the gate's first look, prepared; asked for once."""
    looks: tuple[int, ...]
    """Numbers of windows at which the gate may decide."""
    spec: GateSpec
    written: str
    """Format."""
    scale_dtype: str
    fused: Sequence[tuple[str, ...]]
    """Layers that must share a scheme."""
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def units(self) -> Mapping[str, Unit]:
        """All that differs from the original."""
        return self.bench.units

    @property
    def everything(self) -> Trial:
        """The trial in which all is restored."""
        return dict.fromkeys(self.units, ORIGINAL)


@dataclass(frozen=True)
class Scan:
    """What restoring each block and each unit of the guiltiest alone does, from a start on."""

    start: Trial
    scores: Scores
    left: float
    """KL with all restored."""
    blocks: tuple[Suspect, ...]
    units: tuple[Suspect, ...]


def scan(setting: Setting, start: Trial, everywhere: bool = False) -> Scan:
    """Restore each block alone, then each unit of the guiltiest blocks and what is broken.

    Args:
        start: what is replaced already.
        everywhere: look into all blocks.
    """
    members: dict[str, list[str]] = {}
    for unit in setting.units.values():
        block = None if unit.block is None else setting.bench.pair.prefixes[unit.block]
        members.setdefault(block or unit.name, []).append(unit.name)
    trials = [start, {**start, **setting.everything}]
    trials += [{**start, **dict.fromkeys(names, ORIGINAL)} for names in members.values()]
    first, restored, *found = measure(setting.bench, setting.quick, trials, "blocks")
    ranked = _rank(setting, first, restored, members, found)
    guilty = _find_guilty(setting, ranked, first.mean_kl)
    if everywhere:
        guilty = list(members)
    names = [name for block in guilty for name in members[block]]
    names += [unit.name for unit in setting.units.values() if unit.flaw and unit.name not in names]
    alone: dict[str, list[str]] = {name: [name] for name in names}
    trials = [{**start, name: ORIGINAL} for name in names]
    scores = measure(setting.bench, setting.quick, trials, "layers")
    units = _rank(setting, first, restored, alone, scores)
    return Scan(start, first, restored.mean_kl, ranked, units)


def _rank(
    setting: Setting,
    first: Scores,
    restored: Scores,
    members: Mapping[str, Sequence[str]],
    scores: Sequence[Scores],
) -> tuple[Suspect, ...]:
    before, loss = first.mean_kl, first.mean_kl - restored.mean_kl
    suspects = []
    for (name, units), found in zip(members.items(), scores, strict=True):
        unit = setting.units.get(name)
        suspects.append(
            Suspect(
                name=name,
                kl=found.mean_kl,
                share=_share(before, found.mean_kl, loss),
                relative_error=None if unit is None else unit.relative_error,
                added_bytes=sum(count_added(setting, each, ORIGINAL) for each in units),
                flaw=None if unit is None else unit.flaw,
            )
        )
    return tuple(sorted(suspects, key=lambda each: -each.share))


def _share(before: float, after: float, loss: float) -> float:
    """The part of the loss that went; all of it where only now the numbers are finite."""
    if not math.isfinite(before):
        return float(math.isfinite(after))
    return (before - after) / loss if loss > 0 and math.isfinite(after) else 0.0


def _find_guilty(setting: Setting, ranked: Sequence[Suspect], kl: float) -> list[str]:
    """Return the blocks whose gains together would leave little; at least one."""
    limit = setting.spec.max_kl
    needed = MOST_OF_THE_LOSS if limit is None else 1 - _ENOUGH * limit / max(kl, limit)
    guilty: list[str] = []
    gained = 0.0
    for suspect in ranked:
        if guilty and (gained >= needed or suspect.share <= 0):
            break
        guilty.append(suspect.name)
        gained += suspect.share
    return guilty


def repair(setting: Setting) -> tuple[Trial, Scores] | None:
    """Put back what is broken, rounded plainly as it was where that can be; None: nothing is."""
    trial = {unit.name: _mend(unit) for unit in setting.units.values() if unit.flaw is not None}
    if not trial:
        return None
    (scores,) = measure(setting.bench, setting.quick, [trial], "repair")
    return trial, scores


def _mend(unit: Unit) -> Remedy:
    return AGAIN if unit.usual_error else ORIGINAL


def confirm(setting: Setting, trial: Trial) -> Judgement:
    """Judge a trial on all windows."""
    (scores,) = measure(setting.bench, setting.find_whole(), [trial], "confirm")
    return judge_scores(scores, setting.spec, setting.looks)


def count_added(setting: Setting, name: str, remedy: Remedy) -> int:
    """Bytes that a unit's weight takes more under a remedy."""
    unit, shape = setting.units[name], setting.shapes[name]
    if len(shape) != 2:
        return 0
    size = count_bytes(unit, remedy, (shape[0], shape[1]), setting.scale_dtype)
    return size - unit.form.size
