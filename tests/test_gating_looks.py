"""The gate measures as many windows as its question needs, in real workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import RecipeError
from quantkit.gating import GateTools, judge_files
from quantkit.job_windows import load_evaluation
from quantkit.judging.baseline.store import open_store
from quantkit.recipe import GateSpec, validate
from quantkit.records import Event, Judgement, TokenWindows
from tests.helpers import make_pico_model, pico_text

LOOKS = (8, 16, 32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models that agree on little."""
    folder = tmp_path_factory.mktemp("pair")
    return make_pico_model(folder / "one", seed=1), make_pico_model(folder / "other", seed=2)


@pytest.fixture(scope="module")
def failed(pair: tuple[Path, Path]) -> tuple[Judgement, list[Event]]:
    """The second model under a limit that it misses by far."""
    return judge_pair(pair, 0.01)


def judge_pair(pair: tuple[Path, Path], max_kl: float) -> tuple[Judgement, list[Event]]:
    """Judge the second model by its KL alone, on 32 windows of which 8 are wanted at first."""
    ids = np.random.default_rng(0).integers(3, 250, (32, 16))
    windows = TokenWindows(ids, np.ones(ids.shape, np.float32), "test", "0" * 64)
    limits = {"max_perplexity_increase": None, "min_top1_agreement": None, "max_kl": max_kl}
    others = {"data": "test", "samples": 8, "probes": None, "timeout_seconds": 120}
    spec = GateSpec.model_validate(others | limits)
    events: list[Event] = []
    judgement = judge_files(
        *pair,
        windows,
        spec,
        tools=GateTools(),
        written="compressed-tensors",
        device="cpu",
        suspicions=(),
        progress=events.append,
    )
    return judgement, events


def test_what_eight_windows_decide_takes_no_more(failed: tuple[Judgement, list[Event]]) -> None:
    """The artifact fails at the first look, and the rest is never computed."""
    judgement, events = failed

    assert (judgement.verdict, judgement.windows, judgement.looks) == ("FAIL", 8, LOOKS)
    assert {event.total for event in events} == {8}


def test_a_value_on_its_limit_takes_all_windows_and_stays_open(
    pair: tuple[Path, Path], failed: tuple[Judgement, list[Event]]
) -> None:
    """The workers are loaded once, and the words say that more would hardly help."""
    measured = failed[0].kl
    assert measured is not None

    judgement, events = judge_pair(pair, measured.value)

    assert judgement.verdict == "INCONCLUSIVE"
    assert (judgement.windows, judgement.looks) == (32, LOOKS)
    assert [event.total for event in events if event.message.startswith("loading")] == [8]
    assert max(event.done for event in events) == 32
    assert "evaluation windows" in judgement.reasons[-1]


@pytest.mark.parametrize(
    ("samples", "more", "count", "notes"),
    [
        (8, {}, 32, 0),
        (8, {"max_samples": 9}, 9, 0),
        (1000, {}, None, 1),
        (4, {}, 4, 1),
        (4, {"max_samples": 12}, 12, 0),
    ],
)
def test_as_many_windows_are_read_as_may_be_measured(
    pair: tuple[Path, Path],
    tmp_path: Path,
    samples: int,
    more: dict[str, int],
    count: int | None,
    notes: int,
) -> None:
    """A note where the first look is short of windows, or cannot decide, before any work."""
    text = tmp_path / "text.txt"
    text.write_text(pico_text(600, 3))
    spec = GateSpec.model_validate(
        {"data": str(text), "samples": samples, "sequence_length": 16} | more
    )

    checkpoint = open_checkpoint(resolve_source(str(pair[0])))
    windows = load_evaluation(spec, load_tokenizer(pair[0]), checkpoint)

    assert count is None or len(windows.ids) == count
    assert len(windows.notes) == notes
    if samples == 4 and notes:
        assert windows.notes[0].startswith("4 evaluation windows decide nothing, and at least 8")


def test_fewer_windows_at_the_most_than_at_first_are_refused() -> None:
    """The words name the key and both numbers."""
    with pytest.raises(RecipeError) as caught:
        validate({"version": 1, "gate": {"data": "x", "max_samples": 100}})

    words = "gate.max_samples: at least gate.samples is expected, which is 128, got 100"
    assert words in str(caught.value)


def test_what_was_known_before_a_worker_failed_is_in_the_judgement(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """It may be why; and the store's notes are those of this artifact, not of the next one."""
    ids = np.random.default_rng(0).integers(3, 250, (8, 16))
    windows = TokenWindows(ids, np.ones(ids.shape, np.float32), "test", "0" * 64)
    store = open_store(True)
    assert store is not None
    store.say("the store was full")

    judgement = judge_files(
        pair[0],
        tmp_path / "nothing",
        windows,
        GateSpec(data="test", probes=None, timeout_seconds=120),
        tools=GateTools(store=store),
        written="compressed-tensors",
        device="cpu",
        suspicions=("the file 'config.json' is missing",),
        progress=lambda event: None,
    )

    failure, suspicion = judgement.reasons
    assert judgement.verdict == "FAIL"
    assert "is not a folder" in failure
    assert suspicion == "the file 'config.json' is missing"
    assert "the store was full" in judgement.notes
    assert store.take_notes() == ()
