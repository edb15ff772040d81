"""Which linear layers of an encoder read the same input, from one forward of a model of zeros."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import summarize_names
from quantkit.checkpoint.trace import InputGroup, InputKey, record_calls
from quantkit.encoders.architectures import EncoderFamily
from quantkit.encoders.model import build_encoder, find_family, tensor_names
from quantkit.errors import CheckpointError
from quantkit.records.encoders import EncoderInfo

_TRACED_TOKENS = 4


@dataclass(frozen=True)
class EncoderStructure:
    """What an encoder is made of.

    shapes: [O, I] of each linear layer, and [V, H] of each embedding, by full name. biased: linear
    layers with a bias. groups: linear layers that read the same input, in the order of the
    forward. tables: embeddings with a row for each token or position. others: linear layers that
    stay in float, as those of a classifier. tensors: parameter of the model -> tensor of the
    checkpoint. constant_bytes: of what a graph holds besides weights.
    """

    shapes: dict[str, tuple[int, int]]
    biased: frozenset[str]
    groups: tuple[InputGroup, ...]
    tables: tuple[str, ...]
    others: tuple[str, ...]
    tensors: dict[str, str]
    constant_bytes: int
    notes: tuple[str, ...]


def find_structure(checkpoint: Checkpoint, info: EncoderInfo) -> EncoderStructure:
    """Find the linear layers of an encoder that share an input, and its embeddings.

    No weight is read; the headers are compared with the model.

    Raises:
        CheckpointError: a tensor is missing or does not fit, or the model cannot be traced.
    """
    family = find_family(info)
    model = build_encoder(checkpoint, info)
    tensors = dict(tensor_names(checkpoint, info, model))
    base = "" if info.task == "embedding" else f"{family.base}."
    linears = dict(_find_modules(model, nn.Linear))
    embeddings = dict(_find_modules(model, nn.Embedding))
    groups = tuple(_trace_groups(checkpoint, info, model, f"{base}{family.layers}."))
    planned = {name for group in groups for name in group.linears}
    others = tuple(name for name in linears if name not in planned)
    weights = {**linears, **embeddings}
    return EncoderStructure(
        shapes={name: _shape(module) for name, module in weights.items()},
        biased=frozenset(name for name, module in linears.items() if module.bias is not None),
        groups=groups,
        tables=tuple(f"{base}{leaf}" for leaf in family.tables),
        others=others,
        tensors=tensors,
        constant_bytes=_count_constants(model, family),
        notes=tuple(_note_left_alone(checkpoint, others, tensors.values())),
    )


def _find_modules(model: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kind))


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.get_parameter("weight").shape
    return rows, columns


def _count_constants(model: nn.Module, family: EncoderFamily) -> int:
    """Bytes of the numbers of positions, or where these depend on the text of its types."""
    kind = "token_type_ids" if family.padded_positions else "position_ids"
    return sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith(kind))


def _trace_groups(
    checkpoint: Checkpoint, info: EncoderInfo, model: nn.Module, inside: str
) -> Iterator[InputGroup]:
    """Yield the groups within the layers of the encoder; the model is spent afterwards."""
    tokens = torch.zeros((1, _TRACED_TOKENS), dtype=torch.int64)
    inputs = {name: torch.ones_like(tokens) if "mask" in name else tokens for name in info.inputs}
    try:
        calls = record_calls(model, inputs)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.source.name}: {error}") from error.__cause__
    groups: dict[InputKey, list[str]] = {}
    for name, key in calls.items():
        if key is not None and name.startswith(inside):
            groups.setdefault(key, []).append(name)
    for names in groups.values():
        yield InputGroup(tuple(names), None)


def _note_left_alone(
    checkpoint: Checkpoint, others: Sequence[str], used: Collection[str]
) -> Iterator[str]:
    """Say which weights are not quantized or not taken over: nothing is left out silently."""
    if others:
        names = ", ".join(summarize_names(others))
        yield f"left in float: {names} (outside of the encoder's layers)"
    unknown = sorted(checkpoint.tensors.keys() - set(used))
    if unknown:
        names = ", ".join(summarize_names(unknown)[:3])
        yield (
            f"{len(unknown)} tensors of the checkpoint have no place in the encoder and are left "
            f"out: {names}"
        )
