"""How fast this machine is: a second of measuring, by which the time of a job is foretold.

Each figure is the best of a few short runs, since other work on the machine only makes a run
slower. Arithmetic is measured on one thread, in the processor time of that thread, which other work
does not stretch, and on all threads by the clock, which lies between that and as many times as
much. The files of the checkpoint are read as they are: from memory where the system still holds
them, which is how the job would read them too.
"""

from __future__ import annotations

import hashlib
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from quantkit.records import AcceleratorProbe, MachineProbe

_SMALL, _LARGE = 256, 1024
"""Sizes of matmuls. The small one shows whether the large one is bearable: on CPUs without
instructions for bfloat16 it would take seconds."""
_BEARABLE_GFLOPS = 8.0
_FACTORED = 768
_MOVED_FLOATS = 1 << 23
_CALLS = 500
_PIECE = 1 << 22
_READ_BYTES = 1 << 26
_WRITTEN_BYTES = 1 << 24
_HASHED_BYTES = 1 << 23
_DEVICE_SIZE = 4096


def probe_machine(
    files: Sequence[Path], output: Path | None, device: torch.device, free_memory: int
) -> MachineProbe:
    """Measure this machine for about a second.

    Args:
        files: of the checkpoint's weights; up to 64 MiB of them are read.
        output: where the job will write; a file of 16 MiB is written beside it that has no name
            and is gone at once. None: in the folder for temporary files.
        device: of the job; on CUDA, the device is measured as well.
        free_memory: bytes that the system could still give; 0 where it does not say.
    """
    resident = find_resident_bytes()
    return MachineProbe(
        threads=torch.get_num_threads(),
        float32_gflops=_measure_matmul(torch.float32),
        bfloat16_gflops=_measure_matmul(torch.bfloat16),
        cholesky_gflops=_measure_cholesky(),
        moved_bytes_per_second=_measure_moving(),
        call_seconds=_measure_calls(),
        hash_bytes_per_second=_measure_hash(),
        read_bytes_per_second=_measure_reading(files),
        write_bytes_per_second=_measure_writing(output),
        resident_bytes=resident,
        free_memory_bytes=free_memory,
        accelerator=_probe_accelerator(device) if device.type == "cuda" else None,
    )


def find_resident_bytes() -> int:
    """Return what this process holds now; where the system does not say, the most it has held."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return pages * os.sysconf("SC_PAGE_SIZE")


def _best(
    run: Callable[[], object],
    clock: Callable[[], float] = time.perf_counter,
    times: int = 4,
) -> float:
    """Seconds of the quickest of a few runs."""
    seconds = float("inf")
    for _ in range(times):
        start = clock()
        run()
        # A coarse clock must not make a division by zero.
        seconds = min(seconds, max(clock() - start, 1e-9))
        if seconds > 0.1:
            break
    return seconds


def _best_on_all_threads(run: Callable[[], object]) -> float:
    """Seconds on all threads, as far as other work on the machine lets them be known."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = _best(run, time.thread_time)
    finally:
        torch.set_num_threads(threads)
    if threads == 1:
        return alone
    return min(alone, max(alone / threads, _best(run)))


def _measure_matmul(dtype: torch.dtype) -> float:
    """Return the GFLOP/s of a square matmul on this CPU."""

    def measure(edge: int) -> float:
        left = torch.ones(edge, edge, dtype=dtype)
        return 2 * edge**3 / _best_on_all_threads(lambda: left @ left) / 1e9

    found = measure(_SMALL)
    return measure(_LARGE) if found > _BEARABLE_GFLOPS else found


def _measure_cholesky() -> float:
    """Return the GFLOP/s of a factorization in float32, n^3 / 3 operations."""
    matrix = torch.full((_FACTORED, _FACTORED), 0.5)
    matrix.diagonal().add_(_FACTORED)
    seconds = _best_on_all_threads(lambda: torch.linalg.cholesky_ex(matrix))
    return _FACTORED**3 / 3 / seconds / 1e9


def _measure_moving() -> float:
    values = torch.ones(_MOVED_FLOATS)
    return 8 * _MOVED_FLOATS / _best_on_all_threads(lambda: values.mul_(1.0))


def _measure_calls() -> float:
    value = torch.ones(16)

    def run() -> None:
        for _ in range(_CALLS):
            value.mul_(1.0)

    return _best(run, time.thread_time) / _CALLS


def _measure_hash() -> float:
    data = bytes(_HASHED_BYTES)
    return _HASHED_BYTES / _best(lambda: hashlib.sha256(data).digest(), time.thread_time)


def _measure_reading(files: Sequence[Path]) -> float:
    """Read the largest file from its middle on, which its header has not brought into memory."""
    sizes = [(path.stat().st_size, path) for path in set(files) if path.is_file()]
    if not sizes:
        return 0.0
    size, path = max(sizes)
    buffer = memoryview(bytearray(_PIECE))
    read, start = 0, time.perf_counter()
    with path.open("rb", buffering=0) as handle:
        handle.seek(max(0, size // 2 - _READ_BYTES // 2))
        while read < _READ_BYTES and (count := handle.readinto(buffer)):
            read += count
            if time.perf_counter() - start > 0.3:
                break
    return read / max(time.perf_counter() - start, 1e-9)


def _measure_writing(output: Path | None) -> float:
    """Write a nameless file; 0 where that is refused, which the job itself will say better."""
    place = Path(tempfile.gettempdir()) if output is None else output.absolute()
    while not place.is_dir():
        place = place.parent
    data = os.urandom(_PIECE)
    try:
        with tempfile.TemporaryFile(dir=place) as handle:

            def write() -> None:
                handle.seek(0)
                for _ in range(_WRITTEN_BYTES // _PIECE):
                    handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())

            return _WRITTEN_BYTES / _best(write)
    except OSError:
        return 0.0


def _probe_accelerator(device: torch.device) -> AcceleratorProbe:
    free, total = torch.cuda.mem_get_info(device)
    host = torch.empty(_WRITTEN_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)

    def multiply(dtype: torch.dtype) -> float:
        left = torch.ones(_DEVICE_SIZE, _DEVICE_SIZE, dtype=dtype, device=device)

        def run() -> None:
            left @ left
            torch.cuda.synchronize(device)

        return 2 * _DEVICE_SIZE**3 / _best(run) / 1e9

    def copy() -> None:
        there.copy_(host)
        torch.cuda.synchronize(device)

    return AcceleratorProbe(
        name=torch.cuda.get_device_name(device),
        total_bytes=total,
        free_bytes=free,
        bfloat16_gflops=multiply(torch.bfloat16),
        float32_gflops=multiply(torch.float32),
        copy_bytes_per_second=_WRITTEN_BYTES / _best(copy),
    )
