"""What the gate measured besides its three limits: where, on what text, and what else it tried."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.records.metrics import Metric, Verdict


@dataclass(frozen=True)
class PositionRange:
    """Positions `start` to `stop` - 1 of every window, counted from 0, and what they have."""

    start: int
    stop: int
    kl: Metric
    top1_agreement: Metric


@dataclass(frozen=True)
class DomainResult:
    """What the positions of one kind of text have; the interval is over windows that hold some."""

    name: str
    windows: int
    tokens: int
    kl: Metric
    perplexity_increase: float
    top1_agreement: float


@dataclass(frozen=True)
class TokenChoice:
    """A token that a model might go on with."""

    text: str
    probability: float


@dataclass(frozen=True)
class Parting:
    """The place in a bad window at which the two models differ most."""

    window: int
    """Its number in the data, from 0."""
    kl: float
    """Mean over the window."""
    position: int
    """Of the token that both had read last."""
    position_kl: float
    before: str
    """The end of the text that both had read."""
    actual: str
    """The token that came next in the text."""
    baseline: tuple[TokenChoice, ...]
    """Its most probable tokens, falling."""
    artifact: tuple[TokenChoice, ...]


@dataclass(frozen=True)
class Generation:
    """One prompt, and how each model goes on, greedily."""

    prompt: str
    baseline: str
    artifact: str
    same_tokens: int
    """How many tokens they have in common at the beginning."""
    baseline_ended: bool
    """Whether the model itself ended its answer."""
    artifact_ended: bool


@dataclass(frozen=True)
class Probe:
    """One look at how the artifact behaves, with its limit. Counted, so without an interval."""

    name: str
    """`new_loops`, `changed_endings`, `lost_json`, `special_tokens`, `long_context`."""
    value: float | None
    """None where it could not be looked at; `detail` then says why."""
    limit: float | None
    verdict: Verdict
    """UNJUDGED where there is no value or no limit."""
    detail: str
    """One sentence: of how many, which was worst."""


@dataclass(frozen=True)
class TaskResult:
    """An lm-eval task, both models on the same documents."""

    name: str
    metric: str
    """As lm-eval names it, for instance `acc`."""
    higher_is_better: bool
    samples: int
    baseline: float
    artifact: float
    recovery: float
    """The artifact's value as a share of the baseline's (docs/gate.md)."""
    low: float
    high: float
    """Of the recovery, from the paired difference."""
    p_value: float | None
    """McNemar's exact test, where each document is right or wrong."""
    lost: int
    """Documents that the baseline has right and the artifact wrong (or worse)."""
    won: int
    limit: float | None
    """Lowest recovery that passes."""
    verdict: Verdict


@dataclass(frozen=True)
class Footprint:
    """What running an artifact takes on this machine, in the runtime that judged it."""

    runtime: str
    load_seconds: float
    memory_bytes: int | None
    """The largest resident set of its process."""
    prefill: float | None
    """Tokens a second of a prompt."""
    decoding: float | None
    """Tokens a second, one after the other."""
    threads: int
    what: str = ""
    """What was timed, and in what the weights were while it was."""


@dataclass(frozen=True)
class Difference:
    """Two artifacts of a comparison on the windows that both were measured on."""

    first: str
    second: str
    windows: int
    kl: Metric
    """Mean KL of the first minus that of the second, with its paired interval."""
    significant: bool


@dataclass(frozen=True)
class Details:
    """What the windows show besides the metrics that have limits."""

    reverse_kl: Metric
    """KL(artifact || baseline)."""
    top5_agreement: Metric
    """Share of the baseline's five most probable tokens that are among the artifact's."""
    flips: Metric
    """Share of positions at which exactly one model puts the token that came first."""
    lost: float
    """Share of positions at which only the baseline does."""
    positions: tuple[PositionRange, ...] = ()
    domains: tuple[DomainResult, ...] = ()
    partings: tuple[Parting, ...] = ()
    """Of the worst windows, the worst first."""
    generations: tuple[Generation, ...] = ()
    windows: tuple[int, ...] = ()
    """Numbers in the data of the windows that were measured, in the order of the next three."""
    baseline_nll: tuple[float, ...] = ()
    artifact_nll: tuple[float, ...] = ()
    kl: tuple[float, ...] = ()
