"""Time and memory of a job, foretold from its plan, its data and a probe of the machine."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace

from quantkit.errors import ResourceError
from quantkit.planning.costs import find_seconds, find_terms
from quantkit.planning.holding import find_device_peak, find_peak
from quantkit.planning.workload import Workload
from quantkit.records import MachineProbe, Plan, Prediction

_LOWER = "calibration.samples and calibration.sequence_length lower it"


def predict(
    plan: Plan, work: Workload, probe: MachineProbe, memory: int | None = None
) -> Prediction:
    """Return what a job is expected to take; arithmetic alone.

    Suspended forwards may hold half of what is free, as the walk has it, and are parked elsewhere
    where they need more: out of a GPU in RAM, out of RAM in a file.

    Args:
        plan: of the job.
        work: what it will do besides.
        probe: of the machine that it will run on.
        memory: bytes that the job's own process may hold: suspended forwards get what the rest of
            it leaves. None: as much as it takes.

    Raises:
        ResourceError: the rest alone takes more than `memory`.
    """
    needed = plan.activation_bytes if work.tokens else 0
    free = probe.free_memory_bytes
    most = None if memory is None else _find_most(plan, work, probe, needed, memory)
    device = probe.accelerator if work.on_device else None
    room = _find_room(needed, free if device is None else device.free_bytes)
    if device is None:
        room = in_ram = _least(room, most)
    limited = memory is not None and device is None
    # Under a limit they leave holes, also where all of them have room.
    work = replace(work, room_bytes=needed if limited and room is None else room)
    parked = 0 if room is None else needed - room
    beside = 0
    if device is not None:
        in_ram = _least(_find_room(parked, free), most)
        beside = parked if in_ram is None else min(parked, in_ram)
    peak = find_peak(plan, work, probe.resident_bytes) + beside
    on_device = find_device_peak(plan, work)
    return Prediction(
        seconds=find_seconds(find_terms(plan, work, probe)),
        peak_memory_bytes=peak,
        device_memory_bytes=on_device,
        disk_bytes=plan.disk_bytes + parked - beside,
        probe=probe,
        room_bytes=in_ram,
        notes=(
            *_note_parked(needed, room, device is not None),
            *_note_memory(peak, on_device, probe),
        ),
    )


def _find_room(needed: int, free: int) -> int | None:
    """Half of what is free where more is needed; None where it fits, or nobody knows."""
    return free // 2 if 0 < free // 2 < needed else None


def _find_most(
    plan: Plan, work: Workload, probe: MachineProbe, needed: int, memory: int
) -> int | None:
    """Return what suspended forwards may hold in RAM under a bound for the process; None: all.

    Raises:
        ResourceError: nothing is left for them, and more is needed than there is.
    """

    def peak(room: int) -> int:
        held = find_peak(plan, replace(work, room_bytes=room), probe.resident_bytes)
        return held + (room if work.on_device else 0)

    if peak(0) > memory:
        raise ResourceError(
            f"memory: {_gigabytes(memory)} are too little: with all activations in a file the job "
            f"is expected to take {_gigabytes(peak(0))}, so give at least {_rounded_up(peak(0))}"
        )
    return None if peak(needed) <= memory else bisect_right(range(needed), memory, key=peak) - 1


def _least(one: int | None, other: int | None) -> int | None:
    """The lesser of two bounds, of which None is none."""
    return min((each for each in (one, other) if each is not None), default=None)


def _note_parked(needed: int, room: int | None, on_device: bool) -> Iterator[str]:
    """Say that suspended forwards will not all stay where they are."""
    if room is None:
        return
    where = "RAM" if on_device else "a file at the output"
    yield (
        f"suspended forwards hold up to {_gigabytes(needed)} and have room for "
        f"{_gigabytes(room)}: the rest is parked in {where}, which is slower; {_LOWER}"
    )


def _note_memory(peak: int, on_device: int | None, probe: MachineProbe) -> Iterator[str]:
    """Say where the machine has less free than is needed."""
    needed = peak - probe.resident_bytes
    if 0 < probe.free_memory_bytes < needed:
        yield (
            f"the job is expected to take {_gigabytes(needed)} of memory, and "
            f"{_gigabytes(probe.free_memory_bytes)} are free: {_LOWER}"
        )
    device = probe.accelerator
    if on_device is not None and device is not None and device.free_bytes < on_device:
        yield (
            f"the job is expected to take {_gigabytes(on_device)} of the GPU's memory, and "
            f"{_gigabytes(device.free_bytes)} are free: {_LOWER}"
        )


def _rounded_up(count: int) -> str:
    """As it is given with a unit, to what is not less."""
    return f"{math.ceil(count / 1e7) / 100:.2f}GB"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
