"""What a job is expected to take on this machine, and what that was measured by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WITHIN = frozenset({"calibrate", "solve"})
"""Stages that are parts of another one, `quantize`."""


@dataclass(frozen=True)
class AcceleratorProbe:
    """What a CUDA device has and does."""

    name: str
    total_bytes: int
    free_bytes: int
    bfloat16_gflops: float
    float32_gflops: float
    copy_bytes_per_second: float
    """From the host's memory to the device's."""


@dataclass(frozen=True)
class MachineProbe:
    """How fast this machine was for a moment, with all threads that torch uses.

    `gflops` are 1e9 operations a second, a multiplication and an addition counted as two.
    """

    threads: int
    float32_gflops: float
    """Of a square matmul, as is the next."""
    bfloat16_gflops: float
    cholesky_gflops: float
    """Of a factorization in float32."""
    moved_bytes_per_second: float
    """Read and written by an elementwise operation on a tensor larger than a core's cache."""
    call_seconds: float
    """Of an operation on a tensor so small that the call is all of it."""
    hash_bytes_per_second: float
    """Of sha256, on one thread."""
    read_bytes_per_second: float
    """Of the checkpoint's files as they are: from memory where the system holds them there."""
    write_bytes_per_second: float
    """At the output, until the bytes are on the disk; 0 where nothing could be written."""
    resident_bytes: int
    """What this process held."""
    free_memory_bytes: int
    """What the system could still give; 0 where it does not say."""
    accelerator: AcceleratorProbe | None = None
    """None where the job does not run on CUDA."""


@dataclass(frozen=True)
class Prediction:
    """What a job is expected to take."""

    seconds: Mapping[str, float]
    """Stage -> seconds, in the order of the stages, with the names of the report's timings.
    `calibrate` and `solve` are part of `quantize`."""
    peak_memory_bytes: int
    """The most that the job's own process will hold."""
    device_memory_bytes: int | None
    """The most that it will hold of the accelerator's; None where it uses none."""
    disk_bytes: int
    """As the plan's, and what is parked in a file where memory is short."""
    probe: MachineProbe
    room_bytes: int | None = None
    """What suspended forwards may hold in RAM, and the rest is in a file; None: all they need."""
    notes: tuple[str, ...] = ()
    """Where the machine has less free than is needed, and what to do about it."""

    @property
    def total_seconds(self) -> float:
        """Of all stages."""
        return sum(value for stage, value in self.seconds.items() if stage not in WITHIN)
