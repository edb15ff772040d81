"""On what an artifact is judged: the records below `gate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from quantkit.errors import nearest
from quantkit.recipe.fields import Fraction, Spec, choice_of
from quantkit.schemes import RUNTIMES


class TaskSpec(Spec):
    """One lm-eval task with its limits."""

    name: str = Field(description="name of a task of lm-eval, or a YAML file that describes one")
    limit: int | None = Field(
        default=None, ge=1, description="documents that are asked, the first ones; null: all"
    )
    min_recovery: Fraction | None = Field(
        default=None,
        ge=0,
        description="lowest share of the baseline's score that passes; null: no limit",
    )
    metric: str | None = Field(
        default=None, description="which of the task's metrics counts; null: its first one"
    )
    num_fewshot: int | None = Field(
        default=None, ge=0, description="examples before each question; null: the task's own"
    )


class ProbesSpec(Spec):
    """How the artifact behaves beside the baseline, looked at with a few prompts."""

    prompts: str | None = Field(
        default=None,
        description="jsonl file of prompts (docs/gate.md); null: those that come with quantkit",
    )
    max_new_tokens: int = Field(default=64, ge=8, description="tokens of a continuation")
    max_new_loops: Fraction | None = Field(
        default=0.25,
        ge=0,
        le=1,
        description="share of prompts by which more continuations of the artifact loop than of "
        "the baseline; null: no limit",
    )
    max_changed_endings: Fraction | None = Field(
        default=0.5,
        ge=0,
        le=1,
        description="of the prompts after which either model ends by itself, the share by which "
        "ends are more often missing than early, or the reverse; null: no limit",
    )
    max_lost_json: Fraction | None = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of the baseline's valid JSON answers that the artifact does not give; "
        "null: no limit",
    )
    max_special_shift: float | None = Field(
        default=1.5,
        gt=0,
        description="by how many nats a special token may be more or less probable where it "
        "belongs; null: no limit",
    )
    long_sequence_length: int | None = Field(
        default=None,
        ge=16,
        description="tokens of the long windows; null: four times sequence_length, within what "
        "the model and the data allow",
    )
    max_long_ratio: float | None = Field(
        default=8.0,
        gt=0,
        description="KL beyond sequence_length, as a multiple of that within; null: no limit",
    )


MIN_WINDOWS = 8
"""Fewer windows decide nothing: below, an interval says more about chance than about the model."""

_MORE = 4
"""So many times the windows may be measured before the verdict stays INCONCLUSIVE."""


class GateSpec(Spec):
    """On what, and how strictly, the artifact is judged."""

    data: str = Field(description="text, jsonl or parquet file, or a datasets id")
    split: str = Field(default="test", description="split, for a datasets id")
    text_column: str = Field(default="text", description="column that holds the text")
    samples: int = Field(default=128, ge=1, description="number of evaluation windows")
    max_samples: int | None = Field(
        default=None,
        ge=1,
        description="for decoders: windows that are measured at the most while they do not decide; "
        "null: four times samples",
    )
    sequence_length: int = Field(default=512, ge=8, description="tokens of a window")
    seed: int = Field(
        default=0, ge=0, description="seed of the order of windows, and of the bootstrap"
    )
    max_perplexity_increase: Fraction | None = Field(
        default=0.03,
        ge=0,
        description="over the baseline's perplexity; a fraction or 3%; null: no limit",
    )
    max_kl: float | None = Field(
        default=0.05, gt=0, description="mean KL divergence, nats per token; null: no limit"
    )
    min_top1_agreement: Fraction | None = Field(
        default=0.9,
        ge=0,
        le=1,
        description="share of positions with the same top token; null: no limit",
    )
    text_pair_column: str | None = Field(
        default=None, description="for encoders: column of the second text of a pair"
    )
    label_column: str | None = Field(
        default=None,
        description="for encoders: column of the label of a row, or of the similarity of a pair",
    )
    min_cosine: float | None = Field(
        default=0.99,
        ge=-1,
        le=1,
        description="for embeddings: mean cosine of artifact and baseline; null: no limit",
    )
    min_cosine_p1: float | None = Field(
        default=None, ge=-1, le=1, description="for embeddings: 1st percentile of the cosine"
    )
    min_retrieval_overlap: Fraction | None = Field(
        default=0.9,
        ge=0,
        le=1,
        description="for embeddings: share of the top_k nearest texts that stay; null: no limit",
    )
    top_k: int = Field(default=10, ge=1, description="for embeddings: neighbours that are compared")
    min_label_agreement: Fraction | None = Field(
        default=0.97,
        ge=0,
        le=1,
        description="for classifiers: share of rows or tokens with the same label; null: no limit",
    )
    max_metric_drop: Fraction | None = Field(
        default=0.01,
        ge=0,
        le=1,
        description="for encoders with label_column: loss of accuracy, F1 or Spearman correlation, "
        "absolute; null: no limit",
    )
    confidence: float = Field(
        default=0.95, gt=0.5, lt=1, description="of the intervals that decide between PASS and FAIL"
    )
    tasks: tuple[TaskSpec | str, ...] = Field(
        default=(), description="tasks of lm-eval, by name or as records"
    )
    probes: ProbesSpec | None = Field(
        default=ProbesSpec(), description="behaviour beside the baseline's; null: not looked at"
    )
    domain_column: str | None = Field(
        default=None, description="column that names a row's kind of text; each is shown apart"
    )
    weights: Literal["check", "skip"] = Field(
        default="check",
        description="check: each weight is compared with the original's, as `quantkit verify` does",
    )
    reuse_baseline: bool = Field(
        default=True,
        description="keep what the baseline computes, for its next artifact (`quantkit baselines`)",
    )
    runtime: choice_of("runtime", RUNTIMES) = Field(  # type: ignore[valid-type]
        default="auto", description="what loads the artifact; auto: the runtime its format is for"
    )
    tokenizer: Literal["fail", "note"] = Field(
        default="fail",
        description="what follows where the runtime's own tokenizer gives other ids than the "
        "model's; note: for servers that are given token ids",
    )
    python: Mapping[str, str] = Field(default={}, description="runtime -> interpreter that has it")
    timeout_seconds: float = Field(default=3600, gt=0, description="longest silence of a worker")

    @property
    def most_windows(self) -> int:
        """Windows of a decoder that are measured at the most, where the data holds as many."""
        if self.max_samples is not None:
            return self.max_samples
        # Who asks for fewer than can decide wants no verdict.
        return self.samples if self.samples < MIN_WINDOWS else _MORE * self.samples

    @field_validator("max_samples")
    @classmethod
    def _not_fewer(cls, value: int | None, info: ValidationInfo) -> int | None:
        samples = info.data.get("samples")
        if value is not None and samples is not None and value < samples:
            raise PydanticCustomError(
                "max_samples",
                "at least gate.samples is expected, which is {samples}, got {value}",
                {"samples": samples, "value": value},
            )
        return value

    @field_validator("python")
    @classmethod
    def _known_runtimes(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        for name in value:
            if name not in RUNTIMES or name == "auto":
                known = [runtime for runtime in RUNTIMES if runtime != "auto"]
                message = f"runtime {name!r} is unknown{nearest(name, known)}"
                raise PydanticCustomError(
                    "runtime",
                    "{message} (known: {known})",
                    {"message": message, "known": ", ".join(known)},
                )
        return value
