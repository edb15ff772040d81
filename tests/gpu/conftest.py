"""What needs a CUDA device: `python -m pytest -m gpu tests/gpu` runs all of it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def cuda() -> torch.device:
    """The device; without one the test is skipped."""
    if not torch.cuda.is_available():
        pytest.skip("NOT TESTED: this machine has no CUDA device")
    return torch.device("cuda")
