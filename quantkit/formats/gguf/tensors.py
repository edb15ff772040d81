"""Which tensors of a checkpoint a GGUF file holds, under which names and in which order of rows.

Names: gguf-py's tensor_mapping.py in llama.cpp (commit 0c1e570). What is done to values:
conversion/*.py there. The rows of Llama's queries and keys are dealt out anew, since llama.cpp
turns neighbouring channels of a head where transformers turns the two halves; Gemma's norms get the
one added that transformers adds while it computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import summarize_names
from quantkit.errors import CheckpointError
from quantkit.formats.gguf.architecture import Architecture
from quantkit.formats.passthrough import is_same

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_NORM_BEFORE_MLP = {"post_attention_layernorm": "ffn_norm"}
_NORMS_AROUND_MLP = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}

_BLOCKS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "llama": _ATTENTION | _NORM_BEFORE_MLP | _MLP,
        "qwen2": _ATTENTION | _NORM_BEFORE_MLP | _MLP,
        "qwen3": _ATTENTION | _HEAD_NORMS | _NORM_BEFORE_MLP | _MLP,
        "gemma2": _ATTENTION | _NORMS_AROUND_MLP | _MLP,
        "gemma3": _ATTENTION | _HEAD_NORMS | _NORMS_AROUND_MLP | _MLP,
        "phi3": {
            "input_layernorm": "attn_norm",
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
    }
)
"""Architecture -> name of a layer within a block -> its name in the file; in the file's order."""

_QKV = ("attn_q", "attn_k", "attn_v")
_BIASES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "llama": frozenset({*_QKV, "attn_output", *_MLP.values()}),
        "qwen2": frozenset(_QKV),
        "qwen3": frozenset(_QKV),
    }
)
"""Layers whose bias llama.cpp adds, where there is one."""

ROLES = frozenset({*_QKV, "attn_qkv", "attn_output", *_MLP.values(), "token_embd", "output"})
"""What the mixes of types tell apart; every other tensor is `other`."""

_ADDED_TO_NORMS: Mapping[str, float] = MappingProxyType({"gemma2": 1.0, "gemma3": 1.0})
_HEAD_IS_EMBEDDING = frozenset({"gemma2"})
"""Where llama.cpp has no place for an output layer of its own."""
_DERIVED = ".rotary_emb.inv_freq"
"""A buffer that old checkpoints store; it follows from the config."""
_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file and how it comes from the checkpoint."""

    name: str
    source: str | None
    """Its name in the checkpoint; None: it is made of `values`."""
    shape: tuple[int, ...]
    """In Hugging Face's order, columns last; the same in the checkpoint and in the file."""
    role: str = "other"
    """One of `ROLES`, or `other`."""
    block: int | None = None
    heads: int | None = None
    """Rows are dealt out anew within each of so many heads (`order_rows`); None: as they are."""
    added: float = 0.0
    """What is added to every value."""
    values: tuple[float, ...] | None = None

    @property
    def quantizable(self) -> bool:
        """Whether it may have any type; the others stay in float32, as llama.cpp wants them."""
        return len(self.shape) > 1 and self.name.endswith(".weight")

    @property
    def parameters(self) -> int:
        """Its number of weights."""
        return math.prod(self.shape)


def lay_out_tensors(checkpoint: Checkpoint, architecture: Architecture) -> tuple[GgufTensor, ...]:
    """Return every tensor of the GGUF file of a checkpoint, in the order of the file.

    Weights are read only where the output layer is stored although the config ties it to the
    embedding: equal ones are one tensor in the file.

    Raises:
        CheckpointError: a tensor is missing, has no place in llama.cpp, or does not have the shape
            or dtype that it must have.
    """
    tensors = [
        _take(checkpoint, "token_embd", _EMBEDDING),
        *_make_rope_tensors(architecture),
    ]
    for block in range(architecture.blocks):
        tensors += _lay_out_block(checkpoint, architecture, block)
    tensors.append(_take(checkpoint, "output_norm", _NORM, added=_added(architecture)))
    tied = _is_tied(checkpoint, architecture)
    if not tied:
        tensors.append(_take(checkpoint, "output", _HEAD))
    _check_names(checkpoint, architecture, tensors, tied)
    for tensor in tensors:
        _check_tensor(checkpoint, architecture, tensor)
    return tuple(tensors)


def order_rows(rows: int, heads: int) -> NDArray[np.intp]:
    """Return [rows]: row i of the file is row `order[i]` of the checkpoint.

    Within a head, transformers turns channel i with channel i + half, llama.cpp channel 2 i with
    channel 2 i + 1 (conversion/llama.py, `permute`).
    """
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(rows)


def permute_rows(tensor: GgufTensor, rows: Tensor) -> Tensor:
    """Bring [R, ...] from the order of the checkpoint into that of the file, packed or not."""
    if tensor.heads is None:
        return rows
    return rows[torch.from_numpy(order_rows(len(rows), tensor.heads))]


def make_values(tensor: GgufTensor, weight: Tensor | None) -> Tensor:
    """Return the float32 values of a tensor as the file holds them before they get their type.

    Args:
        weight: what `tensor.source` names in the checkpoint; None where it names nothing.
    """
    if tensor.values is not None:
        return torch.tensor(tensor.values, dtype=torch.float32)
    if weight is None:
        raise ValueError(f"{tensor.name} is made of {tensor.source}, which is not given")
    values = weight.to(torch.float32)
    return permute_rows(tensor, values + tensor.added if tensor.added else values)


def _lay_out_block(
    checkpoint: Checkpoint, architecture: Architecture, block: int
) -> Iterator[GgufTensor]:
    permuted = {"attn_q": architecture.heads, "attn_k": architecture.key_value_heads}
    for module, stem in _BLOCKS[architecture.name].items():
        heads = permuted.get(stem) if architecture.name == "llama" else None
        added = _added(architecture) if stem.endswith("norm") else 0.0
        source = f"model.layers.{block}.{module}"
        for kind in ("weight", "bias"):
            if kind == "bias" and (
                stem not in _BIASES.get(architecture.name, ())
                or f"{source}.bias" not in checkpoint.tensors
            ):
                continue
            yield _take(checkpoint, stem, f"{source}.{kind}", block=block, heads=heads, added=added)


def _take(
    checkpoint: Checkpoint,
    stem: str,
    source: str,
    *,
    block: int | None = None,
    heads: int | None = None,
    added: float = 0.0,
) -> GgufTensor:
    """Describe a tensor of the checkpoint; its shape is empty where it is missing."""
    prefix = "" if block is None else f"blk.{block}."
    kind = source.rpartition(".")[2]
    info = checkpoint.tensors.get(source)
    return GgufTensor(
        name=f"{prefix}{stem}.{kind}",
        source=source,
        shape=() if info is None else info.shape,
        role=stem if stem in ROLES and kind == "weight" else "other",
        block=block,
        heads=heads,
        added=added,
    )


def _added(architecture: Architecture) -> float:
    return _ADDED_TO_NORMS.get(architecture.name, 0.0)


def _is_tied(checkpoint: Checkpoint, architecture: Architecture) -> bool:
    """Say whether the output layer is the embedding.

    Raises:
        CheckpointError: it is another tensor and llama.cpp has no place for it.
    """
    if not architecture.config.get("tie_word_embeddings"):
        tied = False
    elif _HEAD not in checkpoint.tensors:
        return True
    else:
        tied = _EMBEDDING in checkpoint.tensors and is_same(checkpoint, _HEAD, _EMBEDDING)
    if not tied and architecture.name in _HEAD_IS_EMBEDDING:
        raise CheckpointError(
            f"{checkpoint.source.name}: llama.cpp has no output layer of its own for "
            f"{architecture.name}: {_HEAD} must be the same as {_EMBEDDING}"
        )
    return tied


def _check_names(
    checkpoint: Checkpoint, architecture: Architecture, tensors: list[GgufTensor], tied: bool
) -> None:
    """Refuse a checkpoint that lacks a tensor or has one that the file would not hold."""
    name, present = checkpoint.source.name, checkpoint.tensors
    taken = {tensor.source for tensor in tensors if tensor.source is not None}
    if missing := sorted(taken - present.keys()):
        raise CheckpointError(
            f"{name} lacks tensors that a GGUF file of {architecture.name} must have: "
            f"{', '.join(summarize_names(missing))}"
        )
    if tied:
        taken.add(_HEAD)
    over = sorted(source for source in present.keys() - taken if not source.endswith(_DERIVED))
    if over:
        raise CheckpointError(
            f"{name} has tensors without a place in a GGUF file of {architecture.name}: "
            f"{', '.join(summarize_names(over))}; such models are not built"
        )


def _check_tensor(checkpoint: Checkpoint, architecture: Architecture, tensor: GgufTensor) -> None:
    """Refuse a tensor with another dtype or shape than llama.cpp expects."""
    if tensor.source is None:
        return
    dtype, shape = checkpoint.tensors[tensor.source].dtype, tensor.shape
    vocabulary = architecture.config["vocab_size"]
    fault = None
    if dtype not in _DTYPES:
        fault = f"is {dtype}: GGUF files are made of 16-bit or 32-bit checkpoints"
    elif len(shape) != (1 if tensor.role == "other" else 2):
        fault = f"has the shape {shape}, which is not that of its place ({tensor.name})"
    elif tensor.heads is not None and shape[0] != tensor.heads * architecture.head_dim:
        fault = f"has {shape[0]} rows for {tensor.heads} heads of {architecture.head_dim}"
    elif tensor.role in ("token_embd", "output") and shape[0] != vocabulary:
        fault = f"has {shape[0]} rows, vocab_size is {vocabulary}"
    if fault is not None:
        raise CheckpointError(f"{checkpoint.source.name}: tensor {tensor.source} {fault}")


def _make_rope_tensors(architecture: Architecture) -> Iterator[GgufTensor]:
    rope = architecture.rope
    if rope["rope_type"] == "llama3":
        yield _make("rope_freqs.weight", _stretch_llama3(architecture))
    if rope["rope_type"] == "longrope":
        for kind in ("long", "short"):
            factors = torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
            yield _make(f"rope_factors_{kind}.weight", factors)


def _make(name: str, values: Tensor) -> GgufTensor:
    return GgufTensor(name, None, tuple(values.shape), values=tuple(values.tolist()))


def _stretch_llama3(architecture: Architecture) -> Tensor:
    """By what Llama 3 divides the frequency of each pair of channels: float32 [head_dim / 2].

    Fast frequencies stay, slow ones are divided by the factor, and those between go from one to
    the other (modeling_rope_utils.py of transformers). In float32, as llama.cpp's converter does.
    """
    rope, dim = architecture.rope, architecture.head_dim
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factor, context = float(rope["factor"]), architecture.original_context
    powers = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    waves = 2 * math.pi / (1.0 / (float(rope["rope_theta"]) ** powers))
    smooth = (context / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    slow = torch.where(waves > context / low, torch.full_like(waves, factor), between)
    return torch.where(waves < context / high, torch.ones_like(waves), slow)


def name_block_tensors(architecture: str) -> tuple[frozenset[str], frozenset[str]] | None:
    """Return the tensors of a block as they are called behind `blk.N.`.

    Args:
        architecture: `general.architecture` of a file.

    Returns:
        Those that must be there, and the biases that may be; None for an architecture that is not
        built.
    """
    stems = _BLOCKS.get(architecture)
    if stems is None:
        return None
    biases = _BIASES.get(architecture, frozenset())
    return (
        frozenset(f"{stem}.weight" for stem in stems.values()),
        frozenset(f"{stem}.bias" for stem in biases),
    )
