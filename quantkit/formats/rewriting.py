"""Quantized checkpoints written anew: as the weights they stand for, or as compressed-tensors.

Nothing is rounded on the way to compressed-tensors: codes, scales and zero points are the stored
ones. As in every writer, names, dtypes and shapes follow from the headers, and one layer at a time
is read and streamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.headers import ITEM_BYTES, WEIGHT_DTYPES
from quantkit.checkpoint.reader import DTYPES, Checkpoint, read_tensor
from quantkit.errors import ArtifactError, writing
from quantkit.formats.encoding import encode_part, specify_layer
from quantkit.formats.kv_scales import KV_SCALES, count_heads
from quantkit.formats.passthrough import read_content
from quantkit.formats.quantization_config import build_quantization_config
from quantkit.formats.readers.fitting import Fit, and_more, fit_model
from quantkit.formats.readers.gptq import is_reordered
from quantkit.formats.readers.layers import StoredLayer, scheme_of
from quantkit.formats.readers.stored import StoredModel, read_quantized, read_weight
from quantkit.formats.shards import (
    DTYPE_NAMES,
    Content,
    TensorSpec,
    write_document,
    write_shards,
)
from quantkit.formats.sidecars import copy_side_files
from quantkit.records import Artifact, Event, KvCachePlan, LinearPlan, Progress
from quantkit.schemes import METHODS, MODELOPT, SCHEMES

PLAIN, REPACKED = "safetensors", "compressed-tensors"

_CODES = (torch.int8, torch.int32, torch.int64, torch.float8_e4m3fn)
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
    cache_scales: Mapping[TensorSpec, str] = field(default_factory=dict)
    """A scale of the key/value cache -> the name that it has in the model."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Every tensor, in the order in which they are written."""
        layers = (spec for specs in self.layers.values() for spec in specs)
        return (*self.copied, *layers, *self.cache_scales)

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
        model: a GPTQ, AWQ or ModelOpt checkpoint without problems.

    Raises:
        ArtifactError, CheckpointError: compressed-tensors has no place for a layer, or the layers
            do not fit the model that the config describes.
    """
    linears = [_plan_linear(model, layer) for layer in model.layers.values()]
    if model.quantization.method == "gptq":
        _check_order(model)
    kv_cache = _plan_cache(model)
    fit = fit_model(model, "F16", strict=True, keeps_cache=kv_cache is not None)
    dtypes = {linear.name: _choose_scale_dtype(model, linear.name) for linear in linears}
    layers = {
        linear.name: _widest_first(specify_layer(linear, dtypes[linear.name])) for linear in linears
    }
    described = build_quantization_config(linears, fit.linears, kv_cache)
    config = {**fit.plain.config, "quantization_config": described}
    notes = (*fit.notes, *_note_scales(model, dtypes))
    scales = {} if kv_cache is None else _specify_cache_scales(model)
    return Rewriting(model, REPACKED, config, _specify_copies(fit), layers, notes, scales)


def _plan_cache(model: StoredModel) -> KvCachePlan | None:
    """Return what config.json is to say of the key/value cache; only ModelOpt's can be kept."""
    if model.quantization.method != MODELOPT or model.quantization.kv_cache != "fp8":
        return None
    attentions = tuple(sorted({_attention_of(name) for name in model.cache_scales}))
    return KvCachePlan(False, attentions, count_heads(model.checkpoint.config), 0)


def _attention_of(name: str) -> str:
    """`<attention>` of `<attention>.k_proj.k_scale`, or of `<attention>.k_scale`."""
    module = name.rpartition(".")[0]
    return module.rpartition(".")[0] if module.endswith(("k_proj", "v_proj")) else module


def _specify_cache_scales(model: StoredModel) -> dict[TensorSpec, str]:
    """Announce the scales of the key/value cache as compressed-tensors names them."""
    named = {
        f"{_attention_of(name)}.{name.rpartition('.')[2]}": name
        for name in model.cache_scales
        if name.rpartition(".")[2] in KV_SCALES
    }
    dtype = _narrow_dtype(model.checkpoint, named.values()) if named else ""
    return {TensorSpec(target, dtype, (1,)): source for target, source in sorted(named.items())}


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
            layer = read_quantized(model, name)
            for spec in specs:
                part = encode_part(layer, spec.name.rpartition(".")[2])
                # Scales alone may change their dtype, where that changes none of them.
                yield spec.name, part if part.dtype in _CODES else part.to(DTYPES[spec.dtype])
            del layer
        progress(Event("convert", done, total, name))
    for spec, source in rewriting.cache_scales.items():
        scale = read_tensor(model.checkpoint, source).reshape(spec.shape)
        yield spec.name, scale.to(DTYPES[spec.dtype])


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


def _choose_scale_dtype(model: StoredModel, name: str) -> str:
    """Return the dtype that a layer's scales are written in: their own, or, for ModelOpt's numbers
    in float32, the model's, in which servers keep them, where it holds them exactly."""
    if model.quantization.method != MODELOPT:
        return _scale_dtype(model, name)
    parts = model.layers[name].parts
    scales = [parts[part] for part in ("weight_scale", "input_scale") if part in parts]
    return _narrow_dtype(model.checkpoint, scales)


def _narrow_dtype(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """Return the model's 16-bit dtype where it holds tensors exactly, else the first one's own."""
    tensors = [read_tensor(checkpoint, name) for name in names]
    told = _config_dtype(checkpoint)
    for code, name in _HALVES.items():
        dtype = DTYPES[code]
        if name == told and all(
            torch.equal(each.to(dtype).to(each.dtype), each) for each in tensors
        ):
            return code
    return DTYPE_NAMES[tensors[0].dtype]


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


def _note_scales(model: StoredModel, dtypes: Mapping[str, str]) -> tuple[str, ...]:
    """Say that servers round scales; `dtypes` are safetensors' names of those of each layer."""
    told = _config_dtype(model.checkpoint)
    odd = sum(_HALVES.get(dtype) != told for dtype in dtypes.values())
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
        scheme=SCHEMES[layer.scheme] if model.quantization.method == MODELOPT else scheme_of(layer),
        group_size=layer.group_size,
        method=METHODS["rtn"],
    )
