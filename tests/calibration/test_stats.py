"""The second moment and the choice of device and dtype."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from quantkit.calibration import stats as stats_module
from quantkit.calibration.compute import choose_compute_dtype, choose_device
from quantkit.calibration.stats import (
    SAMPLED_TOKENS,
    accumulate,
    empty_moment,
    finish,
)
from quantkit.errors import InputError

CPU = torch.device("cpu")


def test_batches_add_up_to_the_mean_outer_product() -> None:
    """Against a sum over single tokens in float64."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 5, 8, generator=generator) for _ in range(3)]
    moment = empty_moment(8, CPU)

    for batch in batches:
        accumulate(moment, batch, None)
    stats = finish(moment)

    rows = torch.cat([batch.reshape(-1, 8) for batch in batches]).double()
    expected = sum(torch.outer(row, row) for row in rows) / len(rows)
    assert stats.tokens == 30
    torch.testing.assert_close(stats.second_moment.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_inputs_are_summed_panel_by_panel(dtype: torch.dtype) -> None:
    """Also where the last panel is narrow, and to float32's precision from bfloat16 activations."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(700, 300, generator=generator).to(dtype)
    moment = empty_moment(300, CPU)

    for batch in rows.split(128):
        accumulate(moment, batch, None)
    found = finish(moment).second_moment

    expected = rows.double().T @ rows.double() / len(rows)
    assert torch.equal(found, found.T)
    assert (found.double() - expected).norm() < 1e-5 * expected.norm()


def test_sums_of_bfloat16_activations_are_exact_products() -> None:
    """A float32 sum of them, over more columns than one panel has; the statistics say so."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(512, 600, generator=generator).bfloat16()
    moment = empty_moment(600, CPU)

    accumulate(moment, rows, None)
    stats = finish(moment)

    expected = rows.double().T @ rows.double() / len(rows)
    assert (stats.second_moment.double() - expected).norm() < 1e-6 * expected.norm()
    assert stats.bfloat16


def test_a_compiled_product_sums_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of growing sizes, one of another dtype among them, with what they are beside."""
    generator = torch.Generator().manual_seed(4)
    sizes = ((40, torch.bfloat16), (70, torch.bfloat16), (60, torch.float32), (9, torch.bfloat16))
    batches = [torch.randn(size, 600, generator=generator).to(dtype) for size, dtype in sizes]
    originals = [batch + batch.sin() for batch in batches]
    found = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(stats_module, "sums_products", lambda _: False)
        moment = empty_moment(600, CPU)
        for batch, original in zip(batches, originals, strict=True):
            accumulate(moment, batch, None, original)
        found.append(finish(moment))

    ours, theirs = found
    assert torch.equal(ours.second_moment, ours.second_moment.T)
    torch.testing.assert_close(ours.second_moment, theirs.second_moment, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.mean, theirs.mean)
    assert ours.drift is not None
    assert theirs.drift is not None
    torch.testing.assert_close(ours.drift, theirs.drift, rtol=1e-5, atol=1e-5)


def test_float32_activations_are_summed_as_they_are() -> None:
    """Not rounded to bfloat16; one such batch is enough for the statistics to say so."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(512, 256, generator=generator)
    moment = empty_moment(256, CPU)

    accumulate(moment, rows[:256], None)
    accumulate(moment, rows[256:], None)
    found = finish(moment)

    expected = rows.double().T @ rows.double() / len(rows)
    assert (found.second_moment.double() - expected).norm() < 1e-6 * expected.norm()
    assert not found.bfloat16
    assert not finish(empty_moment(4, CPU)).bfloat16


def test_weighted_tokens_count_by_their_weight() -> None:
    """A token of weight 2 counts as two tokens, one of weight 0 not at all."""
    rows = torch.tensor([[1.0, 2.0], [3.0, -1.0], [5.0, 5.0]])
    moment = empty_moment(2, CPU)

    accumulate(moment, rows, torch.tensor([2.0, 1.0, 0.0]))
    stats = finish(moment)

    expected = (2 * torch.outer(rows[0], rows[0]) + torch.outer(rows[1], rows[1])) / 3
    assert stats.tokens == 2
    torch.testing.assert_close(stats.second_moment, expected)


def test_no_token_gives_zeros() -> None:
    """Nothing counted is not a division by zero."""
    assert not finish(empty_moment(4, CPU)).second_moment.any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_and_extremes_are_those_of_the_counted_tokens(
    dtype: torch.dtype, weighted: bool
) -> None:
    """Against float64 over all at once; tokens of weight 0, even infinite, leave no trace."""
    generator = torch.Generator().manual_seed(3)
    rows = (3 * torch.randn(60, 7, generator=generator)).to(dtype)
    weights = torch.randint(1, 3, (60,), generator=generator).float()
    moment = empty_moment(7, CPU)
    if weighted:
        weights[::4] = 0.0
        rows[::4] = torch.inf

    for part, share in zip(rows.split(25), weights.split(25), strict=True):
        accumulate(moment, part, share if weighted else None)
    stats = finish(moment)

    kept = rows[weights > 0].double() if weighted else rows.double()
    counts = weights[weights > 0].double() if weighted else torch.ones(60).double()
    expected = (counts.unsqueeze(1) * kept).sum(0) / counts.sum()
    assert stats.mean is not None
    assert stats.absmax is not None
    torch.testing.assert_close(stats.mean.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.absmax.double(), kept.abs().amax(0))
    assert bool(stats.second_moment.isfinite().all())


def test_weights_of_one_are_no_weights() -> None:
    """Nor are they where some tokens do not count."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(70, 20, generator=generator).bfloat16()
    counted = torch.rand(70, generator=generator) > 0.3
    found = []
    for batch, weights in ((rows, counted.float()), (rows[counted], None)):
        moment = empty_moment(20, CPU)
        accumulate(moment, batch, weights)
        found.append(finish(moment))

    assert found[0].tokens == found[1].tokens == int(counted.sum())
    for name in ("second_moment", "mean", "absmax", "sample"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name)), name


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("features", [1, 47, 50])
def test_the_ways_to_sum_see_the_same_of_each_feature(
    tokens: int, features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a value that is no number, infinities of both signs, and a zero that has one."""
    generator = torch.Generator().manual_seed(6)
    batches = [torch.randn(tokens, features, generator=generator).bfloat16() for _ in range(3)]
    batches[0][-1, features // 2] = torch.nan
    batches[1][0, features // 3] = -torch.inf
    batches[1][-1, features // 4] = torch.inf
    batches[0][:, -1] = -0.0
    found = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(stats_module, "sums_products", lambda _: False)
        moment = empty_moment(features, CPU)
        for batch in batches:
            accumulate(moment, batch, None)
        found.append((moment.absmax, moment.first))

    (ours, our_sum), (theirs, their_sum) = found
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(our_sum, their_sum, rtol=1e-5, atol=1e-6, equal_nan=True)


def sample_of(tokens: int, batch: int, features: int = 2) -> list[int]:
    """The numbers of the tokens in a sample of so many, of which token i is filled with i."""
    rows = torch.arange(tokens).float().unsqueeze(1).expand(tokens, features)
    moment = empty_moment(features, CPU)
    for part in rows.split(batch):
        accumulate(moment, part, None)
    sample = finish(moment).sample
    assert sample is not None
    assert sample.shape[1] == features
    return [int(row[0]) for row in sample]


def test_a_short_stream_is_its_own_sample() -> None:
    """All tokens, in their order, as float32."""
    assert sample_of(100, batch=30) == list(range(100))


@pytest.mark.parametrize("tokens", [SAMPLED_TOKENS + 1, 5000, 65536])
def test_a_sample_is_spread_evenly_and_does_not_depend_on_batches(tokens: int) -> None:
    """No gap is much wider than the average one, and batches of any size give the same tokens."""
    chosen = sample_of(tokens, batch=1000)

    assert SAMPLED_TOKENS // 3 <= len(chosen) <= SAMPLED_TOKENS
    assert chosen == sorted(set(chosen)) == sample_of(tokens, batch=tokens)
    gaps = [after - before for before, after in pairwise(chosen)]
    assert max(gaps) <= 3 * tokens / len(chosen)


@pytest.mark.parametrize("followed", [False, True])
def test_a_sample_is_of_the_tokens_whose_phase_is_below_its_share(followed: bool) -> None:
    """In batches of any lengths and of both dtypes, after any number of tokens."""
    generator = torch.Generator().manual_seed(7)
    lengths = (3, 700, 1, 900, 40, 2500, 5, 1024, 60, 800)
    first = 1 << 20
    rows = torch.randn(sum(lengths), 5, generator=generator).bfloat16().float()
    moment = empty_moment(5, CPU)
    moment.sample.seen = first

    for number, batch in enumerate(rows.split(lengths)):
        given = batch.to(torch.float32 if number == 4 else torch.bfloat16)
        accumulate(moment, given, None, 2 * given if followed else None)
    share, stats = moment.sample.share, finish(moment)

    numbers = torch.arange(first, first + len(rows), dtype=torch.float64)
    phases = (numbers * ((5**0.5 - 1) / 2)).frac()
    assert share == 1 / 8
    assert stats.sample is not None
    assert torch.equal(stats.sample, rows[phases < share])
    assert torch.equal(moment.sample.phases, phases[phases < share])
    if followed:
        assert stats.drift_sample is not None
        assert torch.equal(stats.drift_sample, stats.sample)


def test_a_sample_does_not_keep_the_activations_it_is_of() -> None:
    """It takes the room of so many tokens as it may have, at the most."""
    moment = empty_moment(4, CPU)
    for _ in range(9):
        accumulate(moment, torch.randn(5000, 4), None)
        assert moment.sample.rows is not None
        held = moment.sample.rows.untyped_storage().nbytes()
        assert held <= SAMPLED_TOKENS * 4 * 4


@pytest.mark.parametrize("length", [128, 512, 1000])
def test_a_sample_has_every_position_of_a_window_equally_often(length: int) -> None:
    """Every k-th token would take too many first tokens of windows, which are unlike others."""
    chosen = sample_of(length * 200, batch=length)

    first = sum(number % length == 0 for number in chosen) / len(chosen)
    halves = sum(number % length < length // 2 for number in chosen) / len(chosen)
    assert first < 4 / length + 0.004
    assert 0.45 < halves < 0.55


def test_tokens_that_do_not_count_are_not_sampled() -> None:
    """Also where they are most of a batch, and where nothing is left."""
    rows = torch.arange(12.0).unsqueeze(1)
    moment = empty_moment(1, CPU)

    accumulate(moment, rows, (rows[:, 0] % 3 == 0).float())
    accumulate(moment, rows, torch.zeros(12))
    sample = finish(moment).sample

    assert sample is not None
    assert sample[:, 0].tolist() == [0.0, 3.0, 6.0, 9.0]


def test_a_float16_checkpoint_is_never_computed_in_bfloat16() -> None:
    """bfloat16 would drop bits of its weights."""
    dtype, probe = choose_compute_dtype(CPU, torch.float16)
    assert dtype == torch.float32
    assert probe.float32_gflops > 0


def test_the_faster_dtype_is_chosen_for_a_bfloat16_checkpoint() -> None:
    """The choice follows the measurement that is returned with it."""
    dtype, probe = choose_compute_dtype(CPU, torch.bfloat16)
    assert (dtype == torch.bfloat16) == (probe.bfloat16_gflops > 1.5 * probe.float32_gflops)


def test_an_unknown_or_absent_device_is_refused() -> None:
    """The error says which devices there are."""
    with pytest.raises(InputError, match="known: auto, cpu, cuda"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            choose_device("cuda")
