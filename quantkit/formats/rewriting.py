"""Quantized checkpoints written anew: as the weights they stand for, or as compressed-tensors.

Nothing is rounded on the way to compressed-tensors: codes, scales and zero points are the stored
ones. As in every writer, names, dtypes and shapes follow from the headers, and one layer at a time
is read and streamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.headers import ITEM_BYTES, WEIGHT_DTYPES
from quantkit.checkpoint.reader import DTYPES, Checkpoint
from quantkit.errors import ArtifactError, writing
from quantkit.formats.encoding import encode_part, specify_layer
from quantkit.formats.passthrough import read_content
from quantkit.formats.quantization_config import build_quantization_config
from quantkit.formats.readers.fitting import Fit, and_more, fit_model
from quantkit.formats.readers.gptq import is_reordered
from quantkit.formats.readers.layers import StoredLayer, as_quantized_layer, scheme_of
from quantkit.formats.readers.stored import StoredModel, read_codes, read_weight
from quantkit.formats.shards import Content, TensorSpec, write_document, write_shards
from quantkit.formats.sidecars import copy_side_files
from quantkit.records import Artifact, Event, LinearPlan, Progress
from quantkit.schemes import METHODS

PLAIN, REPACKED = "safetensors", "compressed-tensors"

_HALVES = MappingProxyType({"F16": "float16", "BF16": "bfloat16"})


@dataclass(frozen=True)
class Rewriting:
    """What will be written, known before any weight is read."""

    model: StoredModel
    format: str
    config: Mapping[str, Any]
    copied: tuple[TensorSpec, ...]
    """Tensors that go over as they are."""
    layers: Mapping[str, tuple[TensorSpec, ...]]
    """Quantized layer -> the tensors that it becomes."""
    notes: tuple[str, ...]
    """What is not as one might think."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Every tensor, in the order in which they are written."""
        return (*self.copied, *(spec for specs in self.layers.values() for spec in specs))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.size for spec in self.specs)


def plan_weights(model: StoredModel, dtype: str | None = None) -> Rewriting:
    """Plan a plain checkpoint with the weights that the codes stand for.

    Args:
        model: without problems.
        dtype: of these weights, a key of `WEIGHT_DTYPES`; by default the config's where that is a
            16-bit one. All other tensors keep theirs.

    Raises:
        ArtifactError, CheckpointError: the layers do not fit the model that the config describes.
    """
    chosen = dtype or _choose_half(model)
    code = WEIGHT_DTYPES[chosen]
    fit = fit_model(model, code)
    config = dict(fit.plain.config)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    config |= dict.fromkeys(keys, chosen)
    layers = {
        name: (TensorSpec(f"{name}.weight", code, layer.shape),)
        for name, layer in model.layers.items()
    }
    notes = (*fit.notes, *_note_activations(model))
    return Rewriting(model, PLAIN, config, _specify_copies(fit), layers, notes)


def plan_repacking(model: StoredModel) -> Rewriting:
    """Plan a compressed-tensors artifact with the same codes, scales and zero points.

    Reads the order of GPTQ's columns; all else comes from the headers.

    Args:
        model: a GPTQ or AWQ checkpoint without problems.

    Raises:
        ArtifactError, CheckpointError: compressed-tensors has no place for a layer, or the layers
            do not fit the model that the config describes.
    """
    linears = [_plan_linear(model, layer) for layer in model.layers.values()]
    if model.quantization.method == "gptq":
        _check_order(model)
    fit = fit_model(model, "F16", strict=True)
    layers = {
        linear.name: _widest_first(specify_layer(linear, _scale_dtype(model, linear.name)))
        for linear in linears
    }
    described = build_quantization_config(linears, fit.linears)
    config = {**fit.plain.config, "quantization_config": described}
    notes = (*fit.notes, *_note_scales(model))
    return Rewriting(model, REPACKED, config, _specify_copies(fit), layers, notes)


def write_rewriting(
    rewriting: Rewriting, folder: Path, max_shard_bytes: int, progress: Progress
) -> Artifact:
    """Write what was planned into `folder`, which is made when it is absent.

    Args:
        rewriting: from `plan_weights` or `plan_repacking`.
        folder: holds no weights and no config yet.
        max_shard_bytes: bytes of tensors that one file may hold.
        progress: called after each layer.

    Raises:
        ArtifactError, CheckpointError: a tensor is damaged or contradicts the config.
        ResourceError, OutputError: a file cannot be written; no weights are left in `folder`.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    contents = _contents(rewriting, progress)
    files = write_shards(folder, rewriting.specs, contents, max_shard_bytes)
    files |= copy_side_files(rewriting.model.checkpoint, folder)
    # Last: readers take a folder that has a config for a model.
    files["config.json"] = write_document(folder / "config.json", rewriting.config)
    return Artifact(
        name=folder.name,
        format=rewriting.format,
        folder=folder,
        files=dict(sorted(files.items())),
        tensor_bytes=rewriting.tensor_bytes,
        bits_per_weight=8 * rewriting.tensor_bytes / rewriting.model.parameters,
    )


def _contents(rewriting: Rewriting, progress: Progress) -> Iterator[tuple[str, Content]]:
    """Yield the tensors in the order of the specs; one layer is in memory at a time."""
    model, total = rewriting.model, len(rewriting.layers)
    for spec in rewriting.copied:
        yield spec.name, read_content(model.checkpoint, spec.name)
    for done, (name, specs) in enumerate(rewriting.layers.items(), start=1):
        if rewriting.format == PLAIN:
            yield specs[0].name, _round_weight(name, read_weight(model, name), specs[0].dtype)
        else:
            layer = as_quantized_layer(model.layers[name], read_codes(model, name))
            for spec in specs:
                yield spec.name, encode_part(layer, spec.name.rpartition(".")[2])
            del layer
        progress(Event("convert", done, total, name))


def _round_weight(name: str, weight: Tensor, dtype: str) -> Tensor:
    """Round a float32 weight to the dtype that is written.

    Raises:
        ArtifactError: a value is beyond it.
    """
    rounded = weight.to(DTYPES[dtype])
    if not bool(torch.isfinite(torch.stack(torch.aminmax(rounded))).all()):
        raise ArtifactError(
            f"layer {name} has weights up to {float(weight.abs().max()):.3g}, which {dtype} cannot "
            f"hold: convert with --dtype float32"
        )
    return rounded


def _choose_half(model: StoredModel) -> str:
    """The config's dtype where it is a 16-bit one, else that of the scales, else bfloat16."""
    told = _config_dtype(model.checkpoint)
    if told in _HALVES.values():
        return told
    found = (_scale_dtype(model, name) for name in model.layers)
    return next((_HALVES[dtype] for dtype in found if dtype in _HALVES), "bfloat16")


def _config_dtype(checkpoint: Checkpoint) -> str:
    told = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return str(told).removeprefix("torch.")


def _scale_dtype(model: StoredModel, name: str) -> str:
    """safetensors' name of the dtype of a layer's scales."""
    parts = model.layers[name].parts
    part = next(part for part in ("scales", "weight_scale", "weight_scale_inv") if part in parts)
    return model.checkpoint.tensors[parts[part]].dtype


def _specify_copies(fit: Fit) -> tuple[TensorSpec, ...]:
    infos = (fit.plain.tensors[name] for name in fit.copied)
    return _widest_first(TensorSpec(info.name, info.dtype, info.shape) for info in infos)


def _widest_first(specs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    """So that tensors start at multiples of their element size."""
    return tuple(sorted(specs, key=lambda spec: (-ITEM_BYTES[spec.dtype], spec.name)))


def _note_activations(model: StoredModel) -> tuple[str, ...]:
    parts = {part for layer in model.layers.values() for part in layer.parts}
    if parts & {"input_scale", "activation_scale", "input_scale_inv"}:
        return ("the scales of rounded activations are left out",)
    return ()


def _note_scales(model: StoredModel) -> tuple[str, ...]:
    told = _config_dtype(model.checkpoint)
    odd = sum(_HALVES.get(_scale_dtype(model, name)) != told for name in model.layers)
    if told not in _HALVES.values() or not odd:
        return ()
    return (
        f"the scales of {odd} layers are not {told}, which config.json says of the model: servers "
        f"round them when they load them",
    )


def _check_order(model: StoredModel) -> None:
    """Refuse layers whose columns are in the order of their activations."""
    names = [name for name, layer in model.layers.items() if is_reordered(model.checkpoint, layer)]
    if names:
        raise ArtifactError(
            f"layer {names[0]}{and_more(names)} has groups of columns that lie apart (g_idx of "
            f"desc_act), which compressed-tensors cannot hold without a g_idx that vLLM refuses: "
            f"convert --to safetensors"
        )


def _plan_linear(model: StoredModel, layer: StoredLayer) -> LinearPlan:
    """The record that the compressed-tensors writer goes by; its method is not looked at."""
    return LinearPlan(
        name=layer.name,
        out_features=layer.shape[0],
        in_features=layer.shape[1],
        has_bias=f"{layer.name}.bias" in model.checkpoint.tensors,
        scheme=scheme_of(layer),
        group_size=layer.group_size,
        method=METHODS["rtn"],
    )
