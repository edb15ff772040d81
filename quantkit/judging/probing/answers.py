"""Both models' answers to the prompts: loops, ends and JSON (docs/gate.md, "Probes").

Small models loop and stop by themselves, and a single answer turns on a single token. So only what
happens to one model more often than to the other counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantkit.judging.probing.limits import judge_probe
from quantkit.judging.probing.prompts import Prompt
from quantkit.judging.suspicions import has_loop
from quantkit.judging.tasks.scores import mcnemar
from quantkit.judging.worker import Pair, Worker, are_tokens
from quantkit.records.measuring import Probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 8
"""Prompts that are continued at once."""

CHANCE = 0.02
"""A surplus that chance gives as often as this, or more often, counts as none (McNemar's test)."""
MIN_ENDINGS = 7
"""Prompts after which a model ended: of fewer no surplus is beyond chance."""
MIN_JSON = 4
"""Valid answers of the baseline; of fewer one more or less would decide."""

_BY_CHANCE = ": a difference that chance may give, counted as none"

_FENCE = re.compile(r"```\w*\n(.*?)(?:```|$)", re.DOTALL)

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """One prompt and how both models go on: token ids, the one at which it ended included."""

    prompt: Prompt
    baseline: Ids
    artifact: Ids


def continue_prompts(pair: Pair, prompts: Sequence[Prompt], new_tokens: int) -> tuple[Answer, ...]:
    """Let both models continue each prompt by up to `new_tokens`, greedily.

    Raises:
        WorkerError, ResourceError: as `Pair.answers`; or an answer holds no ids.
    """
    # Of similar lengths, so that a batch has little padding.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].ids))
    found: dict[int, Answer] = {}
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        request = {
            "op": "continue",
            "prompts": [list(prompts[number].ids) for number in part],
            "max_new_tokens": new_tokens,
        }
        pair.ask(request, request)
        answers = [
            _read_ids(worker, answer, len(part))
            for worker, answer in zip(pair.workers, pair.answers(), strict=True)
        ]
        for number, baseline, artifact in zip(part, *answers, strict=True):
            found[number] = Answer(prompts[number], baseline, artifact)
    return tuple(found[number] for number in range(len(prompts)))


def _read_ids(worker: Worker, answer: dict[str, Any], count: int) -> list[Ids]:
    rows = answer.get("ids")
    if not isinstance(rows, list) or len(rows) != count or not all(map(are_tokens, rows)):
        raise worker.error(f"answered no token ids for {count} prompts")
    return [tuple(ids) for ids in rows]


def probe_loops(answers: Sequence[Answer], limit: float | None) -> Probe:
    """Compare how many continuations end in a loop; `new_loops` is the artifact's surplus."""
    if not answers:
        return judge_probe("new_loops", None, limit, "no prompt was continued")
    loops = [(has_loop(answer.baseline), has_loop(answer.artifact)) for answer in answers]
    baseline, artifact = (sum(pair[side] for pair in loops) for side in (0, 1))
    new = sum(second and not first for first, second in loops)
    gone = sum(first and not second for first, second in loops)
    detail = (
        f"of {len(answers)} greedy continuations {artifact} of the artifact end in a loop, and "
        f"{baseline} of the baseline"
    )
    surplus = max(0, count_surplus(new, gone))
    if new > gone and not surplus:
        detail += _BY_CHANCE
    return judge_probe("new_loops", surplus / len(answers), limit, detail)


def count_surplus(more: int, fewer: int) -> int:
    """Return `more` - `fewer`, or 0 where chance gives such a difference in one of 50 cases.

    By McNemar's exact test: each prompt at which the models differ is as likely to be of one kind
    as of the other.
    """
    return more - fewer if mcnemar(more, fewer) < CHANCE else 0


def probe_endings(
    answers: Sequence[Answer], new_tokens: int, limit: float | None, special: Collection[int] = ()
) -> Probe:
    """Compare after which prompts a model ends by itself, before `new_tokens` are there.

    Chance moves ends in both directions alike, and damage in one: what counts is the surplus of
    ends that are missing over those that come in place of more text, or the reverse, as a share of
    the prompts after which either model ends.

    Args:
        answers: to all prompts.
        new_tokens: that were asked for.
        limit: of that share.
        special: tokens that end the baseline's answer too where they end the artifact's: llama.cpp
            stops at every token that is written like an end of a turn, and transformers only at
            those of generation_config.json. Both models have then put the same.
    """
    alike = [
        len(answer.baseline) == new_tokens
        and len(answer.artifact) < new_tokens
        and any(token in special and token in answer.baseline for token in answer.artifact[-1:])
        for answer in answers
    ]
    ended = [
        (len(answer.baseline) < new_tokens or is_alike, len(answer.artifact) < new_tokens)
        for answer, is_alike in zip(answers, alike, strict=True)
    ]
    either = sum(first or second for first, second in ended)
    missing = sum(first and not second for first, second in ended)
    early = sum(second and not first for first, second in ended)
    if either < MIN_ENDINGS:
        detail = (
            f"a model ended by itself after {either} of {len(answers)} prompts, and fewer than "
            f"{MIN_ENDINGS} say nothing"
        )
        return judge_probe("changed_endings", None, limit, detail)
    detail = (
        f"of {either} prompts after which a model ended by itself, the artifact went on after "
        f"{missing} where the baseline ended, and ended after {early} where the baseline went on"
    )
    if any(alike):
        detail += (
            f"; after {sum(alike)} its runtime ended at a special token that the baseline put too, "
            "but may not end at"
        )
    surplus = abs(count_surplus(missing, early))
    if missing != early and not surplus:
        detail += _BY_CHANCE
    return judge_probe("changed_endings", surplus / either, limit, detail)


def probe_json(
    answers: Sequence[Answer], tokenizer: PreTrainedTokenizerBase | None, limit: float | None
) -> Probe:
    """Tell how many of the baseline's valid JSON answers the artifact does not give.

    Valid answers that only the artifact gives are subtracted: a model that gives JSON by luck does
    so at other prompts. A few that are left count as none: one character spoils an answer.
    """
    name = "lost_json"
    asked = [answer for answer in answers if answer.prompt.wants_json]
    if not asked or tokenizer is None:
        return judge_probe(name, None, limit, "no prompt asked for JSON")

    def is_valid(ids: Ids) -> bool:
        return holds_json(str(tokenizer.decode(list(ids), skip_special_tokens=True)))

    valid = [(is_valid(answer.baseline), is_valid(answer.artifact)) for answer in asked]
    given = sum(first for first, _ in valid)
    if given < MIN_JSON:
        detail = (
            f"the baseline answers {given} of {len(asked)} prompts with valid JSON, and fewer than "
            f"{MIN_JSON} say nothing"
        )
        return judge_probe(name, None, limit, detail)
    lost = sum(first and not second for first, second in valid)
    won = sum(second and not first for first, second in valid)
    detail = (
        f"the baseline answers {given} of {len(asked)} prompts with valid JSON, and the artifact "
        f"fails {lost} of these, and answers {won} others"
    )
    surplus = lost - won
    if surplus < MIN_JSON:
        return judge_probe(name, 0.0, limit, f"{detail}; fewer than {MIN_JSON} more may be chance")
    return judge_probe(name, surplus / given, limit, detail)


def holds_json(text: str) -> bool:
    """Tell whether `text`, or the first fenced block in it, begins with a JSON object or array.

    What follows a complete value does not matter: a model without a chat template goes on with the
    next example. A bare word or number is no answer in JSON.
    """
    fenced = _FENCE.search(text)
    body = (fenced[1] if fenced else text).strip()
    if not body.startswith(("{", "[")):
        return False
    try:
        json.JSONDecoder(parse_constant=_refuse).raw_decode(body)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(word: str) -> None:
    """NaN and Infinity are Python's, not JSON's."""
    raise ValueError(word)
