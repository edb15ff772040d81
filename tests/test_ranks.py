"""What the processes of a job share, without starting any: tests/e2e/test_ranks_jobs.py does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from quantkit.calibration import sharing
from quantkit.calibration.sharing import share_windows
from quantkit.calibration.stats import (
    SAMPLED_TOKENS,
    Moment,
    accumulate,
    empty_moment,
    filled_panels,
    finish,
)
from quantkit.errors import CalibrationError, InputError
from quantkit.ggml_types import GGML_TYPES
from quantkit.ranks import (
    ALONE,
    Ranks,
    from_first,
    gather,
    join_ranks,
    ranks_here,
    read_ranks,
    sum_over,
)
from quantkit.records import LayerStats, TokenWindows
from quantkit.schemes import EFFORTS, SCHEMES, Scheme
from quantkit.solvers import spreading
from quantkit.solvers.ggml import solve_ggml
from quantkit.solvers.gptq import round_compensated
from quantkit.solvers.rounding import Rounding
from quantkit.solvers.rtn import round_plainly
from quantkit.solvers.spreading import join_roundings


@pytest.mark.parametrize(
    ("count", "size", "unit"), [(7, 3, 1), (300, 2, 128), (2, 5, 1), (0, 2, 1)]
)
def test_shares_are_all_there_is_in_order(count: int, size: int, unit: int) -> None:
    shares = [Ranks(rank, size).share(count, unit) for rank in range(size)]

    assert [index for share in shares for index in range(count)[share]] == list(range(count))
    assert all(share.start % unit == 0 for share in shares)
    lengths = [len(range(count)[share]) for share in shares]
    assert max(lengths) - min(lengths) <= unit


def test_a_process_alone_shares_nothing() -> None:
    tensor = torch.ones(2)
    sum_over(ALONE, tensor)

    assert tensor.tolist() == [1, 1]
    assert gather(ALONE, "mine") == ["mine"]
    assert from_first(ALONE, lambda: "made") == "made"
    with join_ranks() as ranks:
        assert ranks == ALONE


def test_the_environment_says_who_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert read_ranks() == Ranks(3, 4)
    monkeypatch.delenv("RANK")
    with pytest.raises(InputError, match="start the job with torchrun"):
        read_ranks()


@pytest.mark.parametrize(("place", "port"), [(None, "29500"), ("127.0.0.1", None), ("", "x")])
def test_ranks_that_know_no_place_to_meet_are_told_of_torchrun(
    monkeypatch: pytest.MonkeyPatch, place: str | None, port: str | None
) -> None:
    """A shell in which WORLD_SIZE is left over from another job."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name, value in (("MASTER_ADDR", place), ("MASTER_PORT", port)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="with torchrun, or unset WORLD_SIZE"), join_ranks():
        pass


def test_a_machine_is_shared_by_the_ranks_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [ranks_here(ALONE), ranks_here(Ranks(1, 4))] == [1, 4]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert ranks_here(Ranks(1, 4)) == 2


def make_windows(weights: np.ndarray) -> TokenWindows:
    ids = np.arange(weights.size, dtype=np.int64).reshape(weights.shape)
    return TokenWindows(ids, weights, "text", "hash")


def test_windows_are_shared_and_their_tokens_counted() -> None:
    weights = np.ones((5, 4), dtype=np.float32)
    weights[0, :3] = 0
    windows = make_windows(weights)

    shares = [share_windows(Ranks(rank, 2), windows) for rank in range(2)]

    assert np.concatenate([share.windows.ids for share in shares]).tolist() == windows.ids.tolist()
    assert [share.first_token for share in shares] == [0, 5]
    with pytest.raises(CalibrationError, match="5 calibration windows cannot be shared by 6"):
        share_windows(Ranks(0, 6), windows)


def sum_up(rows: torch.Tensor, first_token: int = 0) -> Moment:
    moment = empty_moment(rows.shape[1], torch.device("cpu"))
    moment.sample.seen = first_token
    for part in rows.split(100):
        accumulate(moment, part, None, part * 1.5)
    return moment


def test_the_samples_of_all_ranks_are_the_sample_of_one() -> None:
    """Token for token, though each rank has drawn a larger share of its own tokens."""
    rows = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    whole = sum_up(rows).sample
    parts = [sum_up(rows[:700]), sum_up(rows[700:4200], 700), sum_up(rows[4200:], 4200)]

    joined = sharing._join([part.sample for part in parts])

    assert whole.rows is not None
    assert whole.moved is not None
    assert joined.rows is not None
    assert joined.moved is not None
    assert SAMPLED_TOKENS // 3 < len(whole.rows) <= SAMPLED_TOKENS
    assert torch.equal(joined.rows, whole.rows)
    assert torch.equal(joined.moved, whole.moved)
    assert torch.equal(joined.phases, whole.phases)
    assert (joined.share, joined.seen) == (whole.share, whole.seen)


def test_sums_of_ranks_are_the_sum_of_one() -> None:
    """Wherever `finish` looks: it takes more of the sum than the upper triangle."""
    rows = torch.randn(40, 1300, generator=torch.Generator().manual_seed(4))
    mine, theirs = sum_up(rows[:10]), sum_up(rows[10:])
    for panel, other in zip(filled_panels(mine.total), filled_panels(theirs.total), strict=True):
        panel += other
    mine.weight += theirs.weight

    expected = rows.T @ rows / len(rows)
    assert torch.allclose(finish(mine).second_moment, expected, rtol=1e-4, atol=1e-5)


def test_a_rank_without_a_token_adds_nothing_to_the_sample() -> None:
    some, none = sum_up(torch.ones(10, 3)), empty_moment(3, torch.device("cpu"))

    assert len(sharing._join([some.sample, none.sample]).phases) == 10


def make_stats(size: int) -> LayerStats:
    inputs = torch.randn(4 * size, size, generator=torch.Generator().manual_seed(1))
    return LayerStats(inputs.T @ inputs / len(inputs), len(inputs))


@pytest.mark.parametrize("name", ["w4a16_asym", "fp8_block"])
def test_rows_rounded_apart_are_those_rounded_together(name: str) -> None:
    scheme: Scheme = SCHEMES[name]
    group_size, unit = (128, 128) if name == "fp8_block" else (32, 1)
    weight = torch.randn(300, 128, generator=torch.Generator().manual_seed(2))
    stats = make_stats(128)

    def solve(rows: torch.Tensor) -> Rounding:
        return round_compensated(rows, scheme, group_size, torch.bfloat16, stats, EFFORTS["normal"])

    whole = solve(weight)
    joined = join_roundings([solve(weight[Ranks(rank, 2).share(300, unit)]) for rank in range(2)])

    different = (joined.codes.view(torch.int8) != whole.codes.view(torch.int8)).float().mean()
    assert float(different) < 0.01
    assert joined.scale.shape == whole.scale.shape
    assert joined.losses is not None
    assert whole.losses is not None
    assert torch.allclose(joined.losses.sum(), whole.losses.sum(), rtol=1e-3)


def test_rows_that_fell_back_on_one_rank_alone_are_counted() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    scheme = SCHEMES["w8a8"]
    plain = round_plainly(weight, scheme, None, torch.bfloat16)
    fallen = Rounding(plain.codes, plain.scale, None, fallback="rtn: for a reason")

    assert join_roundings([fallen, fallen]).fallback == "rtn: for a reason"
    mixed = join_roundings([plain, fallen])
    assert mixed.fallback is None
    assert mixed.plain_rows is not None
    assert mixed.plain_rows.tolist() == [False] * 6 + [True] * 6


def test_a_reason_to_fall_back_of_one_rank_alone_is_told() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    kind = GGML_TYPES["Q4_0"]
    solutions = [
        solve_ggml(weight, kind, replace(make_stats(32), tokens=tokens), EFFORTS["normal"])
        for tokens in (128, 0)
    ]

    joined = spreading._join_solutions(solutions)

    assert solutions[0].plain_rows is not None
    assert "no calibration token reached the layer" in str(joined.fallback)
    assert len(joined.blocks.codes) == 12
