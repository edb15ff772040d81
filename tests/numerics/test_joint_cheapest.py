"""The cheapest scale of a group under e H e^T + 2 e l against a loop in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.numerics import joint_cheapest
from quantkit.numerics.affine import code_range
from quantkit.numerics.joint_cheapest import cheapest_jointly, chooses_jointly
from quantkit.numerics.scale_candidates import Candidates, Choice, Part
from quantkit.schemes import SCHEMES, Scheme

W4, W8, ASYMMETRIC = SCHEMES["w4a16"], SCHEMES["w8a16"], SCHEMES["w4a16_asym"]
GROUPS, GROUP = 3, 1


class Case:
    """A group of rows whose costs are exact, some of them equal.

    All are small multiples of powers of two, so that no order of summation rounds.
    """

    def __init__(self, rows: int, size: int, scheme: Scheme, channels: bool = False) -> None:
        generator = torch.Generator().manual_seed(rows + size)

        def draw(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator).float()

        shape = (rows, GROUPS, size)
        channel = 2.0 ** draw(-1, 2, *shape) if channels else None
        unit = 2.0 ** draw(-2, 3, rows, 1)
        self.part = Part(draw(-16, 17, *shape) / 8, unit, channel, torch.ones(rows, GROUPS), scheme)
        steps = draw(1, 9, 5, rows, 1) / 8
        # Each comes twice.
        scales = (torch.cat([steps, steps]) * unit).bfloat16()
        zero_points = draw(-8, 8, 10, rows, 1).to(torch.int8)
        self.candidates = Candidates(scales, None if scheme.symmetric else zero_points)
        sparse = draw(-1, 2, size, size) * (draw(0, 8, size, size) == 0)
        self.block = sparse + sparse.T + 2 * torch.eye(size)
        self.linear = draw(-8, 9, rows, size) / 4
        self.errors = torch.full((rows, GROUPS * size), 7.0)

    def choose(self) -> Choice:
        """Let the loops do it."""
        return cheapest_jointly(
            self.part, GROUP, self.candidates, self.block, self.linear, self.errors
        )

    def choose_slowly(self) -> tuple[Choice, Tensor]:
        """Candidate after candidate in float64, the first of equals; and its errors [R, g]."""
        smallest, largest = code_range(self.part.scheme.weight_bits)
        weight = self.part.grouped[:, GROUP].double()
        costs, errors = [], []
        for number, scale in enumerate(self.candidates.scales.double()):
            step = scale / self.part.unit
            if self.part.channel is not None:
                step = step / self.part.channel[:, GROUP]
            offsets = self.candidates.zero_points
            shift = 0.0 if offsets is None else offsets[number].double()
            codes = ((weight / step).round() + shift).clamp(smallest, largest)
            errors.append((codes - shift) * step - weight)
            quadratic = (errors[-1] @ self.block.double() + 2 * self.linear) * errors[-1]
            costs.append(quadratic.sum(1))
        every, errors = torch.stack(costs), torch.stack(errors)
        # argmin does not promise the first of equals.
        chosen = (every == every.amin(0)).int().argmax(0)
        rows = torch.arange(len(weight))
        choice = Choice(chosen.unsqueeze(1), every[:1].T, every[chosen, rows].unsqueeze(1))
        return choice, errors[chosen, rows]


def assert_as_slowly(case: Case) -> None:
    """The same candidates, losses and errors, and nothing of other groups touched."""
    expected, errors = case.choose_slowly()
    found = case.choose()
    assert torch.equal(found.chosen, expected.chosen)
    assert torch.equal(found.first.double(), expected.first)
    assert torch.equal(found.best.double(), expected.best)
    before, own, after = case.errors.chunk(GROUPS, dim=1)
    assert torch.equal(own.double(), errors)
    assert bool((before == 7).all() and (after == 7).all())


@pytest.mark.parametrize("scheme", [W4, W8, ASYMMETRIC], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(1, 8), (37, 32), (48, 64), (131, 128)])
def test_the_cheapest_is_found_and_the_first_of_equals(
    rows: int, size: int, channels: bool, scheme: Scheme
) -> None:
    """With fewer rows than lanes, with as many, and with some left over."""
    assert_as_slowly(Case(rows, size, scheme, channels))


def test_threads_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into parts of unequal lengths."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(joint_cheapest, "_PRODUCTS_A_THREAD", 1)
    assert_as_slowly(Case(331, 32, ASYMMETRIC))


def test_costs_that_are_no_numbers_never_win() -> None:
    """Where the first is none, it stays, as a comparison with it is never true."""
    case = Case(50, 32, W4)
    expected = case.choose_slowly()[0].chosen
    scales = case.candidates.scales
    broken = torch.full_like(scales[:1], torch.nan)
    case.candidates = Candidates(torch.cat([scales[:1], broken, scales]), None)
    assert torch.equal(case.choose().chosen, torch.where(expected == 0, 0, expected + 2))
    case.candidates = Candidates(torch.cat([broken, scales]), None)
    assert not case.choose().chosen.any()


def test_who_is_left_to_torch() -> None:
    """Floating-point codes, wide groups and ragged ones, and what is too small to be worth it."""
    weight = torch.zeros(512, 1024)
    assert chooses_jointly(weight, W4, 128)
    assert chooses_jointly(weight, W8, 512)
    assert not chooses_jointly(weight, SCHEMES["fp8_dynamic"], 128)
    assert not chooses_jointly(weight, W4, 1024)
    assert not chooses_jointly(weight, W4, 6)
    assert not chooses_jointly(weight[:8], W4, 128)
    assert not chooses_jointly(weight.to("meta"), W4, 128)
