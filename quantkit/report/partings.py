"""Where two models part: candidates in the worst windows, and continuations side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.records import ArtifactReport, Generation, Parting, TokenChoice
from quantkit.report.rounding import format_percent, format_significant

_SHOWN = str.maketrans({" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"})
_LONGEST_WORD = 24
"""Further back than this the beginning of a word is not looked for."""


@dataclass(frozen=True)
class ChoiceView:
    """One candidate for the next token."""

    text: str
    probability: str
    width: float
    """The probability as a percentage of the bar's length."""
    came: bool
    """Whether it is the token that really came next."""


@dataclass(frozen=True)
class PartingView:
    """One bad window at the place where the models differ most."""

    window: int
    kl: str
    tokens_read: int
    position_kl: str
    before: str
    actual: str
    baseline: tuple[ChoiceView, ...]
    artifact: tuple[ChoiceView, ...]
    sentence: str
    """What differs, in words."""


@dataclass(frozen=True)
class GenerationView:
    """One prompt and both continuations, cut where they part."""

    prompt: str
    common: str
    baseline_rest: str
    artifact_rest: str
    same_tokens: int
    is_same: bool
    baseline_ended: bool
    artifact_ended: bool


def parting_views(artifact: ArtifactReport) -> tuple[PartingView, ...]:
    """Return the partings of an artifact, the worst window first."""
    details = artifact.judgement.details
    return tuple(map(_parting_view, details.partings)) if details else ()


def generation_views(artifact: ArtifactReport) -> tuple[GenerationView, ...]:
    """Return the continuations of an artifact: first those that part, else in their order."""
    details = artifact.judgement.details
    views = map(_generation_view, details.generations if details else ())
    return tuple(sorted(views, key=lambda view: view.is_same))


def count_same(views: Sequence[GenerationView]) -> int:
    """Return how many continuations are the same to the end."""
    return sum(view.is_same for view in views)


def show_token(text: str) -> str:
    """Return a token with its white space made visible: ` the` is `␣the`."""
    return text.translate(_SHOWN) or "(nothing)"


def split_common(first: str, second: str) -> tuple[str, str, str]:
    """Return the common beginning and both rests; a word in which they part is in the rests."""
    pairs = zip(first, second, strict=False)
    cut = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    if cut < max(len(first), len(second)):
        start = cut
        while start > 0 and not first[start - 1].isspace() and cut - start < _LONGEST_WORD:
            start -= 1
        if start == 0 or first[start - 1].isspace():
            cut = start
    return first[:cut], first[cut:], second[cut:]


def _parting_view(parting: Parting) -> PartingView:
    return PartingView(
        window=parting.window,
        kl=format_significant(parting.kl),
        tokens_read=parting.position + 1,
        position_kl=format_significant(parting.position_kl),
        before=parting.before,
        actual=show_token(parting.actual),
        baseline=tuple(_choice(choice, parting.actual) for choice in parting.baseline),
        artifact=tuple(_choice(choice, parting.actual) for choice in parting.artifact),
        sentence=_describe(parting.baseline, parting.artifact),
    )


def _choice(choice: TokenChoice, actual: str) -> ChoiceView:
    return ChoiceView(
        text=show_token(choice.text),
        probability=_share(choice.probability),
        width=round(min(max(100 * choice.probability, 0.0), 100.0), 2),
        came=choice.text == actual,
    )


def _share(probability: float) -> str:
    """A probability is never written as none at all."""
    return "< 0.1%" if 0 <= probability < 0.001 else format_percent(probability)


def _describe(baseline: Sequence[TokenChoice], artifact: Sequence[TokenChoice]) -> str:
    if not (baseline and artifact):
        return ""
    ours, theirs = artifact[0], baseline[0]
    if ours.text != theirs.text:
        return (
            f"The baseline would go on with “{show_token(theirs.text)}” "
            f"({_share(theirs.probability)}), the artifact with “{show_token(ours.text)}” "
            f"({_share(ours.probability)})."
        )
    return (
        f"Both hold “{show_token(ours.text)}” for the most probable: the baseline with "
        f"{_share(theirs.probability)}, the artifact with {_share(ours.probability)}."
    )


def _generation_view(generation: Generation) -> GenerationView:
    common, baseline, artifact = split_common(generation.baseline, generation.artifact)
    return GenerationView(
        prompt=generation.prompt,
        common=common,
        baseline_rest=baseline,
        artifact_rest=artifact,
        same_tokens=generation.same_tokens,
        is_same=not (baseline or artifact)
        and generation.baseline_ended == generation.artifact_ended,
        baseline_ended=generation.baseline_ended,
        artifact_ended=generation.artifact_ended,
    )
