"""From what was measured to an answer: passes, broken, too coarse, or not found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.bisection.choosing import Choice, choose
from quantkit.bisection.proposals import propose
from quantkit.bisection.records import AGAIN, Outcome, Proposal, Suspect, Unit
from quantkit.bisection.scores import Scores, is_within
from quantkit.bisection.search import Scan, Setting, confirm, repair, scan
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.inspected import Inspection
from quantkit.recipe import GateSpec
from quantkit.records import Judgement
from quantkit.report.rounding import format_count, format_percent, format_significant

CONFIG = "config.json"
_CONFIG_MATTERS = 1e-4
"""KL from which on the original's weights under the artifact's config are another model."""
_NEAR = 1.5
"""Times a limit: what the first windows give up to there is judged on all."""
_NAMED = 3


@dataclass(frozen=True)
class ConfigFinding:
    """What the artifact's own config does. scores: of the artifact under it; left: KL of the
    original's weights under it."""

    words: str
    scores: Scores
    left: float

    @property
    def matters(self) -> bool:
        """Whether it changes the logits on these windows."""
        return not self.left <= _CONFIG_MATTERS


@dataclass(frozen=True)
class Answer:
    """What a bisection comes to; see `Bisection`."""

    outcome: Outcome
    summary: str
    scan: Scan
    scores: Scores
    """Of the artifact as it is."""
    blocks: tuple[Suspect, ...]
    guilty: tuple[str, ...]
    proposal: Proposal | None
    judgement: Judgement | None
    notes: tuple[str, ...] = ()


def find_answer(
    setting: Setting, config: ConfigFinding | None, found: Inspection, base: Checkpoint
) -> Answer:
    """Look for what is guilty, in the order of how surely it can be said.

    Args:
        config: None where the config's numbers are the original's.
    """
    first = scan(setting, {})
    matters = config is not None and config.matters
    scores = config.scores if config is not None and matters else first.scores
    rows = (*_config_row(config if matters else None, first), *first.blocks)
    notes: tuple[str, ...] = ()
    if config is not None and matters:
        notes = (f"all rows but that of {CONFIG} were measured under the original's config",)
    elif config is not None:
        notes = (f"{config.words}: on these windows to no effect",)
    judgement = None
    flawed = [unit for unit in setting.units.values() if unit.flaw is not None]

    def answer(
        outcome: Outcome,
        summary: str,
        guilty: Sequence[str] = (),
        choice: Choice | None = None,
    ) -> Answer:
        proposal = None if choice is None else propose(found, choice, setting.units, base)
        words = f"{config.words}. {summary}" if config is not None and matters else summary
        return Answer(
            outcome, words, first, scores, rows, tuple(guilty), proposal, judgement, notes
        )

    if is_within(first.scores, _loosen(setting.spec)):
        judgement = confirm(setting, {})
        if judgement.verdict == "PASS" and matters:
            summary = "With the original's numbers there, the artifact passes: copy them over"
            return answer("config", summary, [CONFIG], Choice({}, (), AGAIN, judgement, 0))
        if judgement.verdict == "PASS":
            return answer("passes", _say_passes(flawed))
    names, last = [unit.name for unit in flawed], first
    repaired = repair(setting)
    if repaired is not None:
        trial, mended = repaired
        if is_within(mended, setting.spec):
            verdict = confirm(setting, trial)
            if verdict.verdict == "PASS":
                mend = Choice(trial, tuple(names), AGAIN, verdict, 0)
                return answer("defect", _say_broken(flawed, mended), names, mend)
        last = scan(setting, trial)
    choice = choose(setting, last)
    if choice is None:
        choice = choose(setting, scan(setting, {} if repaired is None else repaired[0], True))
    broken = _list_flaws(flawed)
    if choice is None:
        return answer("unsolved", f"{broken}{_say_unsolved(setting, last)}", names)
    summary = f"{broken}{_say_budget(last, choice, also=bool(flawed))}"
    return answer("defect" if flawed else "budget", summary, [*names, *choice.layers], choice)


def _config_row(config: ConfigFinding | None, first: Scan) -> tuple[Suspect, ...]:
    if config is None:
        return ()
    before, after = config.scores.mean_kl, first.scores.mean_kl
    share = (before - after) / before if before > 0 else 0.0
    return (Suspect(CONFIG, after, share, None, 0, config.words),)


def _loosen(spec: GateSpec) -> GateSpec:
    agreement = spec.min_top1_agreement
    changes = {
        "max_kl": None if spec.max_kl is None else _NEAR * spec.max_kl,
        "max_perplexity_increase": None
        if spec.max_perplexity_increase is None
        else _NEAR * spec.max_perplexity_increase,
        "min_top1_agreement": None if agreement is None else 1 - _NEAR * (1 - agreement),
    }
    return spec.model_copy(update=changes)


def _list_flaws(flawed: Sequence[Unit]) -> str:
    flaws = [str(unit.flaw) for unit in flawed]
    if not flaws:
        return ""
    more = f" (and {len(flaws) - _NAMED} more)" if len(flaws) > _NAMED else ""
    return f"{'; '.join(flaws[:_NAMED])}{more}. "


def _say_passes(flawed: Sequence[Unit]) -> str:
    if not flawed:
        return (
            "the artifact holds every limit on windows: no weight has to be mended (probes and "
            "tasks are not asked here)"
        )
    return f"{_list_flaws(flawed)}The artifact holds every limit all the same"


def _say_broken(flawed: Sequence[Unit], mended: Scores) -> str:
    what = "it is" if len(flawed) == 1 else "they are"
    return (
        f"{_list_flaws(flawed)}Once {what} put right, the artifact passes (KL "
        f"{format_significant(mended.mean_kl)}): the files are damaged or were written wrongly, so "
        f"quantize again with the same recipe"
    )


def _say_budget(last: Scan, choice: Choice, *, also: bool) -> str:
    top = last.units[0] if last.units else None
    shares = ""
    if top is not None:
        shares = f"; the largest share is that of {top.name}, {format_percent(top.share)}"
    count = format_count(len(choice.layers), "layer")
    return (
        f"{'Apart from that, no' if also else 'No'} weight is further from the original's than its "
        f"bits explain: the loss is what they cost{shares}. With more bits for {count} the "
        f"artifact passes"
    )


def _say_unsolved(setting: Setting, last: Scan) -> str:
    if not setting.units:
        return (
            "every weight is the original's: what fails the gate is not among the weights (inputs "
            "that a server rounds, the key/value cache, the tokenizer)"
        )
    return (
        f"no choice of layers with more bits was measured to pass; with all weights restored the "
        f"KL is {format_significant(last.left)}"
    )
