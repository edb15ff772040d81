"""Forwards of a model that stop at its blocks and groups, one for each micro-batch.

Each runs transformers' own forward in a greenlet. Hooks in front of the blocks and groups of a
plan switch back to whoever let the forward run; it goes on from there when it is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from quantkit.calibration.kv import OBSERVER, Observer
from quantkit.calibration.parking import Parking
from quantkit.errors import CheckpointError, ResourceError, is_out_of_memory
from quantkit.records import BlockPlan, TokenWindows


@dataclass(frozen=True)
class Arrival:
    """What a suspended forward says: where it waits and, at a group, the group's input."""

    place: str
    inputs: Tensor | None


@dataclass(frozen=True)
class Forward:
    """The forward of a micro-batch, known to the parking by its number.

    weights: float32 [windows, T], of its tokens; None where every token counts once.
    """

    number: int
    run: greenlet
    weights: Tensor | None


def start(
    model: nn.Module,
    windows: TokenWindows,
    windows_at_once: int,
    device: torch.device,
    observer: Observer | None,
    first_number: int = 0,
) -> list[Forward]:
    """Make one forward for each micro-batch; none has begun to run."""
    decoder = getattr(model, cast(Any, model).base_model_prefix, model)
    options = {} if observer is None else {OBSERVER: observer}
    all_count = bool((windows.weights == 1).all())
    forwards: list[Forward] = []
    for begin in range(0, len(windows.ids), windows_at_once):
        batch = slice(begin, begin + windows_at_once)
        ids = torch.from_numpy(windows.ids[batch]).to(device)
        weights = None if all_count else torch.from_numpy(windows.weights[batch]).to(device)
        number = first_number + len(forwards)
        forwards.append(Forward(number, greenlet(_runner(decoder, ids, options)), weights))
    return forwards


def _runner(decoder: nn.Module, ids: Tensor, options: Mapping[str, Any]) -> Callable[[], None]:
    def run() -> None:
        decoder(input_ids=ids, use_cache=False, **options)

    return run


def end(forwards: Sequence[Forward]) -> None:
    """End the forwards where they stand: nothing behind the last stop is needed."""
    for forward in forwards:
        forward.run.throw(GreenletExit)


def finish_forwards(forwards: Sequence[Forward], parking: Parking) -> None:
    """Let every forward run to its end.

    Raises:
        CheckpointError: one of them stops once more.
    """
    for forward in forwards:
        parking.bring(forward.number)
        arrival = forward.run.switch()
        if isinstance(arrival, Arrival):
            raise CheckpointError(
                f"the model's forward came to {arrival.place} where the plan expected its end: "
                f"its family data does not describe it"
            )


def arrivals(
    forwards: Sequence[Forward], place: str, parking: Parking
) -> Iterator[tuple[Forward, Tensor | None]]:
    """Let one forward after the other run on to `place` and yield what each brings there.

    What it brings may be read until the next one is asked for; then it may be parked.

    Raises:
        CheckpointError: a forward comes elsewhere.
    """
    parking.begin_place()
    waiting: list[Forward] = []
    for position, forward in enumerate(forwards):
        parking.bring(forward.number)
        if position + 1 < len(forwards):
            parking.fetch_early(forwards[position + 1].number)
        yield forward, _resume(forward, place).inputs
        waiting.append(forward)
        # The first two wait for each other: what both of them hold must stay.
        if position:
            _leave(waiting, parking)
    _leave(waiting, parking)


def _leave(waiting: list[Forward], parking: Parking) -> None:
    if parking.bounded:
        parking.fix_shared([forward.run for forward in waiting])
        for forward in waiting:
            parking.leave(forward.number, forward.run)
    waiting.clear()


def advance(
    forwards: Sequence[Forward], place: str, parking: Parking
) -> list[tuple[Forward, Tensor | None]]:
    """Let every forward run on to `place` and return what each brings there, maybe parked."""
    return list(arrivals(forwards, place, parking))


def _resume(forward: Forward, place: str) -> Arrival:
    arrival = forward.run.switch()
    if not isinstance(arrival, Arrival) or arrival.place != place:
        found = arrival.place if isinstance(arrival, Arrival) else "its end"
        raise CheckpointError(
            f"the model's forward came to {found} where the plan expected {place}: "
            f"its family data does not describe it"
        )
    return arrival


def fit_windows_at_once(
    run: Callable[[int], None], windows_at_once: int, windows: TokenWindows
) -> int:
    """Halve the windows of a micro-batch until `run` does with them without running out of memory.

    Args:
        run: computes as much with the first windows, as many as it is told, as ever is computed
            with a micro-batch at a time.

    Raises:
        ResourceError: one window is too much.
    """
    while not _fits(run, windows_at_once):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if windows_at_once == 1:
            raise ResourceError(
                f"not enough memory for one block and the forward of one window of "
                f"{windows.ids.shape[1]} tokens: lower calibration.sequence_length"
            )
        windows_at_once //= 2
    return windows_at_once


def _fits(run: Callable[[int], None], windows_at_once: int) -> bool:
    try:
        run(windows_at_once)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def run_through(forward: Forward, block: BlockPlan, look: Callable[[str, Tensor], None]) -> None:
    """Let a new forward run until it has left its first block, and end it there.

    Args:
        look: is given the place and the input of every group on the way.
    """
    try:
        while isinstance(arrival := forward.run.switch(), Arrival):
            if arrival.inputs is not None:
                look(arrival.place, arrival.inputs)
            elif arrival.place != block.prefix:
                break
    finally:
        end([forward])


@contextmanager
def hooked(model: nn.Module, blocks: Sequence[BlockPlan], dtype: torch.dtype) -> Iterator[None]:
    """Suspend forwards at the blocks and groups; remove all hooks afterwards."""
    walker = getcurrent()
    handles = []

    def at_block(place: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            walker.switch(Arrival(place, None))
            return tuple(_cast(arg, dtype) for arg in args), {
                name: _cast(value, dtype) for name, value in kwargs.items()
            }

        return hook

    def at_group(place: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            walker.switch(Arrival(place, args[0]))

        return hook

    def at_embedding(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return _cast(output, dtype)

    try:
        embedding = cast(Any, model).get_input_embeddings()
        handles.append(embedding.register_forward_hook(at_embedding))
        for block in blocks:
            module = model.get_submodule(block.prefix)
            handles.append(
                module.register_forward_pre_hook(at_block(block.prefix), with_kwargs=True)
            )
            for group in block.groups:
                if group.solved:
                    first = group.linears[0].name
                    linear = model.get_submodule(first)
                    handles.append(linear.register_forward_pre_hook(at_group(first)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Bring hidden states (and rotary tables) to the compute dtype; leave all else alone."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value
