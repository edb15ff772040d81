"""Encoders: models that turn texts into vectors or labels, and what a job does with one.

Shapes: O output features, I input features, V rows of a table, B bins, S sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quantkit.records.plan import GroupPlan
from quantkit.records.solving import LayerRecord

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Task = Literal["embedding", "sequence-classification", "token-classification"]


@dataclass(frozen=True)
class Pooling:
    """How the vectors of the tokens become one vector of the text."""

    mode: Literal["mean", "cls", "max"]
    normalize: bool
    """Whether the vector is divided by its length."""


@dataclass(frozen=True)
class EncoderInfo:
    """What a checkpoint's files say of an encoder."""

    architecture: str
    """Class in transformers, for instance `BertForSequenceClassification`."""
    task: Task
    pooling: Pooling | None
    """None for classifiers."""
    max_length: int
    """Tokens of the longest text."""
    labels: tuple[str, ...]
    """Empty for embeddings."""
    inputs: tuple[str, ...]
    """What the forward takes, in its order: input_ids, attention_mask, token_type_ids."""
    notes: tuple[str, ...] = ()
    pad_id: int = 0
    """Token that fills up the shorter texts of a batch."""
    multi_label: bool = False
    """Whether a text can have several labels, each with a probability of its own."""


@dataclass(frozen=True)
class TextRows:
    """Texts as token ids, not padded, and what the data says of them.

    ids, type_ids: one list a text, in the order of the data. labels: the class (its name or
    index) or the similarity of a pair. A pair of texts is one row where the model reads both
    (classifiers); for embeddings its two texts are two rows, `pairs` holding their numbers.
    """

    ids: tuple[tuple[int, ...], ...]
    type_ids: tuple[tuple[int, ...], ...]
    labels: tuple[float, ...]
    pairs: tuple[tuple[int, int], ...]
    source: str
    sha256: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncoderPlan:
    """What a job will do with an encoder, known from the config and the headers alone."""

    model: str
    info: EncoderInfo
    groups: tuple[GroupPlan, ...]
    """Linear layers that read the same input, in the order of the forward."""
    tables: tuple[str, ...]
    """Full names of the embedding modules whose rows are stored in int8."""
    precision: str
    """int8, fp16 or fp32."""
    notes: tuple[str, ...]
    parameters: int
    baseline_bytes: int
    artifact_bytes: int
    bits_per_weight: float
    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class InputStats:
    """What calibration knows about the input of a group of an encoder's layers.

    second_moment: float32 [I, I], mean of x x^T over tokens that are not padding. mean, absmax:
    float32 [I]. minimum, maximum: over all channels. counts: int64 [B], a histogram of all values
    over B equal bins from `minimum` to `maximum`. sample: float32 [S, I].
    """

    second_moment: Tensor
    mean: Tensor
    absmax: Tensor
    minimum: float
    maximum: float
    counts: np.ndarray
    sample: Tensor
    tokens: int
    lowest: Tensor | None = None
    """float32 [I], the smallest value of each channel; highest: the largest."""
    highest: Tensor | None = None


@dataclass(frozen=True)
class EncoderLayer:
    """Codes of one linear layer: its weight is `scale * codes / smoothing`.

    codes: int8 [O, I], rounded after the multiplication with `smoothing`. scale: float32 [O].
    smoothing: float32 [I], what the input is divided by before it is rounded to unsigned 8 bits;
    None: nothing. bias: float32 [O], in place of the layer's own; None: that one.
    """

    name: str
    group: str
    """Name of the first layer of its group: layers of a group share input and smoothing."""
    codes: Tensor
    scale: Tensor
    smoothing: Tensor | None
    bias: Tensor | None
    input_scale: float | None
    """For static schemes: a rounded input q stands for `input_scale * (q - input_zero_point)`."""
    input_zero_point: int | None
    """In [0, 255]."""
    clip: tuple[float, float] | None = None
    """For dynamic schemes: what the divided input is bounded to before it is rounded, so that a
    token unlike all others, or padding, does not take the precision of the rest; None: nothing."""


@dataclass(frozen=True)
class EncoderTable:
    """Codes of an embedding: row v is `scale[v] * codes[v]`. codes: int8 [V, I]; scale: [V]."""

    name: str
    codes: Tensor
    scale: Tensor


@dataclass(frozen=True)
class SolvedEncoder:
    """All that the graph needs besides the checkpoint."""

    layers: tuple[EncoderLayer, ...]
    """Those that are quantized; others stay in float."""
    tables: tuple[EncoderTable, ...]
    records: tuple[LayerRecord, ...]
    float_layers: tuple[str, ...]
    """Layers that the scheme would round and that measured too sensitive."""
    notes: tuple[str, ...] = ()
