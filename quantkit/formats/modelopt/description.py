"""What hf_quant_config.json, and config.json beside it, say of a checkpoint.

ModelOpt writes the description twice: nested in hf_quant_config.json, and flat, in words like those
of compressed-tensors, as config.json's `quantization_config` (torch/export/convert_hf_config.py of
ModelOpt 0.47). TensorRT-LLM goes by the file (quantization/modelopt_config.py), vLLM 0.32 by
config.json where it has the block (transformers_utils/config.py); either reads both forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.headers import read_json
from quantkit.checkpoint.paths import join_inside
from quantkit.checkpoint.source import MODELOPT_FILE
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.formats.modelopt.layout import AWQ, FP8, FP8_ROWS, SCHEME_OF, SMOOTHQUANT

FILE = MODELOPT_FILE
METHOD = "modelopt"
_MOST_NAMES, _MOST_PATTERNS = 100_000, 1024
"""Of excluded modules; each layer is matched with every pattern."""
_LONGEST_NAME = 1024
LAYOUT_VERSION = "0.47.0"
"""Version of ModelOpt whose layout is written."""


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of its quantized layers."""

    algorithm: str
    group_size: int | None
    """Columns that share a scale, of W4A16_AWQ."""
    kv_cache: str
    """`none`, `fp8`, or what else is said of it."""
    excluded: tuple[str, ...]
    """Shell patterns on the names of modules that stay in 16 bits."""
    where: str
    """Name of the file that says it."""
    contradictions: tuple[str, ...] = ()
    """Where config.json says something else."""


def is_described(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint in `folder` is one of ModelOpt's, well described or not."""
    described = config.get("quantization_config")
    if described is None:
        return (folder / FILE).is_file()
    method = described.get("quant_method") if isinstance(described, dict) else None
    return str(method).lower().startswith(METHOD)


def read_description(folder: Path, config: Mapping[str, Any]) -> Description:
    """Read the description of a checkpoint of ModelOpt's.

    Raises:
        ArtifactError: it makes no sense, or is of an algorithm that is not read.
    """
    inline = config.get("quantization_config")
    if not (folder / FILE).is_file():
        return _parse(inline, folder / "config.json")
    try:
        raw = read_json(join_inside(folder, FILE))
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    found = _parse(raw, folder / FILE)
    if inline is None:
        return found
    return _with_contradictions(found, _parse(inline, folder / "config.json"))


def _parse(raw: object, place: Path) -> Description:
    nested = raw.get("quantization", raw) if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(nested, dict):
        raise ArtifactError(f"{place}: the quantization is not described by an object")
    flat = nested is raw
    algorithm = str(nested.get("quant_algo")).upper()
    if algorithm not in SCHEME_OF:
        raise ArtifactError(
            f"{place}: ModelOpt's quant_algo {nested.get('quant_algo')!r} cannot be read yet "
            f"(known: {', '.join(SCHEME_OF)})"
        )
    size = nested.get("group_size")
    if algorithm == AWQ and size is not None and (type(size) is not int or size < 1):
        raise ArtifactError(f"{place}: group_size {size!r} is no number of columns")
    excluded = nested.get("ignore" if flat else "exclude_modules") or []
    if not isinstance(excluded, list):
        raise ArtifactError(f"{place}: what is excluded is {excluded!r}, not a list of names")
    names = read_names(excluded, place)
    kv_cache = _read_cache_scheme(nested) if flat else nested.get("kv_cache_quant_algo")
    return Description(
        algorithm=algorithm,
        group_size=size if algorithm == AWQ else None,
        kv_cache="none" if kv_cache is None else str(kv_cache).lower(),
        excluded=names,
        where=place.name,
    )


def read_names(names: object, place: Path) -> tuple[str, ...]:
    """Return the names or patterns of modules that a description lists; what is no list has none.

    Raises:
        ArtifactError: there are more, or longer ones, than any model has.
    """
    found = tuple(map(str, names)) if isinstance(names, list) else ()
    patterns = sum(not set(name).isdisjoint("*?[") for name in found)
    if len(found) > _MOST_NAMES or patterns > _MOST_PATTERNS:
        raise ArtifactError(
            f"{place}: {len(found)} modules are excluded, {patterns} of them by patterns: "
            f"{_MOST_NAMES} and {_MOST_PATTERNS} are read"
        )
    if any(len(name) > _LONGEST_NAME for name in found):
        raise ArtifactError(
            f"{place}: a module is excluded by a name of more than {_LONGEST_NAME} characters"
        )
    return found


def _read_cache_scheme(described: Mapping[str, Any]) -> object:
    scheme = described.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        kind, bits = scheme.get("type"), scheme.get("num_bits")
        return "fp8" if (kind, bits) == ("float", 8) else f"{kind}, {bits} bits"
    return scheme


def _with_contradictions(found: Description, inline: Description) -> Description:
    """Note where config.json says something else; ModelOpt leaves group sizes out of it."""
    rows: list[tuple[str, object, object]] = [
        ("quant_algo", found.algorithm, inline.algorithm),
        ("the key/value cache", found.kv_cache, inline.kv_cache),
        ("what is excluded", sorted(set(found.excluded)), sorted(set(inline.excluded))),
    ]
    if inline.group_size is not None:
        rows.append(("group_size", found.group_size, inline.group_size))
    lines = tuple(
        f"{FILE} and config.json contradict each other in {what}: {mine} and {other}"
        for what, mine, other in rows
        if mine != other
    )
    return Description(
        found.algorithm,
        found.group_size or inline.group_size,
        found.kv_cache,
        found.excluded,
        found.where,
        lines,
    )


def describe_layers(
    algorithm: str, group_size: int | None, excluded: list[str], kv_cache: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of hf_quant_config.json, and of config.json's `quantization_config`.

    The producer is the layout's name, by which readers know it. ModelOpt leaves the groups of
    config.json out for what is neither FP8 nor FP4; here they are always written.
    """
    producer = {"name": METHOD, "version": LAYOUT_VERSION}
    nested: dict[str, Any] = {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": None if kv_cache == "none" else kv_cache.upper(),
    }
    flat: dict[str, Any] = {
        "config_groups": {"group_0": {**_describe_group(algorithm, group_size)}},
        "ignore": excluded,
        "quant_algo": algorithm,
    }
    if algorithm == AWQ:
        nested |= {"group_size": group_size, "has_zero_point": False, "pre_quant_scale": True}
        flat["group_size"] = group_size
    nested["exclude_modules"] = excluded
    if kv_cache != "none":
        flat["kv_cache_scheme"] = _EIGHT_BITS
    flat |= {"producer": producer, "quant_method": METHOD}
    return {"producer": producer, "quantization": nested}, flat


_EIGHT_BITS = {"dynamic": False, "num_bits": 8, "type": "float"}


def _describe_group(algorithm: str, group_size: int | None) -> dict[str, Any]:
    """As `_quant_algo_to_group_config` of ModelOpt has it, static inputs where they are dynamic
    included."""
    weights: dict[str, Any] = dict(_EIGHT_BITS)
    inputs: dict[str, Any] | None = dict(_EIGHT_BITS)
    if algorithm == AWQ:
        weights |= {"num_bits": 4, "type": "int", "group_size": group_size}
        inputs = None
    elif algorithm == SMOOTHQUANT:
        weights |= {"type": "int", "strategy": "channel"}
        inputs = {**_EIGHT_BITS, "type": "int"}
    elif algorithm == FP8_ROWS:
        weights["strategy"] = "channel"
    elif algorithm != FP8:
        raise ValueError(f"ModelOpt's algorithm {algorithm!r} has no group")
    group: dict[str, Any] = {} if inputs is None else {"input_activations": inputs}
    return {**group, "weights": weights, "targets": ["Linear"]}
