"""Sizes of memory as people write them."""

from __future__ import annotations

import pytest

from quantkit.capacity import read_memory
from quantkit.errors import InputError


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (None, None),
        (1500, 1500),
        ("1500", 1500),
        ("1.5GB", 1_500_000_000),
        ("800 MB", 800_000_000),
        ("2GiB", 2 << 30),
        ("2gb", 2_000_000_000),
    ],
)
def test_bytes_and_units(written: int | str | None, size: int | None) -> None:
    """Decimal and binary ones."""
    assert read_memory(written) == size


@pytest.mark.parametrize(
    "written", ["", "much", "-2GB", "2XB", 0, -1, "0GB", True, "nan", "1e999GB"]
)
def test_what_is_no_size_is_refused(written: int | str) -> None:
    """And what one looks like is said."""
    with pytest.raises(InputError, match=r"is no size: write bytes, 1500MB, 2GB or 2GiB"):
        read_memory(written)
