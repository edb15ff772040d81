"""What a measurement works with: the model, the measured windows and the observed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantkit.allocation.streams import Recording, place_outside, record, run_block
from quantkit.calibration.placing import empty
from quantkit.calibration.stats import Moment, accumulate, empty_moment, finish
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.records import LayerStats, LinearPlan, OpenChoice, OpenUnit, Plan, TokenWindows


@dataclass(frozen=True)
class Part:
    """Some of the calibration windows. hidden: float32 [N, T, H], where the original stands.

    weights: float32 [N, T], of the tokens.
    """

    recording: Recording
    hidden: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Bench:
    """What every step needs: the model, with all in its place that is outside of the blocks.

    measured: the windows on which divergences are taken. observed: those of the statistics, or
    None where no candidate needs any.
    """

    model: nn.Module
    plan: Plan
    prefixes: tuple[str, ...]
    measured: Part
    observed: Part | None
    device: torch.device

    def run(self, index: int, part: Part, hidden: Tensor, *, in_place: bool = False) -> Tensor:
        """Return the output of a block that is in its place."""
        return run_block(
            self.model,
            self.prefixes,
            index,
            part.recording,
            hidden,
            self.device,
            in_place=in_place,
        )


def set_up(
    checkpoint: Checkpoint,
    plan: Plan,
    choice: OpenChoice,
    windows: TokenWindows,
    device: torch.device,
) -> Bench:
    """Build the model, read what stands outside of its blocks, and embed the windows.

    Raises:
        CheckpointError: the model cannot be measured.
    """
    model = build_skeleton(checkpoint)
    prefixes = tuple(block.prefix for block in plan.blocks)
    place_outside(model, checkpoint, prefixes, device)
    ids, weights = torch.from_numpy(windows.ids), torch.from_numpy(windows.weights)

    def record_part(rows: slice, tokens: int | None) -> Part:
        recording = record(model, prefixes, ids[rows, :tokens], device)
        return Part(recording, recording.hidden, weights[rows, :tokens])

    measured = record_part(slice(choice.windows), choice.window_tokens)
    observed = None
    if any(linear.needs_statistics for linear in _linears(choice)):
        # Where there is a single window, it is both measured and observed.
        first = choice.windows if choice.windows < len(ids) else 0
        observed = record_part(slice(first, None), None)
    # A head that is tied to the embedding has weights of its own by now.
    empty(cast(Any, model).get_input_embeddings())
    return Bench(model, plan, prefixes, measured, observed, device)


def _linears(choice: OpenChoice) -> Iterator[LinearPlan]:
    for unit in choice.units:
        for candidate in unit.candidates:
            yield from candidate.linears


def observe(bench: Bench, index: int, units: Iterable[OpenUnit]) -> dict[str, LayerStats]:
    """Move the observed windows through a block; return the statistics of units' inputs.

    They are those of the units that need some, by the name of a unit's first layer; units that
    share an input share them.
    """
    part, moments, handles = bench.observed, dict[str, Moment](), []
    if part is None:
        return {}
    groups = bench.plan.blocks[index].groups
    inputs = {linear.name: group.linears[0].name for group in groups for linear in group.linears}
    readers: dict[str, str] = {}

    def note(moment: Moment) -> Callable[..., None]:
        batches = iter(part.weights.to(bench.device).split(part.recording.windows_at_once))

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            weights = next(batches)
            accumulate(moment, args[0], None if bool((weights == 1).all()) else weights)

        return hook

    try:
        for unit in units:
            linears = [linear for each in unit.candidates for linear in each.linears]
            if any(linear.needs_statistics for linear in linears):
                first = linears[0]
                readers[first.name] = inputs[first.name]
                if inputs[first.name] in moments:
                    continue
                moment = empty_moment(first.in_features, bench.device)
                moments[inputs[first.name]] = moment
                module = bench.model.get_submodule(first.name)
                handles.append(module.register_forward_pre_hook(note(moment)))
        bench.run(index, part, part.hidden, in_place=True)
    finally:
        for handle in handles:
            handle.remove()
    found = {name: finish(moment) for name, moment in moments.items()}
    return {name: found[source] for name, source in readers.items()}
