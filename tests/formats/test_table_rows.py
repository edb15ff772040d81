"""Single rows of a table that are another token's, or nobody's."""

from __future__ import annotations

import pytest
import torch

from quantkit.formats.table_rows import find_wrong_rows, measure_rows


def find(found: torch.Tensor, weight: torch.Tensor) -> str | None:
    return find_wrong_rows("table", measure_rows(found, weight))


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(50, 32, generator=torch.Generator().manual_seed(0))


def round_rows(table: torch.Tensor, largest: int) -> torch.Tensor:
    scale = table.abs().amax(1, keepdim=True) / largest
    return (table / scale).round() * scale


@pytest.mark.parametrize("largest", [2, 7, 127])
def test_a_rounding_is_no_other_table(table: torch.Tensor, largest: int) -> None:
    """Codes of 2 to 8 bits; a common factor, and one a column, may have been folded elsewhere."""
    columns = 1 + 0.3 * torch.rand(32, generator=torch.Generator().manual_seed(1))

    assert find(round_rows(table, largest), table) is None
    assert find(round_rows(3 * table * columns, largest), table) is None


def test_a_row_of_zeros_or_of_another_length_or_token_is_told(table: torch.Tensor) -> None:
    for row in (torch.zeros(32), 4 * table[7], table[7] / 4, table[8]):
        found = round_rows(table, 7)
        found[7] = row
        problem = find(found, table)
        assert problem is not None
        assert problem.startswith("1 of the 50 rows of table are not the base's")
        assert "row 7" in problem


def test_what_was_never_trained_and_what_is_another_table_is_left_to_others(
    table: torch.Tensor,
) -> None:
    """Rounding may lose a tiny row; of a turned table no row is like the base's."""
    table[3] = 1e-9
    lost = table.clone()
    lost[3] = 0
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(2)))[0]

    assert find(lost, table) is None
    assert find(table @ turn, table) is None
    assert find(torch.zeros(4, 32), torch.ones(4, 32)) is None
