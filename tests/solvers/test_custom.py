"""Tests of quantkit.solvers.custom: what a user's own solver is given, and what it may return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.numerics.affine import choose_absmax, quantize
from quantkit.records import LayerStats, LinearPlan, SolvedWeight, WeightForm
from quantkit.schemes import METHODS, SCHEMES, Solver, add_solvers
from quantkit.solvers import solve_group

ROWS, COLUMNS, GROUP = 8, 64, 32


def make_weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def make_stats() -> LayerStats:
    inputs = torch.randn(200, COLUMNS, generator=torch.Generator().manual_seed(1))
    return LayerStats(inputs.T @ inputs / 200, tokens=200, mean=inputs.mean(0), sample=inputs)


def make_linear(
    function: Callable[..., Any], scheme: str = "w4a16", *, needs_statistics: bool = False
) -> LinearPlan:
    chosen = SCHEMES[scheme]
    method = add_solvers({"own": Solver(function, needs_statistics)})["own"]
    size = GROUP if chosen.grouped else None
    return LinearPlan("model.layer", ROWS, COLUMNS, False, chosen, size, method)


def solve(
    function: Callable[..., Any],
    scheme: str = "w4a16",
    stats: LayerStats | None = None,
    *,
    needs_statistics: bool = False,
) -> Any:
    linear = make_linear(function, scheme, needs_statistics=needs_statistics)
    (solution,) = solve_group([make_weight()], stats, [linear], torch.bfloat16)
    return solution


def round_plainly(weight: Tensor, statistics: LayerStats | None, form: WeightForm) -> SolvedWeight:
    """What quantkit's own plain rounding does, by its numerics."""
    scheme = SCHEMES[form.scheme]
    scale, zero_point = choose_absmax(weight, scheme, form.group_size, form.scale_dtype)
    return SolvedWeight(quantize(weight, scale, zero_point, scheme), scale, zero_point)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16_asym", "w8a16", "w8a8"])
def test_a_solver_is_told_the_form_and_gives_what_is_stored(scheme: str) -> None:
    """Codes, scales and zero points are taken as they are, equal to those of quantkit's own."""
    forms: list[WeightForm] = []

    def solver(weight: Tensor, statistics: object, form: WeightForm) -> SolvedWeight:
        forms.append(form)
        assert statistics is None
        return round_plainly(weight, None, form)

    own = solve(solver, scheme, make_stats()).layer
    plain = replace(make_linear(solver, scheme), method=METHODS["rtn"])
    (expected,) = solve_group([make_weight()], None, [plain], torch.bfloat16)

    assert torch.equal(own.codes, expected.layer.codes)
    assert torch.equal(own.scale, expected.layer.scale)
    assert (own.zero_point is None) is (expected.layer.zero_point is None)
    chosen = SCHEMES[scheme]
    assert forms == [
        WeightForm(
            "model.layer",
            scheme,
            chosen.weight_bits,
            chosen.symmetric,
            GROUP if chosen.grouped else COLUMNS,
            torch.bfloat16,
        )
    ]
    limit = 1 << (chosen.weight_bits - 1)
    assert (forms[0].smallest_code, forms[0].largest_code) == (-limit, limit - 1)


def test_what_it_loses_is_measured_beside_plain_rounding() -> None:
    """On the statistics, also where the solver does not look at them."""
    stats = make_stats()

    def coarse(weight: Tensor, statistics: object, form: WeightForm) -> SolvedWeight:
        solved = round_plainly(weight, None, form)
        return replace(solved, codes=(solved.codes // 2) * 2)

    found = solve(coarse, stats=stats)
    same = solve(round_plainly, stats=stats)

    assert found.loss > found.plain_loss > 0
    assert same.loss == same.plain_loss == found.plain_loss


def test_a_solver_may_optimize_and_change_what_it_is_given() -> None:
    """It gets copies that autograd takes, though the walk is in inference mode."""
    with torch.inference_mode():
        stats, weight = make_stats(), make_weight()
    moment, before = stats.second_moment.clone(), weight.clone()

    def solver(mine: Tensor, statistics: LayerStats, form: WeightForm) -> SolvedWeight:
        mine.requires_grad_(True)
        (mine @ statistics.second_moment * mine).sum().backward()
        assert mine.grad is not None
        statistics.second_moment.zero_()
        with torch.no_grad():
            solved = round_plainly(mine, None, form)
            mine.zero_()
        return solved

    with torch.inference_mode():
        linear = make_linear(solver, needs_statistics=True)
        (found,) = solve_group([weight], stats, [linear], torch.bfloat16)

    assert torch.equal(stats.second_moment, moment)
    assert torch.equal(weight, before)
    assert found.loss is not None


def test_a_solver_that_needs_statistics_is_not_asked_without_tokens() -> None:
    """An expert that no token reached gets plain rounding, and the record says so."""
    stats = replace(make_stats(), tokens=0)
    found = solve(lambda *_: None, stats=stats, needs_statistics=True)
    assert found.fallback == "rtn: no calibration token reached the layer"


def change(**fields: Any) -> Callable[..., SolvedWeight]:
    """A solver that is right but for these fields."""

    def solver(weight: Tensor, statistics: object, form: WeightForm) -> SolvedWeight:
        solved = round_plainly(weight, None, form)
        return replace(solved, **{name: make(solved) for name, make in fields.items()})

    return solver


def fails(weight: Tensor, statistics: object, form: WeightForm) -> SolvedWeight:
    raise KeyError("oh\nno")


@pytest.mark.parametrize(
    ("solver", "scheme", "message"),
    [
        (fails, "w4a16", r"failed: KeyError: 'oh\\nno'"),
        (lambda *_: None, "w4a16", "returned None: return quantkit.SolvedWeight"),
        (lambda *_: (1, 2), "w4a16", "returned a tuple: return quantkit.SolvedWeight"),
        (change(codes=lambda s: s.codes.int()), "w4a16", r"codes of \[8, 64\] in int32, not of"),
        (change(codes=lambda s: s.codes[1:]), "w4a16", r"codes of \[7, 64\] in int8, not of \[8"),
        (change(codes=lambda s: [1]), "w4a16", "a list as codes, not a tensor"),
        (change(codes=lambda s: s.codes + 1), "w4a16", "codes from -7 to 8: 4 bits reach from -8"),
        (
            change(scale=lambda s: s.scale.float()),
            "w4a16",
            r"scale of \[8, 2\] in float32, .* in bfloat16: round it with \.to\(form\.",
        ),
        (change(scale=lambda s: s.scale * 0), "w4a16", "not all finite and positive"),
        (change(scale=lambda s: s.scale * float("nan")), "w4a16", "not all finite and positive"),
        (change(zero_point=lambda s: s.scale.char()), "w4a16", "scheme w4a16 has no zero points"),
        (change(zero_point=lambda s: None), "w4a16_asym", "scheme w4a16_asym needs zero points"),
        (
            change(zero_point=lambda s: torch.full_like(s.zero_point, 9)),
            "w4a16_asym",
            "zero_point from 9 to 9: 4 bits reach from -8 to 7",
        ),
    ],
)
def test_what_is_no_weight_of_the_form_is_refused(
    solver: Callable[..., Any], scheme: str, message: str
) -> None:
    """In one line that names the solver and the layer."""
    with pytest.raises(InputError, match=message) as caught:
        solve(solver, scheme)
    assert str(caught.value).startswith(
        ("solver 'own' at model.layer ", "solver 'own' at model.layer:")
    )
    assert "\n" not in str(caught.value)
