"""The frozen records that travel from stage to stage.

Records carry data and no behaviour. Tensor shapes are given with these letters: O output
features, I input features, G groups along I, N windows, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quantkit.schemes import Method, Scheme

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "UNJUDGED"]

EXIT_CODES: Mapping[Verdict, int] = {"PASS": 0, "UNJUDGED": 0, "FAIL": 3, "INCONCLUSIVE": 4}


@dataclass(frozen=True)
class Event:
    """One step of progress: `done` of `total` in `stage`, with a word about it."""

    stage: str
    done: int
    total: int
    message: str = ""


Progress = Callable[[Event], None]
"""What long work calls after each step; the caller decides how it looks."""


# --- checkpoint -------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `size` bytes from byte `start` of `file`."""

    name: str
    dtype: str
    """safetensors' name of the dtype: BF16, F16, F32, ..."""
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


@dataclass(frozen=True)
class Source:
    """A checkpoint on this disk and where it came from."""

    name: str
    """What the user wrote: a folder, a Hub id or id@revision."""
    folder: Path
    revision: str | None
    """The commit on the Hub; None for a plain folder."""


# --- plan -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearPlan:
    """One linear layer and what will be done to it."""

    name: str
    """Full module name, for instance `model.layers.0.self_attn.q_proj`."""
    out_features: int
    in_features: int
    has_bias: bool
    scheme: Scheme
    group_size: int | None
    """Columns that share a scale; None: one scale per output row."""
    method: Method

    @property
    def quantized(self) -> bool:
        """Whether the layer gets integer codes."""
        return self.scheme.weight_kind != "none"


@dataclass(frozen=True)
class FoldPlan:
    """The operation in front of an input group, into which a scale per channel can be folded."""

    module: str
    """Full name of a norm or of a linear layer of the same block."""
    kind: Literal["norm", "linear"]
    repeat: int = 1
    """Query heads per key/value head, where the fold crosses grouped attention (v_proj, o_proj)."""
    head_dim: int = 0
    """Channels of one head; only read where `repeat` is more than 1."""


@dataclass(frozen=True)
class GroupPlan:
    """Linear layers that read the same input: one second moment serves them all."""

    linears: tuple[LinearPlan, ...]
    fold: FoldPlan | None

    @property
    def quantized(self) -> bool:
        """Whether any of its layers gets integer codes."""
        return any(linear.quantized for linear in self.linears)


@dataclass(frozen=True)
class BlockPlan:
    """One decoder block: its groups in the order in which the forward reaches them."""

    index: int
    prefix: str
    """Full module name, for instance `model.layers.0`."""
    groups: tuple[GroupPlan, ...]


@dataclass(frozen=True)
class Plan:
    """What a job will do, known from the config and the headers alone."""

    model: str
    family: str
    """Name of the family data file, or `structural` for the fallback."""
    blocks: tuple[BlockPlan, ...]
    notes: tuple[str, ...]
    """What the user should know: layers left alone, kernels a runtime lacks, choices made."""
    scale_dtype: str
    """torch name of the dtype of scales: the one in the checkpoint's config."""
    parameters: int
    """Weights of the checkpoint, tied ones counted once."""
    baseline_bytes: int
    artifact_bytes: int
    """Predicted bytes of all tensors of the artifact."""
    bits_per_weight: float
    """8 * artifact_bytes / parameters."""
    block_bytes: int
    """The largest block's weights as the walk holds them (float32)."""
    activation_bytes: int
    """What the suspended forwards hold at the most."""
    statistics_bytes: int
    """The largest second moment and the solver's working copies."""
    disk_bytes: int
    """Free space that the job needs at the output: workspace and artifact together."""


# --- calibration ------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenWindows:
    """Windows of token ids, and which of their tokens count.

    ids: int64 [N, T]. weights: float32 [N, T], 0 where a token must not count (for instance
    outside of assistant turns), else 1.
    """

    ids: np.ndarray
    weights: np.ndarray
    source: str
    sha256: str
    """Hash of the ids, the weights and the shape: same hash, same calibration."""
    notes: tuple[str, ...] = ()
    """What the data doctor found and did not refuse."""


@dataclass(frozen=True)
class LayerStats:
    """What calibration knows about one input.

    second_moment: float32 [I, I], the mean over tokens of x x^T (weighted by the token weights).
    """

    second_moment: Tensor
    tokens: int
    """Tokens that counted."""


# --- solving ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizedLayer:
    """Codes, scales and zero points of one linear layer, in compressed-tensors' signed convention.

    codes: int8 [O, I]; scale: [O, G] in the artifact's scale dtype (already rounded to it);
    zero_point: int8 [O, G], or None for symmetric schemes. The weight is
    `scale * (codes - zero_point)` with each group's scale repeated along its columns.
    """

    name: str
    scheme: Scheme
    group_size: int | None
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


@dataclass(frozen=True)
class LayerRecord:
    """How well one layer was solved; goes into evidence and reports."""

    name: str
    scheme: str
    group_size: int | None
    method: str
    bits_per_weight: float
    relative_error: float | None
    """tr(dW H dW^T) / tr(W H W^T): squared output error relative to the output, on the calibration
    tokens; None where no statistics were taken."""
    rtn_relative_error: float | None
    """The same for plain rounding of the untransformed weight, to compare with."""
    weight_error: float
    """||dW||^2 / ||W||^2."""
    damping: float | None = None
    """Fraction of mean(diag H) that was added before the inversion; None without an inversion."""
    awq_exponent: float | None = None
    """Exponent that the grid chose; None where no scale was folded."""
    fallback: str | None = None
    """Why the layer got something other than what was asked for, for instance `rtn: ...`."""


@dataclass(frozen=True)
class SolvedBlock:
    """All that the artifact needs of one block.

    dense: full tensor name -> tensor, for tensors that changed without being quantized (a folded
    norm or bias). Every other tensor is copied from the checkpoint.
    """

    index: int
    layers: tuple[QuantizedLayer, ...]
    dense: Mapping[str, Tensor]
    records: tuple[LayerRecord, ...]
    replay: Mapping[str, Tensor] = field(default_factory=dict)
    """What the walk needs beside the codes to take this block's place in a resumed forward:
    `fold:<layer>` [I], the scale that was folded out of the input of the group that begins with the
    layer; `scale:<layer>` [O, G], a layer's scale before a later fold divided it."""


# --- artifact ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artifact:
    """A written artifact: `folder` holds `files`, whose hashes were taken as they were written."""

    name: str
    format: str
    folder: Path
    files: Mapping[str, str]
    """Path relative to `folder` -> sha256."""
    tensor_bytes: int
    bits_per_weight: float


# --- gate -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalResult:
    """Baseline and candidate on the same windows. One number a window, unrounded.

    nll: mean negative log-likelihood of the next token, in nats. kl: mean of
    KL(baseline || candidate) over positions, in nats. agreement: share of positions with the same
    most probable token.
    """

    runtime: str
    tokens: int
    """Positions scored, over all windows."""
    baseline_nll: tuple[float, ...]
    candidate_nll: tuple[float, ...]
    kl: tuple[float, ...]
    agreement: tuple[float, ...]
    kl_p99: float
    """99th percentile of KL over positions."""
    kl_max: float
    finite: bool
    """False where either model gave a NaN or an infinity."""
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    suspicions: tuple[str, ...] = ()
    """What the runtime showed besides numbers and fails on its own; one sentence each."""


@dataclass(frozen=True)
class Check:
    """One limit, the measured value with its interval, and what follows."""

    name: str
    limit: float
    value: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True)
class Metric:
    """A measured value with its confidence interval and, where it has one, the baseline's."""

    value: float
    low: float
    high: float
    baseline: float | None = None
    increase: float | None = None
    """Relative increase over the baseline; `low` and `high` then bound the increase."""
    p99: float | None = None
    maximum: float | None = None


@dataclass(frozen=True)
class Judgement:
    """The gate's answer on one artifact."""

    verdict: Verdict
    checks: tuple[Check, ...]
    reasons: tuple[str, ...]
    perplexity: Metric | None
    kl: Metric | None
    top1_agreement: Metric | None
    confidence: float
    windows: int
    measured_with: Mapping[str, str] = field(default_factory=dict)
    """Packages, dtype and device of the runtime, as `EvalResult.versions` has them."""


# --- report -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArtifactReport:
    """One row of a report."""

    name: str
    path: str
    format: str
    scheme: str
    size_bytes: int
    """Bytes of all tensors, as docs/gate.md defines size."""
    bits_per_weight: float
    runtime: str
    judgement: Judgement


@dataclass(frozen=True)
class Report:
    """What a job or a gate found; every renderer reads this and nothing else."""

    model: str
    baseline_bytes: int
    artifacts: tuple[ArtifactReport, ...]
    verdict: Verdict
    layers: tuple[LayerRecord, ...]
    notes: tuple[str, ...]
    evidence: Mapping[str, Any]
    """JSON-ready: recipe, versions, hashes, calibration and evaluation data, timings."""


@dataclass(frozen=True)
class Result:
    """What `quantkit.quantize` returns."""

    output: Path
    verdict: Verdict
    plan: Plan
    artifacts: tuple[Artifact, ...]
    report: Report

    @property
    def exit_code(self) -> int:
        """The exit code that the command line gives for this verdict."""
        return EXIT_CODES[self.verdict]
