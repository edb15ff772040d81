"""What would pass: the fewest layers with more bits that hold every limit, as measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from quantkit.bisection.bench import measure
from quantkit.bisection.records import ORIGINAL, Remedy, Trial
from quantkit.bisection.remedies import eight_bits, improves
from quantkit.bisection.scores import is_within
from quantkit.bisection.search import MOST_OF_THE_LOSS, Scan, Setting, confirm, count_added
from quantkit.records import Judgement

_ROUNDS = 3
"""So often a number of options is looked for, ..."""
_BETWEEN = 4
"""... each time with so many trials between the last ones."""
_CONFIRMATIONS = 4
"""So often a choice that holds on the first windows is tried, enlarged, on all of them."""
_TOGETHER = 0.3
"""Of a block's gain: where its units alone explain less, they are one option together."""


@dataclass(frozen=True)
class Choice:
    """Replaced units that hold every limit on all windows."""

    trial: Trial
    layers: tuple[str, ...]
    """Those that were chosen, without what was replaced before."""
    remedy: Remedy
    judgement: Judgement
    added_bytes: int


@dataclass(frozen=True)
class _Option:
    """Layers that are chosen together."""

    names: tuple[str, ...]
    gain: float


def choose(setting: Setting, found: Scan) -> Choice | None:
    """Find the fewest layers, by what each gains a byte, that hold the limits with more bits.

    First with eight bits, then with the original's weights. None where not even all that were
    looked at would do.
    """
    for remedy in (eight_bits(setting.written), ORIGINAL):
        options = list(_list_options(setting, found, remedy))
        if not options:
            continue
        count = _find_count(setting, found, options, remedy)
        tries = 0
        while count is not None and count <= len(options) and tries < _CONFIRMATIONS:
            trial = _replace_first(found.start, options, count, remedy)
            judgement = confirm(setting, trial)
            if judgement.verdict == "PASS":
                layers = tuple(name for option in options[:count] for name in option.names)
                added = sum(count_added(setting, name, remedy) for name in layers)
                return Choice(trial, layers, remedy, judgement, added)
            tried, tries = count, tries + 1
            count = _enlarge(options, tried, judgement)
            if tried < len(options) and (count > len(options) or tries == _CONFIRMATIONS - 1):
                # Whether all of them would do is the last thing that is asked.
                count = len(options)
    return None


def _enlarge(options: Sequence[_Option], count: int, judgement: Judgement) -> int:
    """Return how many options to try next: by how much the bound of KL has to come down.

    By a quarter more where another limit does not hold. Beyond all options: there are no more.
    """
    most = len(options)
    excess = [check.high / check.limit for check in judgement.checks if check.name == "max_kl"]
    if count == most:
        return most + 1
    if not excess or excess[0] <= 1:
        return min(most, count + max(1, count // 4))
    left = 1 - sum(option.gain for option in options[:count])
    wanted = left / excess[0]
    for number in range(count + 1, most):
        left -= options[number - 1].gain
        if left <= wanted:
            return number
    return most


def _find_count(
    setting: Setting, found: Scan, options: Sequence[_Option], remedy: Remedy
) -> int | None:
    """Return how many of the first options hold the limits on the first windows.

    Around what the gains, added up, predict; then between the last that do not and the first that
    do.
    """
    low, high, sizes = 0, len(options) + 1, _predict(setting, found, options)
    for _ in range(_ROUNDS):
        number = _first_within(setting, found.start, options, remedy, sizes)
        if number is None and high > len(options):
            return None
        high = high if number is None else number
        low = max([low, *(size for size in sizes if size < high)])
        step = -(-(high - low) // (_BETWEEN + 1))
        sizes = list(range(low + step, high, step))
        if not sizes:
            break
    return high


def _predict(setting: Setting, found: Scan, options: Sequence[_Option]) -> list[int]:
    """Return numbers of options to try, rising: some around the predicted one, and all."""
    limit, share, count = setting.spec.max_kl, 0.0, 0
    needed = MOST_OF_THE_LOSS if limit is None else 1 - limit / max(found.scores.mean_kl, limit)
    for option in options:
        if share >= needed:
            break
        share, count = share + option.gain, count + 1
    around = {count // 2, 3 * count // 4, count, 3 * count // 2, len(options)}
    return sorted(size for size in around if 0 < size <= len(options))


def _first_within(
    setting: Setting,
    start: Trial,
    options: Sequence[_Option],
    remedy: Remedy,
    sizes: Sequence[int],
) -> int | None:
    if not sizes:
        return None
    trials = [_replace_first(start, options, size, remedy) for size in sizes]
    scores = measure(setting.bench, setting.quick, trials, "choose")
    within = (n for n, each in zip(sizes, scores, strict=True) if is_within(each, setting.spec))
    return next(within, None)


def _replace_first(
    start: Trial, options: Sequence[_Option], count: int, remedy: Remedy
) -> dict[str, Remedy]:
    names = [name for option in options[:count] for name in option.names]
    return {**start, **dict.fromkeys(names, remedy)}


def _list_options(setting: Setting, found: Scan, remedy: Remedy) -> Iterator[_Option]:
    """Yield the layers to choose from, the best first: those that must share a scheme together."""
    gains = {unit.name: unit.share for unit in found.units}
    options = []
    for names in _group(setting, gains):
        gain = sum(gains.get(name, 0.0) for name in names)
        if all(_can_have(setting, name, remedy) for name in names):
            options.append(_Option(names, gain))
    merged = _merge_blocks(setting, found, options)
    costs = {
        option: max(1, sum(count_added(setting, name, remedy) for name in option.names))
        for option in merged
    }
    yield from sorted(merged, key=lambda option: -option.gain / costs[option])


def _group(setting: Setting, gains: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Bring quantized layers together that a server makes one of."""
    groups: dict[tuple[str, ...], None] = {}
    for name in gains:
        together = next((names for names in setting.fused if name in names), (name,))
        quantized = tuple(
            each for each in together if each in setting.units and setting.units[each].quantized
        )
        if quantized:
            groups[quantized] = None
    return list(groups)


def _can_have(setting: Setting, name: str, remedy: Remedy) -> bool:
    unit, shape = setting.units[name], setting.shapes[name]
    if len(shape) != 2:
        return False
    return remedy == ORIGINAL or improves(unit, remedy, (shape[0], shape[1]))


def _merge_blocks(setting: Setting, found: Scan, options: Sequence[_Option]) -> list[_Option]:
    """Make one option of each block whose layers alone do not explain what the block gains."""
    shares = {block.name: block.share for block in found.blocks}
    by_block: dict[int | None, list[_Option]] = {}
    for option in options:
        by_block.setdefault(setting.units[option.names[0]].block, []).append(option)
    merged = []
    for block, inside in by_block.items():
        gain = 0.0 if block is None else shares.get(setting.bench.pair.prefixes[block], 0.0)
        if block is None or sum(option.gain for option in inside) >= _TOGETHER * gain:
            merged += inside
        else:
            merged.append(_Option(tuple(name for each in inside for name in each.names), gain))
    return [replace(option, gain=max(option.gain, 0.0)) for option in merged]
