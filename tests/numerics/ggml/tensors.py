"""Tensors on which encoders must choose the bytes of llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

MODEL = Path(__file__).parents[3] / "models" / "demo-llama" / "model.safetensors"


def normal(rows: int = 8, columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def integers(low: int, high: int, rows: int = 16, columns: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(low, high, (rows, columns), generator=generator).float()


def trained(name: str = "model.layers.0.mlp.down_proj.weight") -> Tensor:
    """A matrix of the bundled model: [256, 768] by default."""
    with safe_open(MODEL, "pt") as file:
        return file.get_tensor(name)[:64].float()


def zeros_of_both_signs() -> Tensor:
    return normal() * 0.0


def spikes() -> Tensor:
    weight = torch.zeros(4, 512)
    weight[:, 37::64] = 1.5
    weight[2:] *= -1
    return weight


def mixed_magnitudes() -> Tensor:
    weight = normal(seed=2)
    weight[:, ::3] *= 1e-8
    weight[:, 5::7] = 0.0
    weight[:, 6::11] = -0.0
    return weight


def plateaus() -> Tensor:
    """Extremes that occur several times and with both signs."""
    return normal(seed=3).clamp(-0.5, 0.5)


TENSORS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: normal(32, 1024) * 0.02,
    "normal in bfloat16": lambda: (normal(32, 1024, seed=4) * 0.02).bfloat16().float(),
    "heavy tails": lambda: normal(seed=5) ** 3,
    "trained": trained,
    "zeros": lambda: torch.zeros(2, 512),
    "negative zeros": lambda: -torch.zeros(2, 512),
    "zeros of both signs": zeros_of_both_signs,
    "constant": lambda: torch.full((2, 512), 0.3),
    "negative constant": lambda: torch.full((2, 512), -0.3),
    "spikes": spikes,
    "plateaus": plateaus,
    "signs": lambda: normal(seed=6).sign(),
    "positive": lambda: normal(seed=7).abs(),
    "negative": lambda: -normal(seed=8).abs(),
    "rectified": lambda: normal(seed=9).relu(),
    "mixed magnitudes": mixed_magnitudes,
    "all integers of a byte": lambda: integers(-127, 128),
    "small integers": lambda: integers(-3, 4),
    "halves": lambda: integers(-254, 255, rows=32) / 2,
    "scales that are denormal in float16": lambda: normal(seed=10) * 1e-6,
    "near the smallest searched": lambda: normal(seed=11) * 1e-15,
    "below the smallest searched": lambda: normal(seed=12) * 1e-20,
    "denormal": lambda: normal(seed=13) * 1e-39,
    "smallest denormal": lambda: normal(seed=14) * 1e-44,
    "large": lambda: normal(seed=15) * 1e4,
}
"""By what they are."""

IMPORTANCES: dict[str, Callable[[int], Tensor]] = {
    "uniform": lambda columns: normal(1, columns, seed=20)[0].abs(),
    "heavy tails": lambda columns: normal(1, columns, seed=21)[0].abs() ** 6,
    "zeros": torch.zeros,
    "partly zeros": lambda columns: (normal(1, columns, seed=22)[0] > 0).float(),
    "tiny": lambda columns: normal(1, columns, seed=23)[0].abs() * 1e-30,
}
"""By what they are; each makes one for a number of columns."""
