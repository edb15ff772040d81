"""How a checkpoint says that it is quantized: one record, whichever tool wrote it.

What is looked for, and where its readers look:

    gptq                config.json, or quantize_config.json of the first writers. GPTQModel
                        (quantization/config.py), AutoGPTQ (quantization/config.py), vLLM
                        (quantization/auto_gptq.py)
    awq                 config.json, or quant_config.json. AutoAWQ (models/_config.py), vLLM
                        (quantization/auto_awq.py), transformers' AwqConfig
    fp8                 config.json. transformers' FineGrainedFP8Config, vLLM (quantization/fp8.py)
    modelopt            hf_quant_config.json, or config.json: `quantkit.formats.modelopt`
    compressed-tensors  config.json; each layer's layout is in `quantkit.formats.decode`
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path
from typing import Any, Literal

from quantkit.checkpoint.headers import read_json
from quantkit.checkpoint.paths import join_inside
from quantkit.checkpoint.source import QUANTIZATION_FILES
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.formats.modelopt.description import is_described, read_description, read_names

QuantMethod = Literal["gptq", "awq", "fp8", "modelopt", "compressed-tensors"]

TITLES: Mapping[QuantMethod, str] = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "modelopt": "ModelOpt",
    "compressed-tensors": "compressed-tensors",
}
"""The method in the words of a message."""

_FOREIGN = ("gptq", "awq", "fp8")
_GPTQ_BITS = (2, 4, 8)
_AWQ_BITS = (4,)
_FP8_BLOCK = (128, 128)
_WILDCARD = re.compile(r"[*?\[]")
_MOST_COLUMNS = 1 << 31
"""Of a group: more than any matrix has, and less than what torch does not divide by."""
_AWQ_KEYS = ("zero_point", "w_bit", "q_group_size", "version")
"""Keys that only AWQ's descriptions have."""


@dataclass(frozen=True)
class StoredQuantization:
    """What a checkpoint's config says about its quantized layers."""

    method: QuantMethod
    where: str
    """Name of the file that says it."""
    bits: int = 0
    """Of a code; 0 where each layer describes itself (compressed-tensors)."""
    group_size: int | None = None
    """Columns that share a scale; None: all columns of a row."""
    symmetric: bool = True
    """Whether every zero point is the middle of the range."""
    mixed: bool = False
    """Whether layers may have other bits and group sizes than these (GPTQModel's `dynamic`)."""
    zero_offset: int = 0
    """What was taken off a zero point before it was stored: 1 in GPTQ's first layout."""
    borrowing: bool = False
    """Whether it was taken off whole words, so that a zero point of 0 borrowed from the next."""
    block_size: tuple[int, int] | None = None
    """Rows and columns of an FP8 block; None: one scale a tensor or a row."""
    static_activations: bool = False
    """Whether a server rounds activations with stored scales."""
    not_converted: tuple[str, ...] = ()
    """Names, or parts of names, of modules that were left in 16 bits; ModelOpt's are patterns."""
    algorithm: str = ""
    """ModelOpt's name of how all layers are quantized."""
    kv_cache: str = "none"
    """Of ModelOpt's checkpoints: `none`, `fp8`, or what else is said of it."""
    contradictions: tuple[str, ...] = ()
    """Where the files that describe the checkpoint do not agree."""

    def list_left_out(self, names: Iterable[str]) -> frozenset[str]:
        """Return those of the layers `names` of which it is said that they stay in 16 bits."""
        found = frozenset(self.not_converted)
        if self.method != "modelopt":
            return found.intersection(names)
        shells = filter(_WILDCARD.search, self.not_converted)
        # In one expression, which names are matched with once each.
        matched = re.compile("|".join(map(translate, shells)) or "(?!)").match
        return frozenset(
            name
            for name in names
            if any(above in found or matched(above) for above in _list_above(name))
        )


def _list_above(name: str) -> list[str]:
    """A name and those of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def is_foreign(folder: Path, config: Mapping[str, Any]) -> bool:
    """Say whether the checkpoint in `folder` is GPTQ, AWQ, FP8 or ModelOpt's, well described or
    not.

    Those are what transformers loads with other packages and kernels, on some machines only.
    """
    if is_described(folder, config):
        return True
    described = config.get("quantization_config")
    if described is None:
        return any((folder / name).is_file() for name in QUANTIZATION_FILES)
    method = described.get("quant_method") if isinstance(described, dict) else None
    return str(method).lower() in _FOREIGN


def find_quantization(folder: Path, config: Mapping[str, Any]) -> StoredQuantization | None:
    """Find out how the checkpoint in `folder` is quantized; None where nothing says that it is.

    Args:
        folder: of the checkpoint.
        config: its config.json.

    Raises:
        ArtifactError: it is quantized in a way that is not read, or its description makes no sense.
    """
    if is_described(folder, config):
        return _describe_modelopt(folder, config)
    where = "config.json"
    described = config.get("quantization_config")
    if described is None:
        where = next((name for name in QUANTIZATION_FILES if (folder / name).is_file()), "")
        if not where:
            return None
        try:
            described = read_json(join_inside(folder, where))
        except CheckpointError as error:
            raise ArtifactError(str(error)) from error
    place = folder / where
    if not isinstance(described, dict):
        raise ArtifactError(f"{place}: quantization_config is not an object")
    method = _name_method(described, where)
    if method == "gptq":
        return _describe_gptq(described, place)
    if method == "awq":
        return _describe_awq(described, place)
    if method == "fp8":
        return _describe_fp8(described, place)
    if method == "compressed-tensors":
        return _describe_compressed(described, place)
    raise ArtifactError(
        f"{place}: quantized by {method!r}, which cannot be read yet (known: {', '.join(TITLES)})"
    )


def _name_method(described: Mapping[str, Any], where: str) -> str:
    """The quant_method; the files of the first writers do not name it."""
    method = described.get("quant_method")
    if method is None and where in QUANTIZATION_FILES:
        return "awq" if any(key in described for key in _AWQ_KEYS) else "gptq"
    return str(method).lower()


def _describe_gptq(described: Mapping[str, Any], place: Path) -> StoredQuantization:
    layout = str(described.get("checkpoint_format") or described.get("format") or "gptq").lower()
    if described.get("is_marlin_format"):
        layout = "marlin"
    if layout not in ("gptq", "gptq_v2"):
        raise ArtifactError(
            f"{place}: GPTQ in the layout {layout!r} cannot be read (known: gptq, gptq_v2)"
        )
    if described.get("pack_dtype", "int32") != "int32":
        raise ArtifactError(
            f"{place}: codes packed into {described['pack_dtype']!r} cannot be read (known: int32)"
        )
    return StoredQuantization(
        method="gptq",
        where=place.name,
        bits=_read_bits(described, ("bits", "w_bit"), None, _GPTQ_BITS, place),
        group_size=_read_group_size(described, -1, place),
        symmetric=_read_flag(described, "sym", True, place),
        mixed=bool(described.get("dynamic")),
        zero_offset=1 if layout == "gptq" else 0,
        borrowing=_subtracts_words(described),
    )


def _subtracts_words(described: Mapping[str, Any]) -> bool:
    """Whether the writer took one off all zero points of a word in a single subtraction.

    GPTQModel (utils/model.py, convert_gptq_v2_to_v1_format_module) and auto-round (packing by a
    sum) do; adding it again gives back every zero point. AutoGPTQ did not.
    """
    meta = described.get("meta")
    quantizers = meta.get("quantizer") if isinstance(meta, dict) else None
    names = quantizers if isinstance(quantizers, list) else [quantizers]
    by_gptqmodel = any(str(name).lower().startswith("gptqmodel") for name in names)
    return by_gptqmodel or "autoround_version" in described


def _describe_awq(described: Mapping[str, Any], place: Path) -> StoredQuantization:
    layout = str(described.get("version") or described.get("format") or "gemm").lower()
    if described.get("backend") == "llm-awq":
        layout = "llm-awq"
    if layout != "gemm":
        raise ArtifactError(f"{place}: AWQ in the layout {layout!r} cannot be read (known: gemm)")
    skipped = described.get("modules_to_not_convert")
    return StoredQuantization(
        method="awq",
        where=place.name,
        bits=_read_bits(described, ("bits", "w_bit"), 4, _AWQ_BITS, place),
        group_size=_read_group_size(described, 128, place),
        symmetric=not _read_flag(described, "zero_point", True, place),
        not_converted=read_names(skipped, place),
    )


def _describe_fp8(described: Mapping[str, Any], place: Path) -> StoredQuantization:
    if described.get("expert_dtype", "fp8") != "fp8":
        raise ArtifactError(
            f"{place}: experts in {described['expert_dtype']!r} cannot be read (known: fp8)"
        )
    # transformers takes 128 x 128 where the key is absent; null means no blocks.
    block = described.get("weight_block_size", _FP8_BLOCK)
    if block is not None:
        pair = isinstance(block, list | tuple) and len(block) == 2
        if not (pair and all(type(edge) is int and edge > 0 for edge in block)):
            raise ArtifactError(f"{place}: weight_block_size {block!r} is not two positive numbers")
        block = (block[0], block[1])
    skipped = described.get("modules_to_not_convert") or described.get("ignored_layers")
    return StoredQuantization(
        method="fp8",
        where=place.name,
        bits=8,
        block_size=block,
        static_activations=described.get("activation_scheme") == "static",
        not_converted=read_names(skipped, place),
    )


def _describe_modelopt(folder: Path, config: Mapping[str, Any]) -> StoredQuantization:
    found = read_description(folder, config)
    return StoredQuantization(
        method="modelopt",
        where=found.where,
        group_size=found.group_size,
        not_converted=found.excluded,
        algorithm=found.algorithm,
        kv_cache=found.kv_cache,
        contradictions=found.contradictions,
    )


def _describe_compressed(described: Mapping[str, Any], place: Path) -> StoredQuantization:
    for key in ("transform_config", "sparsity_config"):
        if described.get(key):
            raise ArtifactError(
                f"{place}: {key} describes more than codes and scales, which cannot be read yet"
            )
    return StoredQuantization("compressed-tensors", place.name)


def _read_bits(
    described: Mapping[str, Any],
    keys: tuple[str, ...],
    default: int | None,
    known: tuple[int, ...],
    place: Path,
) -> int:
    bits = next((described[key] for key in keys if described.get(key) is not None), default)
    if type(bits) is not int or bits not in known:
        raise ArtifactError(
            f"{place}: codes of {bits!r} bits cannot be read (known: {', '.join(map(str, known))})"
        )
    return bits


def _read_group_size(described: Mapping[str, Any], default: int, place: Path) -> int | None:
    keys = ("group_size", "q_group_size")
    size = next((described[key] for key in keys if described.get(key) is not None), default)
    if type(size) is not int or not (size == -1 or 0 < size <= _MOST_COLUMNS):
        raise ArtifactError(
            f"{place}: group_size {size!r} is neither a number of columns nor -1 (one scale a row)"
        )
    return None if size == -1 else size


def _read_flag(described: Mapping[str, Any], key: str, default: bool, place: Path) -> bool:
    flag = described.get(key, default)
    if not isinstance(flag, bool):
        raise ArtifactError(f"{place}: {key} {flag!r} is neither true nor false")
    return flag
