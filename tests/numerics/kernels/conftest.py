"""Tests marked `kernels` run where Triton's interpreter is on, which `make kernels` sees to."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from quantkit.numerics.kernels import kernels_available


@pytest.fixture(autouse=True)
def interpreter(request: pytest.FixtureRequest) -> None:
    """Skip what needs the interpreter where it is off, and say how to turn it on."""
    if request.node.get_closest_marker("kernels") is None:
        return
    if find_spec("triton") is None:
        pytest.skip("NOT TESTED: triton is not installed; `make kernels` installs and runs it")
    if not kernels_available(torch.device("cpu")):
        pytest.skip("NOT TESTED: Triton's interpreter is off; `make kernels` turns it on")
