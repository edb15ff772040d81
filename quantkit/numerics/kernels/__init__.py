"""GPU kernels in Triton for the loops that torch needs thousands of launches for.

Each has the signature of the torch code that it stands in for, and equal results: integers to the
bit, but where its module says otherwise. The callers ask `kernels_available` and otherwise do as
torch does. Triton is imported with the first kernel, so a machine without a GPU needs none; CUDA
builds of torch bring it along.

With TRITON_INTERPRET=1 in the environment Triton runs the same kernels on a CPU, in Python and very
slowly: for tests. QUANTKIT_KERNELS=0 turns them off.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.numerics.affine import CodeSet
from quantkit.numerics.ggml.encode_k_search import AffineGrid

SQUARED = (torch.bfloat16, torch.float16)
"""The dtypes of rows that `add_square` takes."""

LEAST_CAPABILITY = (8, 0)
"""The compute capability from which on tensor cores multiply bfloat16."""

_COMPILERS = ("gcc", "clang", "cc")


def kernels_available(device: torch.device) -> bool:
    """Say whether tensors on a device are to be given to the kernels."""
    return _why_not(device) is None


def missing_kernels(device: torch.device) -> tuple[str, ...]:
    """Return lines that say why a GPU works without kernels; none for a CPU, which has no use.

    Where a GPU works with them, each is compiled and tried on a few numbers, which takes seconds
    the first time on a machine. So a job asks this once, before it does anything.

    Raises:
        QuantkitError: triton is installed and cannot be imported; or a kernel cannot be compiled
            here, or finds something else than torch.
    """
    if device.type == "cpu":
        return ()
    reason = _why_not(device)
    if reason is not None:
        return (f"the Triton kernels are not used: {reason}",)
    try:
        from quantkit.numerics.kernels.trial import try_kernels
    # What a build for another driver, Python or torch raises while it is imported.
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise QuantkitError(
            f"triton is installed and cannot be imported ({type(error).__name__}: {first_line}); "
            f"install quantkit[gpu] again, or set QUANTKIT_KERNELS=0 to do without kernels"
        ) from error
    try_kernels(device)
    return ()


def _why_not(device: torch.device) -> str | None:
    if os.environ.get("QUANTKIT_KERNELS") == "0":
        return "QUANTKIT_KERNELS is 0"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if device.type == "cpu":
        return None if interpreted else "they are for GPUs"
    if device.type != "cuda" or torch.version.hip is not None:
        kind = "ROCm" if device.type == "cuda" else device.type
        return f"they are written for NVIDIA GPUs, not for {kind}"
    if interpreted:
        return "TRITON_INTERPRET is set, and would run them on the CPU"
    if find_spec("triton") is None:
        return "no module named triton; install quantkit[gpu]"
    if not (os.environ.get("CC") or any(map(shutil.which, _COMPILERS))):
        return "there is no C compiler, by which Triton launches them; install gcc"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, and they need {LEAST_CAPABILITY[0]}.0"
        )
    return None


def round_columns(
    block: Tensor,
    target: Tensor,
    lower: Tensor,
    steps: Tensor,
    offsets: Tensor | None,
    scheme: CodeSet,
    errors: Tensor,
) -> None:
    """Round the columns of one block [B, O] from the last to the first, see `gptq_block`."""
    from quantkit.numerics.kernels import gptq_block

    gptq_block.round_columns(block, target, lower, steps, offsets, scheme, errors)


def descend_columns(
    values: Tensor,
    steps: Tensor,
    gain: Tensor,
    offset: Tensor | None,
    residual: Tensor,
    inner: Tensor,
    scheme: CodeSet,
) -> None:
    """Move each value of a block [B, O] to its best one, in place, see `descent`."""
    from quantkit.numerics.kernels import descent

    descent.descend_columns(values, steps, gain, offset, residual, inner, scheme)


def add_square(total: Tensor, rows: Tensor, panel: int) -> None:
    """Add rows^T rows of 16-bit rows [T, I] to the upper triangle of `total`, see `square`."""
    from quantkit.numerics.kernels import square

    square.add_square(total, rows, panel)


def cheapest_scales(
    grouped: Tensor,
    unit: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    importance: Tensor,
    scheme: CodeSet,
) -> Tensor:
    """Return which of scales [C, R, G] costs each group least, int64 [R, G], see `cheapest`."""
    from quantkit.numerics.kernels import cheapest

    return cheapest.cheapest_scales(grouped, unit, scales, zero_points, importance, scheme)


def search_affine(x: Tensor, weights: Tensor, grid: AffineGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Search scale and minimum of ggml's blocks [P, ...], see `ggml_search`."""
    from quantkit.numerics.kernels import ggml_search

    return ggml_search.search_affine(x, weights, grid)


def search_symmetric(x: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Search the scale of ggml's blocks [P, ...], see `ggml_search`."""
    from quantkit.numerics.kernels import ggml_search

    return ggml_search.search_symmetric(x, weights, top)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 codes [O, I] along I into int32 words, see `pack`."""
    from quantkit.numerics.kernels import pack

    return pack.pack_rows(codes, bits)
