"""Which artifact is meant, and what a server would have to hold of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.capacity import LayerShape, ModelShape, read_shape
from quantkit.capacity.shapes import MOST_LAYERS
from quantkit.checkpoint.headers import read_json
from quantkit.checkpoint.source import find_folder, resolve_config
from quantkit.errors import ArtifactError, CheckpointError, raise_alone
from quantkit.formats.gguf.inspection import open_gguf_artifact
from quantkit.formats.inspect import COMPRESSED_TENSORS, PLAIN, inspect_artifact
from quantkit.formats.inspected import Inspection
from quantkit.formats.kv_scales import name_cache
from quantkit.formats.onnx.container import open_graph
from quantkit.formats.onnx.genai import read_genai_config
from quantkit.ggml_types import GGUF
from quantkit.schemes import MODELOPT, ONNX
from quantkit.serving.records import ServedLayer, Target

FORMAT_FOLDERS = (COMPRESSED_TENSORS, MODELOPT, GGUF, ONNX)
"""Folders of an output that hold an artifact each, by the name of their format."""


def find_target(artifact: str | os.PathLike[str], formats: tuple[str, ...]) -> Target:
    """Look at what is to be served; nothing but headers is read.

    Args:
        artifact: an output of quantkit, one of its folders, any folder or file that `inspect`
            reads, or a Hub id (id@revision).
        formats: which ones the runtime serves, best first: of an output that has several, the first
            of these is taken.

    Raises:
        ArtifactError: nothing is there that can be read, or an output has none of `formats`.
        CheckpointError: its config does not say how large it is.
    """
    path = Path(artifact)
    if not path.exists() and find_folder(os.fspath(artifact)) is None:
        return _find_on_hub(os.fspath(artifact))
    return _describe(inspect_artifact(_choose_folder(path, formats)))


def _choose_folder(path: Path, formats: tuple[str, ...]) -> Path:
    """The folder of a format within an output that has several; else `path` itself."""
    if not (path / "quantkit.json").is_file():
        return path
    there = [name for name in FORMAT_FOLDERS if (path / name).is_dir()]
    return next((path / name for name in formats if name in there), path)


def _describe(found: Inspection) -> Target:
    if found.format == GGUF:
        return _describe_gguf(found)
    if found.format == ONNX:
        return _describe_onnx(found)
    config = read_json(found.folder / "config.json")
    place = str(found.folder / "config.json")
    return Target(
        name=_name_folder(found.folder),
        location=_name_path(found.folder),
        revision=None,
        folder=found.folder,
        format=found.format,
        scheme=found.scheme,
        kv_cache=found.kv_cache,
        weight_bytes=found.tensor_bytes,
        shape=read_shape(config, place),
        intermediate=_widest(config, read_shape(config, place)),
        layers=_quantized(found),
        verdict=found.verdict,
        problems=found.problems,
    )


def _quantized(found: Inspection) -> tuple[ServedLayer, ...]:
    return tuple(
        ServedLayer(layer.name, layer.group_size, layer.sharing, layer.shape)
        for layer in found.layers
        if layer.scheme != "none" and len(layer.shape) > 1
    )


def _describe_gguf(found: Inspection) -> Target:
    assert found.file is not None
    file = open_gguf_artifact(found.file)
    architecture = file.find_text("general.architecture")
    numbers = {
        key: file.find(f"{architecture}.{key}")
        for key in (
            "block_count",
            "embedding_length",
            "feed_forward_length",
            "attention.head_count",
            "attention.head_count_kv",
            "attention.key_length",
            "attention.value_length",
            "attention.sliding_window",
            "context_length",
        )
    }
    sizes = {key: value for key, value in numbers.items() if type(value) is int and value > 0}
    tokens = file.find_array("tokenizer.ggml.tokens")
    each = file.find_array(f"{architecture}.attention.head_count_kv")
    shape = _shape_of_gguf(
        str(architecture),
        sizes,
        None if each is None else [int(heads) for heads in each.content],
        0 if tokens is None else len(tokens),
        found.file,
    )
    notes: tuple[str, ...] = ()
    if "attention.sliding_window" in sizes:
        notes = ("attention windows are not regarded: the cache may be smaller than said",)
    return Target(
        name=found.file.stem,
        location=_name_path(found.file),
        revision=None,
        folder=found.folder,
        format=GGUF,
        scheme=found.scheme,
        kv_cache="none",
        weight_bytes=found.tensor_bytes,
        shape=shape,
        intermediate=sizes.get("feed_forward_length", 4 * shape.hidden),
        layers=(),
        verdict=found.verdict,
        problems=found.problems,
        notes=notes,
    )


def _shape_of_gguf(
    architecture: str,
    sizes: Mapping[str, int],
    heads_of_layers: list[int] | None,
    vocabulary: int,
    file: Path,
) -> ModelShape:
    """Read the sizes out of a file's metadata.

    Raises:
        ArtifactError: one is missing, or there are more layers than any model has.
    """
    missing = [
        key
        for key in ("block_count", "embedding_length", "attention.head_count")
        if key not in sizes
    ]
    if missing:
        raise ArtifactError(f"{file} has no {architecture}.{missing[0]}: it is no language model")
    if sizes["block_count"] > MOST_LAYERS:
        raise ArtifactError(
            f"{file} announces {sizes['block_count']} layers ({architecture}.block_count): no "
            f"model has so many; download or make it again"
        )
    heads = sizes["attention.head_count"]
    head_dim = sizes["embedding_length"] // heads
    kv_heads = sizes.get("attention.head_count_kv", heads)
    cached = sizes.get("attention.key_length", head_dim) + sizes.get(
        "attention.value_length", head_dim
    )
    counts = heads_of_layers or [kv_heads] * sizes["block_count"]
    return ModelShape(
        model_type=architecture,
        layers=tuple(LayerShape(count * cached, None) for count in counts),
        hidden=sizes["embedding_length"],
        heads=heads,
        kv_heads=max(counts),
        head_dim=cached // 2,
        vocabulary=vocabulary,
        max_positions=sizes.get("context_length"),
    )


def _describe_onnx(found: Inspection) -> Target:
    """A decoder that ONNX Runtime GenAI runs.

    Raises:
        ArtifactError: it is none.
    """
    assert found.file is not None
    described = read_genai_config(found.folder)
    if described is None:
        raise ArtifactError(
            f"{found.folder} has no genai_config.json: it is an encoder, or a graph that ONNX "
            f"Runtime GenAI does not run; its model card shows how to call it from Python"
        )
    decoder = described["model"]["decoder"]
    config = {
        "model_type": described["model"].get("type"),
        "num_hidden_layers": decoder.get("num_hidden_layers"),
        "num_attention_heads": decoder.get("num_attention_heads"),
        "num_key_value_heads": decoder.get("num_key_value_heads"),
        "head_dim": decoder.get("head_size"),
        "hidden_size": decoder.get("hidden_size"),
        "vocab_size": described["model"].get("vocab_size"),
        "max_position_embeddings": described["model"].get("context_length"),
    }
    shape = read_shape(config, str(found.folder / "genai_config.json"))
    return Target(
        name=_name_folder(found.folder),
        location=_name_path(found.folder),
        revision=None,
        folder=found.folder,
        format=ONNX,
        scheme=found.scheme,
        kv_cache="none",
        weight_bytes=found.tensor_bytes,
        shape=shape,
        intermediate=4 * shape.hidden,
        layers=(),
        cache_bytes_per_value=_cache_width(found.file),
        verdict=found.verdict,
        problems=found.problems,
    )


def _cache_width(file: Path) -> float:
    """Bytes of a number in the graph's cache: it has the graph's own precision."""
    from onnx import TensorProto

    for value in open_graph(file).model.graph.input:
        if value.name.startswith("past_key_values."):
            return 4.0 if value.type.tensor_type.elem_type == TensorProto.FLOAT else 2.0
    return 4.0


def _find_on_hub(model: str) -> Target:
    """A repository of the Hub: its config is fetched, and the sizes of its files asked for.

    Raises:
        CheckpointError: it is not accessible, or has no weights in safetensors.
    """
    source = resolve_config(model)
    repo, _, revision = model.partition("@")
    if not (source.folder / "config.json").is_file():
        raise CheckpointError(
            f"model {model!r} has no config.json, as repositories of GGUF or ONNX files: download "
            f"what is meant (`hf download {repo} --local-dir FOLDER`) and name that folder"
        )
    config = read_json(source.folder / "config.json")
    shape = read_shape(config, f"config.json of {repo}")
    return Target(
        name=repo.rpartition("/")[2],
        location=repo,
        revision=revision or None,
        folder=None,
        format=_name_format(config),
        scheme=_name_format(config) if "quantization_config" in config else "none",
        kv_cache=name_cache(config),
        weight_bytes=_count_hub_bytes(model, repo, source.revision),
        shape=shape,
        intermediate=_widest(config, shape),
        layers=(),
        notes=("the Hub's files were not read: whether the runtime takes them was not checked",),
    )


def _name_format(config: Mapping[str, Any]) -> str:
    described = config.get("quantization_config")
    if not isinstance(described, Mapping):
        return PLAIN
    return str(described.get("quant_method")).lower()


def _count_hub_bytes(model: str, repo: str, revision: str | None) -> int:
    """Bytes of the safetensors files of a revision.

    Raises:
        CheckpointError: the Hub does not say, or there are none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        found = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise_alone(
            CheckpointError(
                f"model {model!r}: the Hub does not say how large its files are "
                f"({type(error).__name__}); download it with `hf download {repo}` and name the "
                f"folder"
            )
        )
    sizes = {
        sibling.rfilename: sibling.size or 0
        for sibling in found.siblings or ()
        if sibling.rfilename.endswith(".safetensors") and "/" not in sibling.rfilename
    }
    # Some repositories have the weights once more under the names of another library.
    named = {name: size for name, size in sizes.items() if name.startswith("model")}
    total = sum((named or sizes).values())
    if not total:
        raise CheckpointError(
            f"model {model!r} has no weights in safetensors at its root: download the file that "
            f"is meant (`hf download {repo} FILE`) and name it"
        )
    return total


def _widest(config: Mapping[str, Any], shape: ModelShape) -> int:
    """Width of the widest layer; four times the model's where the config does not say."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        value = place.get("intermediate_size")
        if type(value) is int and value > 0:
            return value
    return 4 * shape.hidden


def _name_path(path: Path) -> str:
    """A path that no program takes for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _name_folder(folder: Path) -> str:
    """The name of an artifact's folder; of one within an output, that of the output."""
    whole = folder.absolute()
    parts = [part for part in (whole, *whole.parents) if part.name not in FORMAT_FOLDERS]
    return re.sub(r"[^\w.-]+", "-", parts[0].name) or "model"
