"""Whether the kernels are used, and what is said where they are not; without triton."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantkit.numerics import kernels


def test_a_cpu_uses_torch_and_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not kernels.kernels_available(torch.device("cpu"))
    assert kernels.missing_kernels(torch.device("cpu")) == ()


def test_triton_runs_them_on_a_cpu_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.kernels_available(torch.device("cpu"))
    monkeypatch.setenv("QUANTKIT_KERNELS", "0")
    assert not kernels.kernels_available(torch.device("cpu"))


@pytest.mark.parametrize(
    ("device", "variable", "words"),
    [
        ("mps", None, "for NVIDIA GPUs, not for mps"),
        ("cuda", "QUANTKIT_KERNELS=0", "QUANTKIT_KERNELS is 0"),
        ("cuda", "TRITON_INTERPRET=1", "TRITON_INTERPRET is set"),
    ],
)
def test_a_gpu_without_kernels_says_why(
    device: str, variable: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if variable is not None:
        monkeypatch.setenv(*variable.split("="))
    (line,) = kernels.missing_kernels(torch.device(device))
    assert line.startswith("the Triton kernels are not used: ")
    assert words in line
    assert not kernels.kernels_available(torch.device(device))


def test_solvers_are_imported_without_triton() -> None:
    script = """
import sys
sys.modules["triton"] = None
import quantkit.solvers.gptq, quantkit.solvers.polish, quantkit.calibration.stats
import quantkit.numerics.packing, quantkit.numerics.ggml.codec
from quantkit.numerics import kernels
print(sorted(name for name in sys.modules if name.startswith("quantkit.numerics.kernels.")))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert done.stdout.strip() == "[]"


def test_a_triton_that_cannot_be_imported_is_one_line(tmp_path: Path) -> None:
    """Raised as by a library of another driver; that there is a GPU is made up."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(
        "raise OSError('libcuda.so.1: cannot open shared object file')\n"
    )
    script = """
import sys
import torch
from quantkit.errors import QuantkitError
from quantkit.numerics import kernels
kernels._why_not = lambda device: None
sys.path.insert(0, sys.argv[1])
try:
    kernels.missing_kernels(torch.device("cuda"))
except QuantkitError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert done.stdout == (
        "triton is installed and cannot be imported (OSError: libcuda.so.1: cannot open shared "
        "object file); install quantkit[gpu] again, or set QUANTKIT_KERNELS=0 to do without "
        "kernels\n"
    )
