"""The choice against all combinations, and coarse counting against fine."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from quantkit.allocation.choose import Option, choose


def draw_units(seed: int, count: int, most: int) -> list[list[Option]]:
    """Units whose heavier options cost less, most of the time, by orders of magnitude."""
    draw = random.Random(seed)
    units = []
    for _ in range(count):
        size = draw.randint(1, 20)
        units.append(
            [
                Option(10 ** draw.uniform(-4, -1) / 8**rank, size * (rank + 1) + draw.randint(0, 2))
                for rank in range(draw.randint(1, most))
            ]
        )
    return units


def cost_of(units: list[list[Option]], chosen: tuple[int, ...]) -> float:
    return math.fsum(options[index].cost for options, index in zip(units, chosen, strict=True))


def weight_of(units: list[list[Option]], chosen: tuple[int, ...]) -> int:
    return sum(options[index].weight for options, index in zip(units, chosen, strict=True))


def bounds(units: list[list[Option]]) -> tuple[int, int]:
    """The lightest and the heaviest that a choice can be."""
    weights = [[option.weight for option in options] for options in units]
    return sum(map(min, weights)), sum(map(max, weights))


@pytest.mark.parametrize("seed", range(60))
def test_few_units_get_the_best_of_all_combinations(seed: int) -> None:
    """Within the limit, and as good as any other."""
    units = draw_units(seed, count=random.Random(seed).randint(1, 5), most=4)
    lightest, heaviest = bounds(units)
    limit = random.Random(seed).randint(lightest, heaviest)

    chosen = choose(units, limit)

    every = itertools.product(*(range(len(options)) for options in units))
    best = min(cost_of(units, each) for each in every if weight_of(units, each) <= limit)
    assert weight_of(units, chosen) <= limit
    assert cost_of(units, chosen) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.8, 1.0])
def test_coarse_bins_cost_next_to_nothing(share: float) -> None:
    """With weights of bytes the table cannot count each; with weights of megabytes it can."""
    units = draw_units(seed=7, count=60, most=3)
    draw = random.Random(1)
    bytes_of = [
        [Option(each.cost, 1_000_000 * each.weight - draw.randint(0, 9)) for each in options]
        for options in units
    ]
    lightest, heaviest = bounds(units)
    limit = round(lightest + share * (heaviest - lightest))

    exact = choose(units, limit)
    chosen = choose(bytes_of, 1_000_000 * limit)

    assert weight_of(bytes_of, chosen) <= 1_000_000 * limit
    assert cost_of(units, chosen) <= cost_of(units, exact) * 1.001


def test_three_units_are_weighed_against_each_other() -> None:
    """The first unit saves the most for its weight, and leaves no room for the two others."""
    units = [
        [Option(10.0, 0), Option(0.0, 6)],
        [Option(8.0, 0), Option(0.0, 5)],
        [Option(8.0, 0), Option(0.0, 5)],
    ]

    assert choose(units, 10) == (0, 1, 1)


def test_of_equal_choices_the_first_is_taken() -> None:
    """The same every time: nothing is drawn."""
    units = [[Option(1.0, 0), Option(0.5, 1), Option(0.5, 1)] for _ in range(4)]

    assert choose(units, 2) == (1, 1, 0, 0)


def test_options_that_are_heavier_and_worse_are_never_taken() -> None:
    """However much room there is."""
    units = [[Option(1.0, 4), Option(0.5, 2), Option(0.7, 9)]]

    assert choose(units, 100) == (1,)


def test_a_limit_below_the_lightest_options_is_refused() -> None:
    """The caller says it in its own words."""
    with pytest.raises(ValueError, match="weigh 5, more than 4"):
        choose([[Option(0.0, 2)], [Option(0.0, 3), Option(0.0, 4)]], 4)
