"""Tests of quantkit.judging.probing.answers: what counts, by hand-made answers."""

from __future__ import annotations

import json

import pytest

from quantkit.judging.probing.answers import (
    Answer,
    Ids,
    count_surplus,
    holds_json,
    probe_endings,
    probe_json,
    probe_loops,
)
from quantkit.judging.probing.prompts import Prompt

LOOP = tuple([5, 6, 7, 8] * 16)
TEXT = tuple(range(100, 164))
SHORT = TEXT[:20]


def answers(*pairs: tuple[Ids, Ids]) -> list[Answer]:
    """Answers of the baseline and of the artifact."""
    return [Answer(Prompt("a prompt", (1,)), *pair) for pair in pairs]


def test_only_loops_beyond_those_of_the_baseline_count() -> None:
    """Those that move from one prompt to another are chance."""
    moved = answers(*[(LOOP, TEXT)] * 4, *[(TEXT, LOOP)] * 5, (LOOP, LOOP))
    new = answers(*[(TEXT, LOOP)] * 7, (TEXT, TEXT), (LOOP, LOOP), (LOOP, LOOP))

    assert probe_loops(moved, 0.25).value == 0
    assert "chance may give" in probe_loops(moved, 0.25).detail
    probe = probe_loops(new, 0.25)
    assert (probe.value, probe.verdict) == (0.7, "FAIL")
    assert "9 of the artifact end in a loop, and 2 of the baseline" in probe.detail
    assert probe_loops(new, None).verdict == "UNJUDGED"
    assert probe_loops([], 0.25).value is None


@pytest.mark.parametrize(
    ("more", "fewer", "surplus"),
    [(0, 0, 0), (6, 0, 0), (7, 0, 7), (0, 7, -7), (9, 1, 0), (10, 1, 9), (14, 3, 11), (20, 20, 0)],
)
def test_a_surplus_is_one_that_chance_hardly_gives(more: int, fewer: int, surplus: int) -> None:
    """Less often than in one of 50 cases: heads and tails of a fair coin."""
    assert count_surplus(more, fewer) == surplus


def test_ends_that_are_missing_and_early_ones_are_told_apart() -> None:
    """Both in like numbers are chance; in one direction they are damage."""
    missing = answers(*[(SHORT, TEXT)] * 7, (SHORT, SHORT), (TEXT, TEXT))
    early = answers(*[(TEXT, SHORT)] * 8)
    chance = answers(*[(SHORT, TEXT)] * 4, *[(TEXT, SHORT)] * 5)

    probe = probe_endings(missing, 64, 0.5)
    assert (probe.value, probe.verdict) == (0.875, "FAIL")
    assert "went on after 7 where the baseline ended, and ended after 0" in probe.detail
    assert probe_endings(early, 64, 0.5).value == 1
    assert probe_endings(chance, 64, 0.5).value == 0


def test_an_end_that_only_the_artifacts_runtime_knows_is_none() -> None:
    """llama.cpp stops where a turn ends, also where generation_config.json does not name it."""
    turned = (*TEXT[:20], 9, *TEXT[21:])
    pairs = answers(*[(turned, turned[:21])] * 8)

    probe = probe_endings(pairs, 64, 0.5, special=(9,))
    assert (probe.value, probe.verdict) == (0, "PASS")
    assert "after 8 its runtime ended at a special token that the baseline put too" in probe.detail
    assert probe_endings(pairs, 64, 0.5, special=(8,)).value == 1
    assert probe_endings(answers(*[(TEXT, turned[:21])] * 8), 64, 0.5, special=(9,)).value == 1


def test_few_ends_say_nothing() -> None:
    """Three of them are no reason to fail."""
    probe = probe_endings(answers(*[(SHORT, TEXT)] * 3, (TEXT, TEXT)), 64, 0.5)

    assert (probe.value, probe.verdict) == (None, "UNJUDGED")
    assert "after 3 of 4 prompts" in probe.detail


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"a": [1, 2]}', True),
        (" [1, 2]\n\nText: and so on", True),
        ('Here it is:\n```json\n{"a": 1}\n```\nMore?', True),
        ('```\n{"a": 1}', True),
        ('Here it is: {"a": 1}', False),
        ('{"a": 1', False),
        ("{'a': 1}", False),
        ('{"a": NaN}', False),
        ("12", False),
        ("", False),
        ("[" * 100_000, False),
    ],
)
def test_json_is_a_whole_object_or_array_at_the_beginning(text: str, valid: bool) -> None:
    """Or in a fence; what follows it does not matter."""
    assert holds_json(text) is valid


class Letters:
    """A tokenizer whose ids are code points."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(map(chr, ids))


def test_json_counts_where_the_baseline_gives_it() -> None:
    """Answers that were not JSON in the baseline either are no loss, and few say nothing."""

    def ask(baseline: str, artifact: str) -> Answer:
        ids = [tuple(map(ord, text)) for text in (baseline, artifact)]
        return Answer(Prompt("a prompt", (1,), wants_json=True), *ids)

    good, bad = json.dumps({"a": 1}), '{"a" 1}'
    tokenizer: object = Letters()
    lost = [*[ask(good, bad)] * 4, ask(good, good), ask(bad, bad)]

    probe = probe_json(lost, tokenizer, 0.5)  # type: ignore[arg-type]
    assert (probe.value, probe.verdict) == (0.8, "FAIL")
    assert "5 of 6 prompts" in probe.detail
    won = probe_json([*lost, ask(bad, good)], tokenizer, 0.5)  # type: ignore[arg-type]
    assert (won.value, won.verdict) == (0, "PASS")
    assert "fails 4 of these, and answers 1 others; fewer than 4 more may be chance" in won.detail
    few = probe_json(lost[2:], tokenizer, 0.5)  # type: ignore[arg-type]
    assert (few.value, few.verdict) == (None, "UNJUDGED")
    none = probe_json(lost[-1:], tokenizer, 0.5)  # type: ignore[arg-type]
    assert "0 of 1 prompts" in none.detail
    assert probe_json(answers((TEXT, TEXT)), None, 0.5).detail == "no prompt asked for JSON"
