"""Checkpoints as they lie on the disk, and what a job will do with one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from quantkit.ggml_types import GGML_TYPES
from quantkit.records.predicting import Prediction
from quantkit.schemes import EFFORTS, Effort, Method, Scheme


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


IN_MEMORY = "in memory: "
"""What the name of a source begins with that is a model which was in memory."""


@dataclass(frozen=True)
class Source:
    """A checkpoint on this disk and where it came from."""

    name: str
    """What the user wrote: a folder, a Hub id or id@revision."""
    folder: Path
    revision: str | None
    """The commit on the Hub; None for a plain folder."""
    loaded_from: str | None = None
    """Of a model that was in memory: the Hub id of what it was loaded from; its weights may differ.
    """


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
    """Columns that share a scale; None: the scheme's granularity says what does."""
    method: Method
    effort: Effort = EFFORTS["normal"]
    ggml_types: tuple[str, ...] = ()
    """Type of its weight in each GGUF file of the job, in their order."""
    one_scale: bool = False
    """Whether all of its rows, and those of the layers that share its input, have the same scale.
    """

    @property
    def quantized(self) -> bool:
        """Whether the layer gets codes under its scheme."""
        return self.scheme.weight_kind != "none"

    @property
    def encoded(self) -> bool:
        """Whether the layer gets codes in a GGUF file."""
        return any(GGML_TYPES[name].quantized for name in self.ggml_types)

    @property
    def solved(self) -> bool:
        """Whether the layer gets codes at all."""
        return self.quantized or self.encoded

    @property
    def needs_statistics(self) -> bool:
        """Whether its method looks at statistics, or its scheme stores a scale of its input."""
        return (self.solved and self.method.needs_calibration) or (
            self.quantized and self.scheme.static
        )

    @property
    def needs_sample(self) -> bool:
        """Whether it looks at single tokens: at how inputs are rounded, and how far they drift."""
        if not self.needs_statistics:
            return False
        rounded = self.encoded or self.scheme.activations is not None
        own = self.method.rounder == "custom" or self.method.transform == "smoothquant"
        return rounded or own or self.looks_at_whole_model

    @property
    def looks_at_whole_model(self) -> bool:
        """Whether it is rounded by what its output means to the whole model."""
        if self.method.rounder == "custom":
            return False
        return self.solved and self.effort.whole_model and self.method.needs_calibration


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
        """Whether any of its layers gets codes under a scheme."""
        return any(linear.quantized for linear in self.linears)

    @property
    def solved(self) -> bool:
        """Whether any of its layers gets codes at all."""
        return any(linear.solved for linear in self.linears)

    @property
    def needs_sample(self) -> bool:
        """Whether any of its layers looks at single tokens of the input."""
        return any(linear.needs_sample for linear in self.linears)


@dataclass(frozen=True)
class BlockPlan:
    """One decoder block: its groups in the order in which the forward reaches them."""

    index: int
    prefix: str
    """Full module name, for instance `model.layers.0`."""
    groups: tuple[GroupPlan, ...]

    @property
    def linears(self) -> tuple[LinearPlan, ...]:
        """Its linear layers, in the order of the groups."""
        return tuple(linear for group in self.groups for linear in group.linears)

    @property
    def looks_at_whole_model(self) -> bool:
        """Whether any of its layers is rounded for the whole model's sake."""
        return any(linear.looks_at_whole_model for linear in self.linears)


@dataclass(frozen=True)
class KvCachePlan:
    """Which attention layers get scales for an FP8 key/value cache."""

    per_head: bool
    """One scale a key/value head; otherwise one for K and one for V a layer."""
    attentions: tuple[str, ...]
    """Full names of the attention modules, one a block, for instance `model.layers.0.self_attn`."""
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Candidate:
    """A scheme, or a type in a GGUF file, that a unit can have: its layers under it, and the bytes
    of the weights."""

    linears: tuple[LinearPlan, ...]
    size_bytes: int

    @property
    def scheme(self) -> str:
        """The scheme or the type that all layers of the unit share."""
        linear = self.linears[0]
        return linear.ggml_types[0] if linear.ggml_types else linear.scheme.name

    @property
    def solved(self) -> bool:
        """Whether its layers get codes."""
        return self.linears[0].solved


@dataclass(frozen=True)
class OpenUnit:
    """Layers that must share a scheme, and what fits them of what the recipe lists."""

    block: int
    """Index of the decoder block."""
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class OpenChoice:
    """What `scheme: auto` or `type: auto` leaves open until the sensitivity of the layers is
    measured."""

    units: tuple[OpenUnit, ...]
    target_bits: float | None
    max_kl: float | None
    fixed_bytes: int
    """Bytes of the artifact's tensors besides the weights of the units."""
    lowest_bits: float
    """Bits per weight of the artifact if every unit had its smallest candidate."""
    highest_bits: float
    windows: int
    """Calibration windows on which sensitivity is measured."""
    window_tokens: int
    """Tokens of one of them: they may be cut short."""
    passes: tuple[tuple[int, int], ...]
    """The first block and the one behind the last that each pass over the weights measures: with
    more than one pass the hidden states fit into memory."""
    memory_bytes: int
    """What the measurement holds besides one block: hidden states, statistics, the head."""


@dataclass(frozen=True)
class UnitCost:
    """What one unit of layers would cost under one scheme or type.

    kl: nats per token that the unit alone adds when only it is quantized so. size_bytes: of all
    its tensors.
    """

    scheme: str
    kl: float
    size_bytes: int


@dataclass(frozen=True)
class AllocatedUnit:
    """Layers that must share a scheme, what each scheme would cost, and the one chosen."""

    layers: tuple[str, ...]
    costs: tuple[UnitCost, ...]
    chosen: str


@dataclass(frozen=True)
class Allocation:
    """Schemes or types chosen per layer from measured sensitivity: what `auto` stands for."""

    units: tuple[AllocatedUnit, ...]
    tokens: int
    """Calibration tokens on which the divergences were measured."""
    target_bits: float | None
    max_kl: float | None
    predicted_kl: float
    """Sum of the chosen costs: divergences of single units add up to first order."""
    predicted_bits: float


@dataclass(frozen=True)
class GgufPlan:
    """One GGUF file of a job."""

    type: str
    """Name of its mix of types, for instance Q4_K_M; or auto."""
    types: Mapping[str, str]
    """Name of each tensor in the file -> its type."""
    weights: Mapping[str, str]
    """Name of each tensor of the checkpoint -> its type in the file."""
    tensor_bytes: int
    notes: tuple[str, ...] = ()
    """What has another type than the mix says, and why."""
    pre_tokenizer: str | None = None
    """llama.cpp's name of the pre-tokenizer, where the recipe says it."""
    candidates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name of each tensor of the checkpoint whose type is still to be chosen -> the types that fit
    it. Until then it stands in `types` and `weights` with the smallest."""


@dataclass(frozen=True)
class OnnxPlan:
    """One ONNX graph of a decoder."""

    precision: str
    """int4, int8, fp16 or fp32."""
    quantized: bool
    """Whether the codes of the schemes go in; otherwise all weights stay in float."""
    activations: str
    """fp32 or fp16."""
    accuracy_level: int
    embeddings: str
    """float, int8 or int4."""
    lm_head: str
    tensor_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModeloptPlan:
    """The artifact in ModelOpt's layout."""

    algorithm: str
    """TensorRT-LLM's name of how all quantized layers are stored, for instance FP8."""
    tensor_bytes: int


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
    kv_cache: KvCachePlan | None = None
    """None: the key/value cache stays in 16 bits."""
    allocation: Allocation | None = None
    """Why each layer has its scheme, where the recipe left the choice open."""
    choice: OpenChoice | None = None
    """What is still to be chosen. Until then such layers stand in `blocks` with their smallest
    candidate, and sizes are the largest that the job can come to."""

    gguf: tuple[GgufPlan, ...] = ()
    """The GGUF files to be written, in the order of the recipe."""
    onnx: tuple[OnnxPlan, ...] = ()
    """The ONNX graphs to be written, in the order of the recipe."""
    modelopt: ModeloptPlan | None = None
    """None: nothing is written in ModelOpt's layout."""
    gguf_leads: bool = False
    """Whether the walk goes on with the weights of the first GGUF file; otherwise with those of the
    schemes, and GGUF files are solved from the same statistics."""
    prediction: Prediction | None = field(default=None, compare=False)
    """What it is expected to take on this machine; None where nothing was measured."""

    @property
    def linears(self) -> tuple[LinearPlan, ...]:
        """The linear layers of all blocks, in their order."""
        return tuple(linear for block in self.blocks for linear in block.linears)
