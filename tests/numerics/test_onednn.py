"""The quicker library for float32 products: as exact, and only while it is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantkit.numerics import onednn
from quantkit.numerics.onednn import quick_float32, set_quick_float32, usual_float32
from quantkit.numerics.precision import quick_products


def setting() -> str:
    """What torch may do to the factors of a float32 product."""
    return str(torch.backends.mkldnn.matmul.fp32_precision)


@pytest.mark.parametrize("size", [64, 300, 1100])
def test_products_keep_all_digits(size: int) -> None:
    """Whatever this processor does when it may round."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator) for _ in range(2))

    with quick_float32():
        found = left @ right

    exact = left.double() @ right.double()
    assert (found - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("better", [True, False])
def test_the_setting_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch, better: bool) -> None:
    """Also after an error, and with products in it that may round."""
    monkeypatch.setattr(onednn, "_is_slow_in_mkl", lambda: True)
    monkeypatch.setattr(onednn, "_is_exact", lambda: better)
    before = setting()

    with quick_float32():
        assert setting() == ("bf16" if better else before)
        with quick_products(True), quick_float32():
            assert setting() == "bf16"
        assert setting() == ("bf16" if better else before)
    assert setting() == before
    with pytest.raises(ValueError), quick_float32():
        raise ValueError
    assert setting() == before


def test_a_choice_that_was_made_before_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever calls quantkit from a process of theirs."""
    monkeypatch.setattr(onednn, "_is_slow_in_mkl", lambda: True)
    monkeypatch.setattr(onednn, "_is_exact", lambda: True)
    matmul = torch.backends.mkldnn.matmul
    try:
        matmul.fp32_precision = "ieee"
        assert not set_quick_float32()
        assert setting() == "ieee"
    finally:
        matmul.fp32_precision = "none"


def test_a_library_that_rounds_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does on a processor with AMX: the error of a product tells."""
    monkeypatch.setattr(onednn, "_is_slow_in_mkl", lambda: True)
    monkeypatch.setattr(onednn, "_EXACT", 0.0)

    assert not set_quick_float32()
    assert setting() == "none"


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (b"processor\t: 0\nvendor_id\t: AuthenticAMD\n", True),
        (b"processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: no AuthenticAMD\n", False),
        (None, False),
    ],
    ids=["AMD", "Intel", "unknown"],
)
def test_the_usual_library_stays_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: bytes | None, changes: bool
) -> None:
    """That is, on processors of its maker, and where the system does not say whose they are."""
    file = tmp_path / "cpuinfo"
    if words is not None:
        file.write_bytes(words)
    monkeypatch.setattr(onednn, "_PROCESSOR", file)
    monkeypatch.setattr(onednn, "_is_exact", lambda: True)

    with quick_float32():
        assert setting() == ("bf16" if changes else "none")
        with usual_float32():
            assert setting() == "none"
        assert setting() == ("bf16" if changes else "none")


def test_a_torch_without_the_setting_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an interpreter of a worker may have one."""
    monkeypatch.setattr(onednn, "_MATMUL", None)
    assert not set_quick_float32()


def test_it_runs_where_there_is_no_quantkit(tmp_path: Path) -> None:
    """As the workers of the judge run it, and leaves as many threads as there were."""
    script = (
        "import runpy, torch\n"
        "threads = torch.get_num_threads()\n"
        f"changed = runpy.run_path({str(Path(onednn.__file__))!r})['set_quick_float32']()\n"
        "precision = torch.backends.mkldnn.matmul.fp32_precision\n"
        "assert precision == ('bf16' if changed else 'none'), precision\n"
        "assert torch.get_num_threads() == threads\n"
        "import sys; assert 'quantkit' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-P", "-c", script], cwd=tmp_path, check=True)
