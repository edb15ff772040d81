"""The weights of an artifact, whatever its format, under the names of the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.bisection.records import Form
from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.errors import ArtifactError
from quantkit.formats.decode import open_artifact
from quantkit.formats.gguf.dequantizing import decode_tensor, plan_dequantizing
from quantkit.formats.gguf.inspection import open_gguf_artifact
from quantkit.formats.inspect import COMPRESSED_TENSORS
from quantkit.formats.inspected import InspectedLayer, Inspection
from quantkit.formats.readers.stored import open_stored, read_weight
from quantkit.ggml_types import GGUF
from quantkit.schemes import ONNX, SCHEMES

_DESCRIPTIONS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Weights:
    """A model's weights in float32, one at a time."""

    names: frozenset[str]
    """Of the tensors, as transformers' modules call them."""
    read: Callable[[str], Tensor]
    forms: Mapping[str, Form]
    """Module -> how its matrix is stored; modules that are not matrices are not there."""
    checkpoint: Checkpoint | None
    """With the config of a plain model; None where the format has no config of its own."""
    notes: tuple[str, ...] = ()


def open_base(base: Checkpoint) -> Weights:
    """Read a plain checkpoint."""
    return Weights(frozenset(base.tensors), lambda name: read_tensor(base, name).float(), {}, base)


def open_weights(found: Inspection, base: Checkpoint) -> Weights:
    """Read an artifact by the names of the checkpoint that it was made from; headers only.

    Raises:
        ArtifactError: the format is not decoded here, or the files are damaged or contradict
            themselves.
    """
    if found.format == GGUF:
        return _open_gguf(found, base)
    if found.format == ONNX:
        raise ArtifactError(
            f"{found.file or found.folder} is an ONNX graph, which is not bisected: bisect the "
            f"compressed-tensors artifact of the same recipe, whose codes are the same (and "
            f"`quantkit verify --against` compares the graph's weights)"
        )
    return _open_folder(found)


def _open_folder(found: Inspection) -> Weights:
    checkpoint = open_artifact(found.folder)
    stored = open_stored(checkpoint)
    problems = found.problems if stored is None else (*stored.problems, *found.problems)
    if problems:
        raise ArtifactError(
            f"{found.folder} cannot be decoded: {problems[0]}; `quantkit verify` lists what is "
            f"wrong with its files"
        )
    forms = {layer.name: _describe(checkpoint, found, layer) for layer in found.layers}
    plain = _without_description(checkpoint)
    notes = tuple(_note_unmeasured(found))
    if stored is None:
        read = _plain_reader(checkpoint)
        return Weights(frozenset(checkpoint.tensors), read, forms, plain, notes)
    model = stored

    def read_stored(name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in model.layers:
            return read_weight(model, module)
        return read_tensor(checkpoint, name).float()

    names = frozenset({*model.others, *(f"{layer}.weight" for layer in model.layers)})
    return Weights(names, read_stored, forms, plain, notes)


def _plain_reader(checkpoint: Checkpoint) -> Callable[[str], Tensor]:
    return lambda name: read_tensor(checkpoint, name).float()


def _describe(checkpoint: Checkpoint, found: Inspection, layer: InspectedLayer) -> Form:
    form = Form(layer.scheme, layer.bits, layer.group_size, layer.size)
    scheme = SCHEMES.get(layer.scheme)
    # Inputs of others' formats are not rounded by the gate either.
    if found.format != COMPRESSED_TENSORS or scheme is None or scheme.activations is None:
        return form
    scale = None
    if scheme.static:
        scale = read_tensor(checkpoint, f"{layer.name}.input_scale").reshape(1).float()
    return replace(form, activations=scheme, input_scale=scale)


def _without_description(checkpoint: Checkpoint) -> Checkpoint:
    config = {key: value for key, value in checkpoint.config.items() if key not in _DESCRIPTIONS}
    return replace(checkpoint, config=MappingProxyType(config))


def _note_unmeasured(found: Inspection) -> list[str]:
    """What the gate may see and this does not."""
    notes = []
    if found.kv_cache != "none":
        notes.append(
            f"its key/value cache ({found.kv_cache}) is not simulated: what the cache costs is not "
            f"in these numbers"
        )
    if found.format == "fp8":
        notes.append("a server also rounds the inputs of FP8 layers, which is not measured")
    return notes


def _open_gguf(found: Inspection, base: Checkpoint) -> Weights:
    assert found.file is not None
    file = open_gguf_artifact(found.file)
    plan = plan_dequantizing(file, base)
    tensors = {str(tensor.source): tensor for tensor in plan.tensors}
    stored = {layer.name: layer for layer in found.layers}
    forms = {}
    for source, tensor in tensors.items():
        layer = stored.get(tensor.name.removesuffix(".weight"))
        if layer is not None:
            forms[source.removesuffix(".weight")] = Form(
                layer.scheme, layer.bits, layer.group_size, layer.size
            )

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        values = torch.cat([part.reshape(-1) for part in decode_tensor(file, tensor)])
        return values.reshape(tensor.shape)

    note = "llama.cpp's rounding of the inputs of quantized matrices is not measured"
    return Weights(frozenset(tensors), read, forms, None, (note,))
