"""What INT8 codes of an encoder stand for, computed slowly: rounded inputs times widened codes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.encoders.model import describe_encoder, load_encoder
from quantkit.records.encoders import (
    EncoderInfo,
    EncoderLayer,
    EncoderPlan,
    EncoderTable,
    SolvedEncoder,
)
from tests.encoder_models import write_encoder_checkpoint


@dataclass(frozen=True)
class Encoder:
    """A tiny encoder as the writer gets it."""

    checkpoint: Checkpoint
    info: EncoderInfo
    model: nn.Module


def make_encoder(folder: Path, architecture: str, **settings: Any) -> Encoder:
    """Write and load a random encoder; settings are those of `write_encoder_checkpoint`."""
    write_encoder_checkpoint(folder, architecture, **settings)
    checkpoint = open_checkpoint(resolve_source(str(folder)))
    info = describe_encoder(checkpoint)
    return Encoder(checkpoint, info, load_encoder(checkpoint, info))


def make_plan(encoder: Encoder, precision: str) -> EncoderPlan:
    """A plan as far as the writer reads it."""
    return EncoderPlan(
        model="tiny",
        info=encoder.info,
        groups=(),
        tables=(),
        precision=precision,
        notes=(),
        parameters=sum(each.numel() for each in encoder.model.parameters()),
        baseline_bytes=0,
        artifact_bytes=0,
        bits_per_weight=0.0,
        memory_bytes=0,
        disk_bytes=0,
    )


def round_encoder(encoder: Encoder, *, static: bool = False, smooth: bool = False) -> SolvedEncoder:
    """Round every linear layer of the encoder's blocks and its word table to the nearest codes.

    Layers that read the same input are found by the input itself.
    """
    seen = _record_inputs(encoder)
    groups: dict[int, str] = {}
    layers = []
    for name, inputs in seen.items():
        group = groups.setdefault(id(inputs), name)
        weight = encoder.model.get_submodule(name).weight.data
        smoothing = None
        if smooth:
            smoothing = torch.linspace(0.5, 2.0, weight.shape[1])
            weight, inputs = weight * smoothing, inputs / smoothing
        low, high = min(float(inputs.min()), 0.0), max(float(inputs.max()), 0.0)
        scale = (high - low) / 255
        layers.append(
            EncoderLayer(
                name,
                group,
                *round_rows(weight),
                smoothing=smoothing,
                bias=None,
                input_scale=scale if static else None,
                input_zero_point=round(-low / scale) if static else None,
                clip=(0.8 * low, 0.8 * high) if smooth and not static else None,
            )
        )
    tables = tuple(
        EncoderTable(name, *round_rows(module.weight.data))
        for name, module in encoder.model.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings > 2
    )
    return SolvedEncoder(tuple(layers), tables, (), ())


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes [O, I] and the scales [O]."""
    scale = weight.abs().amax(1) / 127
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def stand_in(encoder: Encoder, solved: SolvedEncoder) -> Encoder:
    """Return the encoder with its weights read back from the codes and its inputs rounded."""
    model = copy.deepcopy(encoder.model)
    for table in solved.tables:
        model.get_submodule(table.name).weight.data = table.scale[:, None] * table.codes.float()
    for layer in solved.layers:
        module = model.get_submodule(layer.name)
        module.weight.data = layer.scale[:, None] * layer.codes.float()
        if layer.bias is not None:
            module.bias = nn.Parameter(layer.bias, requires_grad=False)
        module.register_forward_pre_hook(_rounding(layer))
    return Encoder(encoder.checkpoint, encoder.info, model)


def _rounding(layer: EncoderLayer) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
    """ONNX's DynamicQuantizeLinear, or QuantizeLinear, and back; by its definition."""

    def rounded(_: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
        values = arguments[0]
        if layer.smoothing is not None:
            values = values * (1 / layer.smoothing.double()).float()
        if layer.clip is not None:
            values = values.clamp(*layer.clip)
        low, high = values.min().clamp(max=0), values.max().clamp(min=0)
        scale = (high - low) / 255
        zero_point = (-low / scale).round()
        if layer.input_scale is not None and layer.input_zero_point is not None:
            scale = torch.tensor(layer.input_scale)
            zero_point = torch.tensor(float(layer.input_zero_point))
        codes = ((values / scale).round() + zero_point).clamp(0, 255)
        return (codes - zero_point) * scale

    return rounded


def _record_inputs(encoder: Encoder) -> Mapping[str, Tensor]:
    """Name of a layer of the blocks -> what it read of some random texts."""
    seen: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(3)
    shape = (4, 24)
    batch = {
        "input_ids": torch.randint(5, 600, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
        "token_type_ids": torch.zeros(shape, dtype=torch.int64),
    }

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[name] = arguments[0]

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, module in _linears(encoder.model):
            handle = module.register_forward_pre_hook(record(name))
            stack.callback(handle.remove)
        encoder.model(**{name: batch[name] for name in encoder.info.inputs})
    return seen


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers of the blocks, which are numbered."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split(".")):
            yield name, module
