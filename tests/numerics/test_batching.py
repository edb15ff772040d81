"""The size of a micro-batch."""

from __future__ import annotations

import pytest

from quantkit.numerics.batching import tokens_at_once, windows_at_once


@pytest.mark.parametrize(("hidden", "tokens"), [(64, 4096), (256, 2048), (512, 1024), (4096, 1024)])
def test_narrow_models_take_more_tokens_at_a_time(hidden: int, tokens: int) -> None:
    """Within bounds on both sides; a GPU is filled whatever the width is."""
    assert tokens_at_once(hidden, on_device=False) == tokens
    assert tokens_at_once(hidden, on_device=True) == 8192


def test_a_long_window_is_a_micro_batch_of_its_own() -> None:
    """None is cut."""
    assert windows_at_once(4096, 512, on_device=False) == 2
    assert windows_at_once(4096, 100_000, on_device=False) == 1
