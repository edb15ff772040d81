"""The arithmetic that a calibrated job cannot do without, and how fast this machine multiplies.

The bound of a job is its floating-point operations, counted here, divided by the speed of a large
matrix product on the same machine. A multiplication and an addition count as two operations.

- The forward: each linear layer takes 2 operations a weight and token (Kaplan et al. 2020, arXiv
  2001.08361, section 2.1). Attention adds the products of queries with keys and of probabilities
  with values, of which the causal half is counted (Dao 2023, arXiv 2307.08691, section 4.1): token
  t reads t keys, so a window of T tokens takes 2 * heads * head_dim * T * (T + 1). The head of the
  model and the last layer of the last block are left out: no statistics depend on their outputs.
- The second moments: X^T X for each distinct input, which GPTQ needs (Frantar et al. 2022, arXiv
  2210.17323, equation 2). It is symmetric, so one half is counted: with n columns and N tokens
  N * n * (n + 1), as LAPACK counts xSYRK (LAPACK working note 41, appendix C). q, k and v share an
  input, and so do gate and up: four inputs a block.

Norms, activations, softmax, factorizations and the rounding itself are not counted, nor is reading
or writing: a job is slower than its bound by whatever those take.

As a script, `python bound.py DEVICE SECONDS` prints as JSON how many operations a second large
matrix products reach that are repeated for so long.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shapes import Shape

if TYPE_CHECKING:
    import torch

SIZES = {"cpu": 2048, "cuda": 8192}
"""Device -> rows and columns of the square matrices of the probe."""
PROBE_SECONDS = 2.0
SLOW_SECONDS = 0.2
BOUND_DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
"""Device -> the precision by whose speed a job is judged."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a calibrated job."""

    forward: int
    second_moments: int

    @property
    def operations(self) -> int:
        """All of them."""
        return self.forward + self.second_moments


def count_work(shape: Shape, windows: int, length: int) -> Work:
    """Count what a calibrated job on a model must do at least.

    Args:
        shape: the model's dimensions.
        windows: calibration windows.
        length: tokens of each.
    """
    tokens = windows * length
    last = shape.hidden * shape.intermediate
    linear = 2 * tokens * (shape.layers * shape.block_weights - last)
    attention = 2 * shape.hidden * windows * length * (length + 1) * shape.layers
    inputs = (shape.hidden, shape.hidden, shape.hidden, shape.intermediate)
    moments = shape.layers * tokens * sum(width * (width + 1) for width in inputs)
    return Work(linear + attention, moments)


def probe_speed(device: str, seconds: float = PROBE_SECONDS) -> dict[str, Any]:
    """Measure matrix products in a process of its own, in each precision for so many seconds.

    Returns:
        `float32` and `bfloat16`: operations per second of the fastest product; `threads`;
        `device`: the name of the GPU, or an empty string.
    """
    words = [sys.executable, __file__, device, str(seconds)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _probe(device: str, seconds: float) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else ""
    speeds = {
        str(dtype).removeprefix("torch."): _fastest(torch, device, dtype, seconds)
        for dtype in (torch.float32, torch.bfloat16)
    }
    return {**speeds, "threads": torch.get_num_threads(), "device": name}


def _fastest(torch: Any, device: str, dtype: torch.dtype, seconds: float) -> float:
    """Return the operations per second of the fastest of several products of random matrices."""
    small = _time_product(torch, device, dtype, SIZES[device] // 4, 0.0)
    # Where a processor only emulates a precision, a large product would take minutes.
    if small.seconds > SLOW_SECONDS:
        return small.speed
    return max(small.speed, _time_product(torch, device, dtype, SIZES[device], seconds).speed)


@dataclass(frozen=True)
class _Product:
    size: int
    seconds: float

    @property
    def speed(self) -> float:
        return 2 * self.size**3 / self.seconds


def _time_product(
    torch: Any, device: str, dtype: torch.dtype, size: int, at_least: float
) -> _Product:
    """Multiply for so many seconds, and three times at least: the first products warm up."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    fastest, started, runs = float("inf"), time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - started < at_least:
        begun = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - begun)
        runs += 1
    return _Product(size, fastest)


if __name__ == "__main__":
    print(json.dumps(_probe(sys.argv[1], float(sys.argv[2]))))
