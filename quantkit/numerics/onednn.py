"""Float32 products by the quicker of torch's two libraries, where no digit is lost by it.

torch multiplies float32 matrices on a CPU by MKL, which leaves half of what an AMD processor can.
It gives them to oneDNN where it may round their factors to bfloat16. On processors with AMX they
are rounded then; others compute as exactly as ever. Which it is here, a product tells. How fast
either is is not measured: a choice by that would not always be the same, nor the bytes of an
artifact.

Workers of the judge run this file under other interpreters: it imports torch and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_SIZE = 256
_EXACT = 1e-6
"""Relative error of a product of `_SIZE`: 3e-7 of float32 sums, 2e-3 of factors in bfloat16."""

# A worker's torch may be older than the setting.
_MATMUL: Any = getattr(torch.backends.mkldnn, "matmul", None)
_ROUNDING, _USUAL = "bf16", "none"

_PROCESSOR = Path("/proc/cpuinfo")
_SLOW_IN_MKL = b"AuthenticAMD"


@contextmanager
def quick_float32() -> Iterator[None]:
    """Let float32 products on a CPU be as quick as they can, while this is open, with all digits.

    It also decorates functions. The setting is the whole process's: torch knows no other.
    """
    changed = set_quick_float32()
    try:
        yield
    finally:
        if changed:
            _MATMUL.fp32_precision = _USUAL


@contextmanager
def usual_float32() -> Iterator[None]:
    """Take torch's usual library while this is open."""
    before = _MATMUL.fp32_precision
    _MATMUL.fp32_precision = _USUAL
    try:
        yield
    finally:
        _MATMUL.fp32_precision = before


def set_quick_float32() -> bool:
    """Let float32 products be as quick as they can from now on.

    Returns:
        Whether anything was changed. A choice that somebody made before is left alone.
    """
    if getattr(_MATMUL, "fp32_precision", None) != _USUAL or not _is_slow_in_mkl():
        return False
    _MATMUL.fp32_precision = _ROUNDING
    if _is_exact():
        return True
    _MATMUL.fp32_precision = _USUAL
    return False


def _is_slow_in_mkl() -> bool:
    """Whether this is a processor for which MKL has not its best code."""
    try:
        with _PROCESSOR.open("rb") as lines:
            vendor = next((line for line in lines if line.startswith(b"vendor_id")), b"")
    except OSError:
        return False
    return _SLOW_IN_MKL in vendor


def _is_exact() -> bool:
    """Whether a product of matrices with all digits has them, too."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(_SIZE, _SIZE, generator=generator) for _ in range(2))
    expected = left.double() @ right.double()
    return float((left @ right - expected).norm() / expected.norm()) < _EXACT
