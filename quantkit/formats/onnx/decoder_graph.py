"""The graph of a decoder, as onnxruntime-genai's builder makes it, still without weights.

The builder goes through transformers' modules and makes nodes of them. It is led through a model
whose parameters have shapes and no values: every weight of the graph has a name, and the name says
which tensor of the checkpoint it is.
"""

from __future__ import annotations

import contextlib
import copy
import io
import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import build_unchecked
from quantkit.errors import ArtifactError
from quantkit.formats.onnx.architectures import Architecture


@dataclass(frozen=True)
class WeightSource:
    """What of the checkpoint a weight of the graph holds.

    tensor: full name in the checkpoint. rows: of a fused tensor; None: all. block: index of the
    decoder block; None outside of all. offset: what the builder adds to a norm's weight.
    """

    tensor: str
    rows: slice | None
    block: int | None
    offset: float = 0.0


@dataclass(frozen=True)
class DecoderGraph:
    """A graph and where its weights come from.

    builder: onnxruntime-genai's, which has the graph as `builder.model` and writes
    genai_config.json. config: transformers' config, as the builder was given it.
    """

    builder: Any
    config: Any
    embedding: str
    """Tensor of the checkpoint with the embedding."""
    head: str
    """Tensor of the checkpoint with the output layer; the embedding where they are tied."""
    fused: dict[str, tuple[str, slice]]
    """Module of the graph -> module of the checkpoint and its rows, where modules were split."""


_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.MatMul.weight"
HEAD = "lm_head.weight"
"""Tensor of an output layer of its own."""
_FINAL_NORM = "final_norm_layernorm."

# What the builder was seen to raise on a config that it does not expect.
_FAULTS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)


def build_graph(
    checkpoint: Checkpoint, architecture: Architecture, activations: str
) -> DecoderGraph:
    """Let the builder make the graph.

    Args:
        checkpoint: only its config and the names of its tensors are looked at.
        activations: fp32 or fp16.

    Raises:
        CheckpointError: transformers cannot build the model.
        ArtifactError: the builder refuses the model.
    """
    model = cast(Any, build_unchecked(checkpoint))
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    # The builder leaves out biases of nothing but zeros, which solving may change.
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias = nn.Parameter(torch.ones(module.out_features), requires_grad=False)
    config = _prepare_config(model.config, checkpoint)
    try:
        # It reports its progress on the standard output.
        with contextlib.redirect_stdout(io.StringIO()):
            builder = _make_builder(config, architecture, activations)
            _lead(builder, model)
    except _FAULTS as error:
        raise ArtifactError(
            f"onnxruntime-genai cannot build a graph of {checkpoint.source.name}: {error}"
        ) from error
    if architecture.model_type is not None:
        builder.model_type = architecture.model_type
    builder.model_name_or_path = str(checkpoint.source.folder)
    return DecoderGraph(
        builder=builder,
        config=config,
        embedding=_EMBEDDING,
        head=_EMBEDDING if tied else HEAD,
        fused=_find_fused(builder, checkpoint),
    )


def _prepare_config(config: Any, checkpoint: Checkpoint) -> Any:
    """Copy the config and say what the builder expects where older releases said it."""
    config = copy.deepcopy(config)
    config.architectures = list(checkpoint.config["architectures"])
    ropes = config.rope_parameters
    if "full_attention" in ropes:
        config.rope_local_base_freq = ropes["sliding_attention"]["rope_theta"]
        config.rope_parameters = dict(ropes["full_attention"])
    config.rope_parameters.setdefault("type", config.rope_parameters.get("rope_type"))
    if getattr(config, "layer_types", None) is None:
        # The builder takes layers of no type for such that see everything.
        window = getattr(config, "sliding_window", None)
        kind = "full_attention" if window is None else "sliding_attention"
        config.layer_types = [kind] * config.num_hidden_layers
    return config


def _make_builder(config: Any, architecture: Architecture, activations: str) -> Any:
    import onnx_ir
    from onnxruntime_genai.models import builders

    half = activations == "fp16"
    dtype = onnx_ir.DataType.FLOAT16 if half else onnx_ir.DataType.FLOAT
    options = {
        # Codes are those of single layers.
        "fuse_qkv": False,
        "fuse_qk_norm_gqa": False,
        "shared_embeddings": False,
        # A cache of the window's size can be fed by onnxruntime-genai alone.
        "windowed_kv_cache": False,
    }
    # Grouped attention in float16 is chosen for GPUs only, and CPUs have it too.
    provider = "cuda" if half else "cpu"
    builder = getattr(builders, architecture.builder)(config, dtype, dtype, provider, "", options)
    if builder.embed_attrs["scale"] != 1:
        # The builder rounds it to two decimals.
        builder.embed_attrs["scale"] = float(config.hidden_size) ** 0.5
    return builder


def _lead(builder: Any, model: Any) -> None:
    """Lead the builder through the model, in the order of its own `make_model`.

    That one takes for the head whatever linear layer has as many rows as there are tokens, and
    reads all weights into memory.
    """
    builder.make_inputs_and_outputs()
    builder.weights = model
    builder.make_preprocessing_nodes()
    builder.make_embedding(model.get_input_embeddings().weight)
    builder.layer_id = 0
    for layer in model.model.layers:
        builder.make_layer(builder.layer_id, layer)
        builder.layer_id += 1
    simple = builder.layernorm_attrs["simple"]
    builder.make_layernorm(
        builder.layer_id, model.model.norm, skip=True, simple=simple, location="final_norm"
    )
    builder.make_lm_head(model.get_output_embeddings())
    builder.make_aux_hidden_states()
    builder.make_postprocessing_nodes()
    del builder.weights
    builder.model.graph.sort()


def _find_fused(builder: Any, checkpoint: Checkpoint) -> dict[str, tuple[str, slice]]:
    """Return where in the checkpoint's fused layers the builder's parts are."""
    queries, keys = builder.q_size, builder.kv_size
    hidden = builder.intermediate_size
    found: dict[str, tuple[str, slice]] = {}
    for index in range(builder.num_layers):
        prefix = f"model.layers.{index}"
        parts = {
            "self_attn.qkv_proj": {
                "self_attn.q_proj": slice(0, queries),
                "self_attn.k_proj": slice(queries, queries + keys),
                "self_attn.v_proj": slice(queries + keys, queries + 2 * keys),
            },
            "mlp.gate_up_proj": {
                "mlp.gate_proj": slice(0, hidden),
                "mlp.up_proj": slice(hidden, 2 * hidden),
            },
        }
        for whole, members in parts.items():
            if f"{prefix}.{whole}.weight" in checkpoint.tensors:
                for member, rows in members.items():
                    found[f"{prefix}.{member}"] = (f"{prefix}.{whole}", rows)
    return found


def find_source(graph: DecoderGraph, name: str) -> WeightSource | None:
    """Say what a weight of the graph holds; None for a constant.

    Raises:
        ArtifactError: the builder has a weight that quantkit does not know.
    """
    if name == _EMBEDDING:
        return WeightSource(graph.embedding, None, None)
    if name == _HEAD:
        return WeightSource(graph.head, None, None)
    match = _LAYER.fullmatch(name)
    if match is None:
        if name.startswith(("model.", "lm_head.")):
            raise ArtifactError(f"the graph of onnxruntime-genai has an unknown weight, {name}")
        return None
    index, rest = int(match[1]), match[2]
    norm = "norm" in rest
    offset = float(graph.builder.layernorm_attrs["add_offset"]) if norm else 0.0
    if rest.startswith(_FINAL_NORM):
        return WeightSource("model.norm.weight", None, None, offset)
    # attn.q_proj.MatMul.weight, attn.q_norm.layernorm.weight, input_layernorm.weight
    path = re.sub(r"\.(MatMul|Add|layernorm)\.(weight|bias)$", r".\2", rest)
    path = re.sub(r"^attn\.", "self_attn.", path)
    module, _, leaf = f"model.layers.{index}.{path}".rpartition(".")
    whole, rows = graph.fused.get(module, (module, None))
    return WeightSource(f"{whole}.{leaf}", rows, index, offset)
