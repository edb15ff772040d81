"""What `auto` has to choose from, as far as headers tell: units, candidates, reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import summarize_names
from quantkit.checkpoint.structure import Structure
from quantkit.ggml_types import GGUF
from quantkit.planning.assignment import Assignment, assign, open_layers
from quantkit.planning.checks import find_misfits, join_layers
from quantkit.planning.onnx import GRAPH_SCALE_BYTES, graph_layer_bytes, only_onnx
from quantkit.planning.sizes import choose_scale_dtype, layer_bytes
from quantkit.recipe import CalibrationSpec, Recipe
from quantkit.records import (
    Allocation,
    BlockPlan,
    Candidate,
    LinearPlan,
    OpenChoice,
    OpenUnit,
    Plan,
)
from quantkit.schemes import METHODS, ONNX, Method

_WINDOW_TOKENS = 512
_TOKENS = 4096
"""On other windows than its own, a choice made on 4096 tokens of the demo model was 1 to 2 % worse
than the best one for those windows; one made on 1024 tokens 2 to 3 %."""
_STREAM_BYTES = 4 << 30
"""What the hidden states that are measured in one pass may take."""
_FLOAT32 = 4


@dataclass(frozen=True)
class OpenAssignment:
    """The open layers of a recipe in units, and what a job with them could come to.

    assignments: in the first, every unit has its smallest candidate; then there is one for each
    candidate of the recipe, in which every unit has it that it fits. What is wrong with a
    candidate is wrong with one of these. problems and notes: what else is to be said.
    """

    units: tuple[OpenUnit, ...]
    assignments: tuple[Assignment, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def find_chosen(allocation: Allocation) -> dict[str, str]:
    """Return layer -> scheme, or type, of a choice that was made."""
    return {name: unit.chosen for unit in allocation.units for name in unit.layers}


def find_open_units(
    recipe: Recipe,
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    structure: Structure,
    methods: Mapping[str, Method] = METHODS,
) -> OpenAssignment:
    """Find the layers that must share a scheme, and the candidates that fit each of them."""
    spec = recipe.quantize
    names = open_layers(spec, structure)

    def all_with(scheme: str) -> Assignment:
        return assign(spec, skeleton, structure, dict.fromkeys(names, scheme), methods)

    trials = {scheme: all_with(scheme) for scheme in dict.fromkeys(spec.candidates)}
    # What no candidate fits stays as it is while all other problems are looked for.
    rest = all_with("none")
    stored_in = choose_scale_dtype(checkpoint, rest.linears.values())
    if only_onnx(recipe) and all(export.format in {GGUF, ONNX} for export in recipe.export):
        stored_in = next(each.activations for each in recipe.export if each.format == ONNX)
    units: list[OpenUnit] = []
    misfits: list[tuple[str, str]] = []
    problems: list[tuple[str, str]] = []
    for block, members, fused in _split_into_units(names, structure):
        fitting = []
        for scheme, trial in trials.items():
            linears = tuple(trial.linears[name] for name in members)
            reason = _why_not(linears, [trial.linears[name] for name in fused])
            if reason is None:
                size = sum(_weight_bytes(linear, checkpoint, stored_in) for linear in linears)
                fitting.append(Candidate(linears, size))
            else:
                misfits += [(name, f"not {scheme}: {reason}") for name in members]
        if fitting:
            units.append(OpenUnit(block, tuple(fitting)))
        else:
            problems += [(name, "none of quantize.candidates fits") for name in members]
    return OpenAssignment(
        units=tuple(units),
        assignments=tuple(_join_trials(units, trials, rest)),
        problems=(*join_layers(problems), *_find_unusable(recipe, names, units)),
        notes=tuple(join_layers(misfits)),
    )


def _split_into_units(
    names: Sequence[str], structure: Structure
) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield block, open layers, and layers of a given scheme that a server fuses with them."""
    left = set(names)
    for index, block in enumerate(structure.blocks):
        partners = {name: fused for fused in block.fused for name in fused}
        for name in (name for group in block.groups for name in group.linears):
            if name in left:
                fused = partners.get(name, (name,))
                members = [other for other in fused if other in left]
                left -= set(members)
                yield index, members, [other for other in fused if other not in members]


def _why_not(linears: Sequence[LinearPlan], fused: Sequence[LinearPlan]) -> str | None:
    """Say what keeps a unit from having a scheme; None where nothing does."""
    for _, text in find_misfits(linear for linear in linears if linear.quantized):
        return text.partition(";")[0]
    ways = {(linear.scheme.name, linear.group_size) for linear in (*linears, *fused)}
    if len(ways) > 1:
        others = ", ".join(summarize_names(other.name for other in fused)) or "each other"
        return f"vLLM makes one layer of these and {others}, which would be stored differently"
    return None


def _weight_bytes(linear: LinearPlan, checkpoint: Checkpoint, stored_in: str) -> int:
    """stored_in: the dtype of scales in compressed-tensors, or what a graph computes in."""
    if linear.quantized and stored_in in GRAPH_SCALE_BYTES:
        return graph_layer_bytes(linear, stored_in)
    if linear.quantized:
        return layer_bytes(linear, stored_in)
    return checkpoint.tensors[f"{linear.name}.weight"].size


def _join_trials(
    units: Sequence[OpenUnit], trials: Mapping[str, Assignment], rest: Assignment
) -> Iterator[Assignment]:
    """Yield the assignments of `OpenAssignment`."""
    smallest = {
        linear.name: linear
        for unit in units
        for linear in min(unit.candidates, key=_size_of).linears
    }
    yield replace(rest, linears=MappingProxyType({**rest.linears, **smallest}))
    for scheme in trials:
        fitting = {
            linear.name: linear
            for unit in units
            for candidate in unit.candidates
            if candidate.scheme == scheme
            for linear in candidate.linears
        }
        yield replace(rest, linears=MappingProxyType({**rest.linears, **smallest, **fitting}))


def _size_of(candidate: Candidate) -> int:
    return candidate.size_bytes


def _find_unusable(
    recipe: Recipe, names: Sequence[str], units: Sequence[OpenUnit]
) -> Iterator[str]:
    """Yield what leaves nothing to choose or nothing to measure on."""
    if not names:
        yield (
            "scheme auto has nothing to choose: every layer is ignored or has a scheme of its own "
            "by an override"
        )
    fitting = {candidate.scheme for unit in units for candidate in unit.candidates}
    unused = [name for name in dict.fromkeys(recipe.quantize.candidates) if name not in fitting]
    if units and unused:
        yield f"quantize.candidates: {', '.join(unused)} fits none of the open layers"
    if recipe.calibration is None:
        yield (
            "scheme auto measures how sensitive layers are on calibration data: add a "
            "`calibration:` section with `data:`"
        )


def plan_choice(
    recipe: Recipe, skeleton: nn.Module, units: tuple[OpenUnit, ...], plans: Sequence[Plan]
) -> OpenChoice:
    """Say what can be reached, and what measuring takes.

    Args:
        recipe: with calibration data.
        plans: of the assignments of `OpenAssignment`, the smallest first.
    """
    smallest = plans[0]
    fixed = smallest.artifact_bytes - _sum_sizes(units, min)
    largest = fixed + _sum_sizes(units, max)
    windows, length = _count_windows(recipe.calibration)
    embedding = skeleton.get_input_embeddings().weight  # type: ignore[operator]
    vocabulary, hidden = embedding.shape
    stream = windows * length * hidden * _FLOAT32
    targets = (recipe.quantize.target_bits, *(export.target_bits for export in recipe.export))
    passes = tuple(_split_into_passes(units, max(1, _STREAM_BYTES // max(1, stream))))
    most = max((_count_streams(units, *span) for span in passes), default=0)
    memory = (
        # Those of the candidates; the original's before, in and behind a block.
        (most + 3) * stream
        + _observed_tokens(recipe.calibration, windows) * hidden * _FLOAT32
        + _moment_bytes(units, smallest.blocks)
        + max(plan.statistics_bytes for plan in plans)
        # The head.
        + vocabulary * hidden * _FLOAT32
    )
    return OpenChoice(
        units=units,
        target_bits=next((target for target in targets if target is not None), None),
        max_kl=recipe.quantize.max_kl,
        fixed_bytes=fixed,
        lowest_bits=8 * smallest.artifact_bytes / smallest.parameters,
        highest_bits=8 * largest / smallest.parameters,
        windows=windows,
        window_tokens=length,
        passes=passes,
        memory_bytes=memory,
    )


def _count_windows(calibration: CalibrationSpec | None) -> tuple[int, int]:
    """Return how many windows are measured, and their tokens; half are left for statistics."""
    if calibration is None:
        return 0, 0
    length = min(calibration.sequence_length, _WINDOW_TOKENS)
    return max(1, min(math.ceil(_TOKENS / length), calibration.samples // 2)), length


def _observed_tokens(calibration: CalibrationSpec | None, windows: int) -> int:
    if calibration is None:
        return 0
    return max(1, calibration.samples - windows) * calibration.sequence_length


def _moment_bytes(units: Sequence[OpenUnit], blocks: Sequence[BlockPlan]) -> int:
    """Return the bytes of a block's second moments, which are summed up all at once."""
    linears = (linear for unit in units for each in unit.candidates for linear in each.linears)
    observed = {linear.name for linear in linears if linear.needs_statistics}
    widths = (
        [
            group.linears[0].in_features
            for group in block.groups
            if any(linear.name in observed for linear in group.linears)
        ]
        for block in blocks
    )
    return max((sum(width**2 * _FLOAT32 for width in row) for row in widths), default=0)


def _sum_sizes(units: Sequence[OpenUnit], extreme: Callable[..., Candidate]) -> int:
    return sum(extreme(unit.candidates, key=_size_of).size_bytes for unit in units)


def _split_into_passes(units: Sequence[OpenUnit], most: int) -> Iterator[tuple[int, int]]:
    """Yield the first block and the one behind the last of runs with at most `most` streams."""
    blocks = sorted({unit.block for unit in units})
    start, held = 0, 0
    for block in blocks:
        count = _count_streams(units, block, block + 1)
        if held and held + count > most:
            yield start, block
            start, held = block, 0
        held += count
    if blocks:
        yield start, blocks[-1] + 1


def _count_streams(units: Sequence[OpenUnit], start: int, stop: int) -> int:
    """Count the candidates that have to be measured; what is left in 16 bits costs nothing."""
    return sum(
        candidate.solved
        for unit in units
        if start <= unit.block < stop
        for candidate in unit.candidates
    )


def find_unreachable(choice: OpenChoice) -> Iterator[str]:
    """Yield the problem of a target that no choice meets."""
    target = choice.target_bits
    if target is not None and target < choice.lowest_bits:
        fixed = (
            choice.lowest_bits
            * choice.fixed_bytes
            / (choice.fixed_bytes + _sum_sizes(choice.units, min))
        )
        yield (
            f"target_bits {target:g} cannot be reached: with these candidates the artifact has "
            f"{_up(choice.lowest_bits)} to {choice.highest_bits:.2f} bits per weight, "
            f"{fixed:.2f} of them in what is not open (embedding, norms, layers that are ignored "
            f"or overridden); raise target_bits, add a smaller candidate or leave more open"
        )


def _up(bits: float) -> str:
    """Two decimals, rounded up: a target that can be copied."""
    return f"{math.ceil(bits * 100 - 1e-9) / 100:.2f}"


def find_slack(choice: OpenChoice) -> Iterator[str]:
    """Yield a note where the target leaves nothing to choose."""
    target = choice.target_bits
    if target is not None and target >= choice.highest_bits:
        yield (
            f"target_bits {target:g} is no limit: with the largest candidates everywhere the "
            f"artifact has {choice.highest_bits:.2f} bits per weight"
        )


def bound_plan(choice: OpenChoice, plans: Sequence[Plan], notes: Iterable[str]) -> Plan:
    """Return the plan of a choice that is to come: its sizes are the most that it can come to.

    Args:
        plans: of the assignments of `OpenAssignment`, the smallest first.
        notes: its notes.
    """
    smallest = plans[0]
    bits = choice.highest_bits
    if choice.target_bits is not None:
        bits = min(bits, choice.target_bits)
    artifact = math.floor(bits * smallest.parameters / 8)
    return replace(
        smallest,
        notes=tuple(dict.fromkeys(notes)),
        artifact_bytes=artifact,
        bits_per_weight=bits,
        activation_bytes=max(plan.activation_bytes for plan in plans),
        statistics_bytes=max(plan.statistics_bytes for plan in plans),
        disk_bytes=smallest.disk_bytes + 2 * (artifact - smallest.artifact_bytes),
        choice=choice,
        gguf=tuple(
            replace(file, tensor_bytes=artifact) if file.candidates else file
            for file in smallest.gguf
        ),
        onnx=tuple(
            max((plan.onnx[number] for plan in plans), key=lambda graph: graph.tensor_bytes)
            for number in range(len(smallest.onnx))
        ),
    )
