"""Which dtype the forward passes run in: measured, not guessed.

A bf16 matmul is several times as fast as float32 on CPUs with AVX512-BF16 or AMX and a hundred
times slower on CPUs without; nothing but a measurement tells the two apart reliably. It is taken
in one thread's own CPU time, which other work on the machine does not stretch: the same machine
gives the same choice, and so the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from quantkit.errors import InputError
from quantkit.numerics.onednn import usual_float32

_SIZE = 256
_REPEATS = 7
_CLEARLY_FASTER = 1.5
"""Both outcomes are far from this bound on known CPUs, so noise does not flip the choice."""


@dataclass(frozen=True)
class ComputeProbe:
    """Speed of a square matmul on one thread, in GFLOP/s; zeros where nothing was measured."""

    device: str
    float32_gflops: float
    bfloat16_gflops: float


def choose_device(wanted: str) -> torch.device:
    """Return the device of `auto`, `cpu` or `cuda`.

    Raises:
        InputError: `cuda` is asked for and torch sees none.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if wanted in ("auto", "cuda"):
        if not torch.cuda.is_available():
            raise InputError("--device cuda: this torch sees no CUDA device; use --device cpu")
        return torch.device("cuda")
    raise InputError(f"device {wanted!r} is unknown (known: auto, cpu, cuda)")


def choose_compute_dtype(
    device: torch.device, checkpoint_dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.dtype, ComputeProbe]:
    """Return the dtype for the forward passes and what was measured.

    On CUDA that is the checkpoint's own 16-bit dtype. On a CPU it is bfloat16 for a bfloat16
    checkpoint where that is clearly faster, else float32.
    """
    if device.type == "cuda":
        half = checkpoint_dtype in (torch.bfloat16, torch.float16)
        return (checkpoint_dtype if half else torch.float32), ComputeProbe("cuda", 0.0, 0.0)
    # How fast another library multiplies float32 is left out: it is not so far from bfloat16 that
    # noise could not flip the choice.
    with _one_thread(), usual_float32():
        float32 = _measure_gflops(torch.float32)
        bfloat16 = _measure_gflops(torch.bfloat16)
    probe = ComputeProbe("cpu", float32, bfloat16)
    fast = checkpoint_dtype == torch.bfloat16 and bfloat16 > _CLEARLY_FASTER * float32
    return (torch.bfloat16 if fast else torch.float32), probe


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _measure_gflops(dtype: torch.dtype) -> float:
    """Best of a few runs, stopped early where one run alone takes long."""
    left = torch.ones(_SIZE, _SIZE, dtype=dtype)
    seconds = float("inf")
    for _ in range(_REPEATS):
        start = time.thread_time()
        left @ left
        # A coarse clock must not make a division by zero.
        seconds = min(seconds, max(time.thread_time() - start, 1e-6))
        if seconds > 0.2:
            break
    return 2 * _SIZE**3 / seconds / 1e9
