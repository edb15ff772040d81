"""Time and memory of a job, foretold from its plan, its data and a probe of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from quantkit.planning.costs import find_seconds, find_terms
from quantkit.planning.holding import find_device_peak, find_peak
from quantkit.planning.workload import Workload
from quantkit.records import MachineProbe, Plan, Prediction

_LOWER = "calibration.samples and calibration.sequence_length lower it"


def predict(plan: Plan, work: Workload, probe: MachineProbe) -> Prediction:
    """Return what a job is expected to take; arithmetic alone.

    Suspended forwards may hold half of what is free, as the walk has it, and are parked elsewhere
    where they need more: out of a GPU in RAM, out of RAM in a file.

    Args:
        plan: of the job.
        work: what it will do besides.
        probe: of the machine that it will run on.
    """
    needed = plan.activation_bytes if work.tokens else 0
    free = probe.free_memory_bytes
    device = probe.accelerator if work.on_device else None
    room = _find_room(needed, free if device is None else device.free_bytes)
    work = replace(work, room_bytes=room)
    parked = 0 if room is None else needed - room
    in_ram = 0
    if device is not None:
        beside = _find_room(parked, free)
        in_ram = parked if beside is None else beside
    peak = find_peak(plan, work, probe.resident_bytes) + in_ram
    on_device = find_device_peak(plan, work)
    return Prediction(
        seconds=find_seconds(find_terms(plan, work, probe)),
        peak_memory_bytes=peak,
        device_memory_bytes=on_device,
        disk_bytes=plan.disk_bytes + parked - in_ram,
        probe=probe,
        notes=(
            *_note_parked(needed, room, device is not None),
            *_note_memory(peak, on_device, probe),
        ),
    )


def _find_room(needed: int, free: int) -> int | None:
    """Half of what is free where more is needed; None where it fits, or nobody knows."""
    return free // 2 if 0 < free // 2 < needed else None


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


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
