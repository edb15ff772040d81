"""On what a model is served: GPUs that are found or named, or this machine's processor."""

from __future__ import annotations

from quantkit.calibration.parking import free_ram
from quantkit.capacity import find_gpu, find_machine_gpus
from quantkit.errors import InputError
from quantkit.serving.records import Machine

AUTO, CPU = "auto", "cpu"
MOST_GPUS = 8
"""Of a machine that is named and not counted: as many as one server has room for."""


def choose_machine(gpu: str, gpus: int | None, memory: int | None) -> Machine:
    """Return what the user means.

    Args:
        gpu: `auto` for what this machine has, `cpu`, or a name of `quantkit.capacity.GPUS`.
        gpus: how many there are, at the most; None: all that are found, or up to 8 named ones.
        memory: bytes of each GPU, or of the processor's memory; None: what is known of them.

    Raises:
        InputError: the GPU is unknown, or a number makes no sense.
    """
    if gpus is not None and gpus < 1:
        raise InputError(f"--gpus {gpus}: name at least one, or leave it out")
    if memory is not None and memory < 1:
        raise InputError(f"--memory {memory}: it is a number of bytes")
    if gpu.casefold() not in (AUTO, CPU):
        named = find_gpu(gpu)
        return Machine(
            named.name,
            gpus or MOST_GPUS,
            memory or named.memory_bytes,
            named.compute_capability,
        )
    found = find_machine_gpus() if gpu.casefold() == AUTO else ()
    if not found:
        if gpus is not None:
            raise InputError(
                f"--gpus {gpus}: nvidia-smi lists no GPU of this machine; name one of another "
                f"machine with --gpu, for instance --gpu H100"
            )
        return Machine(CPU, 0, memory or _free_memory(), None)
    alike = [each for each in found if each.name == found[0].name]
    notes = []
    if len(alike) < len(found):
        notes.append(f"of the {len(found)} GPUs of this machine, the {found[0].name} alone count")
    if gpus is not None and gpus > len(alike):
        raise InputError(f"--gpus {gpus}: this machine has {len(alike)} x {found[0].name}")
    least = min(each.memory_bytes for each in alike)
    return Machine(
        found[0].name,
        gpus or len(alike),
        memory or least,
        found[0].compute_capability,
        tuple(notes),
    )


def _free_memory() -> int:
    """Bytes that are available on this machine.

    Raises:
        InputError: the system does not say.
    """
    free = free_ram()
    if free is None:
        raise InputError("this system does not say how much memory it has: name it with --memory")
    return free
