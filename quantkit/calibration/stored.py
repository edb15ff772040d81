"""Statistics of the original model on the disk: taken in one walk, solved from by many recipes.

    <folder>/
      statistics.json              of which model, on which windows, and what is in each block
      windows.safetensors          ids int64 [N, T] and weights float32 [N, T]
      block-00003.safetensors      the statistics of a block's inputs, and of its keys and values
      fisher-00003.safetensors     the Fisher matrices of its layers, where they were measured

The manifest is written last and has the sha256 of every other file, which is computed again before
a file is used. A symmetric second moment is stored as the panels that `finish` mirrors (the upper
triangle and a little more), a sample of bfloat16 activations in bfloat16: both come back bit by
bit. Reading holds the statistics of one group at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from quantkit.calibration.stats import PANEL, SAMPLED_TOKENS, filled_panels
from quantkit.calibration.stored_manifest import read_manifest
from quantkit.calibration.windows import hash_windows
from quantkit.checkpoint.paths import join_inside
from quantkit.errors import CalibrationError, CheckpointError, PlanError
from quantkit.records import BlockPlan, GroupPlan, KvStats, LayerStats, Plan, TokenWindows
from quantkit.staging import STATISTICS

_WEIGHTS_AND_CONFIG = (".safetensors", ".bin", ".index.json")
"""Endings of the files, besides config.json, that make a model this model."""


@dataclass(frozen=True)
class StoredStatistics:
    """A folder of statistics that was opened: its manifest was read, and its windows."""

    folder: Path
    manifest: Mapping[str, Any]
    sha256: str
    """Of the manifest, which has the hashes of all that it describes."""
    windows: TokenWindows
    verified: set[str] = field(default_factory=set)
    """Names of the files whose hash was found to be the manifest's."""

    @property
    def dtype(self) -> torch.dtype:
        """What the forward passes computed in."""
        found = getattr(torch, str(self.manifest["compute"].get("dtype")), None)
        return found if isinstance(found, torch.dtype) else torch.float32

    @property
    def has_key_value(self) -> bool:
        """Whether keys and values were watched."""
        return bool(self.manifest["holds"]["key_value"])

    @property
    def has_fisher(self) -> bool:
        """Whether Fisher matrices were measured."""
        return bool(self.manifest["holds"]["fisher"])


def pack_group(group: GroupPlan, stats: LayerStats) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors that a block's file has of an input, and what the manifest says of it.

    Args:
        group: the layers that read the input.
        stats: of it. Drift is not kept, since inputs of the original model have none.
    """
    first = group.linears[0].name
    panels = [panel.reshape(-1) for panel in filled_panels(stats.second_moment)]
    found = {f"moment:{first}": torch.cat(panels)}
    for name in ("mean", "absmax"):
        value: Tensor | None = getattr(stats, name)
        if value is not None:
            found[f"{name}:{first}"] = value
    if stats.sample is not None:
        narrow = torch.bfloat16 if stats.bfloat16 else torch.float32
        found[f"sample:{first}"] = stats.sample.to(narrow)
    about = {
        "layers": [linear.name for linear in group.linears],
        "features": len(stats.second_moment),
        "tokens": stats.tokens,
        "bfloat16": stats.bfloat16,
    }
    return _at_rest(found), {first: about}


def pack_kv(kv: KvStats) -> dict[str, Tensor]:
    """Return the tensors that a block's file has of its keys and values."""
    found = {"key_absmax": kv.key_absmax, "value_absmax": kv.value_absmax}
    return _at_rest(found if kv.key_errors is None else {**found, "key_errors": kv.key_errors})


def _at_rest(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def packed_bytes(group: GroupPlan) -> int:
    """Return the bytes of `pack_group`, at the most: but for a few thousand."""
    features = group.linears[0].in_features
    panels = sum(
        min(PANEL, features - start) * (features - start) for start in range(0, features, PANEL)
    )
    return 4 * (panels + (SAMPLED_TOKENS + 2) * features)


def open_statistics(folder: str | os.PathLike[str]) -> StoredStatistics:
    """Read the manifest of a folder that `calibrate` wrote, and its windows.

    Raises:
        CalibrationError: it is no such folder, or is damaged.
    """
    place = Path(folder)
    content, manifest = read_manifest(place)
    path = _find(place, "windows.safetensors")
    _check_hash(path, manifest["windows_sha256"])
    told = manifest["calibration"]
    ids, weights = _load_windows(path)
    windows = TokenWindows(
        ids=ids,
        weights=weights,
        source=told["source"],
        sha256=told["sha256"],
        notes=tuple(told["notes"]),
    )
    if hash_windows(windows.ids, windows.weights) != windows.sha256:
        raise CalibrationError(f"{path} does not hold the windows that {STATISTICS} names")
    return StoredStatistics(place, manifest, hashlib.sha256(content).hexdigest(), windows)


def _load_windows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return ids int64 [N, T] and weights float32 [N, T].

    Raises:
        CalibrationError: the file holds something else.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"cannot read {path}: {error}; calibrate again") from None
    ids, weights = tensors.get("ids"), tensors.get("weights")
    if (
        ids is None
        or weights is None
        or (ids.dtype, weights.dtype) != (torch.int64, torch.float32)
        or ids.shape != weights.shape
        or ids.dim() != 2
        or not ids.numel()
    ):
        raise CalibrationError(f"{path} does not hold windows of tokens: calibrate again")
    return ids.numpy(), weights.numpy()


def check_model(stored: StoredStatistics, name: str, files: Mapping[str, str]) -> None:
    """Refuse the statistics of another model.

    Args:
        name: of the model that is to be quantized.
        files: file name -> sha256 of its files.

    Raises:
        CalibrationError: its config or its weights are not those that were calibrated.
    """
    taken = stored.manifest["model"]
    before, after = _identity(taken["files"]), _identity(files)
    if before == after:
        return
    changed = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    raise CalibrationError(
        f"the statistics in {stored.folder} are of {taken['name']}, and {name} has other files "
        f"({', '.join(changed[:3])}{more}): calibrate this model, or name that one"
    )


def _identity(files: Mapping[str, str]) -> dict[str, str]:
    """The files that statistics depend on: windows of token ids are theirs, no tokenizer is."""
    return {
        name: digest
        for name, digest in files.items()
        if name == "config.json" or name.endswith(_WEIGHTS_AND_CONFIG)
    }


def note_origin(stored: StoredStatistics, plan: Plan) -> list[str]:
    """What a report has to say of a job that was solved from statistics."""
    count, length = stored.windows.ids.shape
    notes = [
        f"statistics of the original model, taken on {count} windows of {length} tokens of "
        f"{stored.windows.source}; the sequential walk would feed each block what the quantized "
        f"ones before it give"
    ]
    if any(block.looks_at_whole_model for block in plan.blocks):
        notes.append(
            "effort best: no layer makes up for what those before it lost, which only the "
            "sequential walk knows"
        )
    return notes


def check_holds(stored: StoredStatistics, plan: Plan) -> None:
    """Refuse a plan that needs what was not stored; all that is missing is listed.

    Raises:
        PlanError: something is.
    """
    problems: list[str] = []
    holds = stored.manifest["holds"]
    if plan.choice is not None:
        problems.append(
            "auto measures the layers' sensitivity with forward passes of its own, which "
            "statistics do not replace: quantize without them, or name schemes in overrides"
        )
    if plan.kv_cache is not None and not stored.has_key_value:
        problems.append(f"kv_cache needs the ranges of keys and values: {holds['no_key_value']}")
    if any(block.looks_at_whole_model for block in plan.blocks) and not stored.has_fisher:
        problems.append(
            "effort best needs the Fisher matrices of the layers: calibrate with a recipe that has "
            "quantize.effort best, or use effort normal"
        )
    for block in plan.blocks:
        groups = _describe(stored, block).get("groups", {})
        for group in block.groups:
            if not any(linear.needs_statistics for linear in group.linears):
                continue
            first = group.linears[0].name
            about = groups.get(first)
            names = [linear.name for linear in group.linears]
            if about is None or about["layers"] != names:
                problems.append(f"the input of {first} was not watched: calibrate again")
    if problems:
        raise PlanError([f"the statistics in {stored.folder}: {line}" for line in problems])


def _describe(stored: StoredStatistics, block: BlockPlan) -> Mapping[str, Any]:
    found = stored.manifest["blocks"].get(str(block.index))
    return found if isinstance(found, dict) else {}


def load_stats(
    stored: StoredStatistics, block: BlockPlan, group: GroupPlan, device: torch.device
) -> LayerStats | None:
    """Return the statistics of a group's input; None where none were taken, see `check_holds`.

    Raises:
        CalibrationError: the block's file is missing or damaged.
    """
    first = group.linears[0].name
    about = _describe(stored, block).get("groups", {}).get(first)
    if about is None:
        return None
    tensors = _read(
        stored,
        f"block-{block.index:05d}.safetensors",
        _describe(stored, block)["sha256"],
        [f"{kind}:{first}" for kind in ("moment", "mean", "absmax", "sample")],
        device,
    )
    size = about["features"]
    _check_shapes(stored, first, size, tensors)
    moment = torch.empty(size, size, dtype=torch.float32, device=device)
    flat, start = tensors[f"moment:{first}"], 0
    for panel in filled_panels(moment):
        panel.copy_(flat[start : start + panel.numel()].reshape(panel.shape))
        start += panel.numel()
        row = size - panel.shape[1]
        stop = row + len(panel)
        moment[stop:, row:stop] = moment[row:stop, stop:].T
    sample = tensors.get(f"sample:{first}")
    return LayerStats(
        second_moment=moment,
        tokens=about["tokens"],
        mean=tensors.get(f"mean:{first}"),
        absmax=tensors.get(f"absmax:{first}"),
        sample=None if sample is None else sample.float(),
        bfloat16=about["bfloat16"],
    )


def _check_shapes(
    stored: StoredStatistics, first: str, size: int, tensors: Mapping[str, Tensor]
) -> None:
    """Refuse tensors that are not those of an input of so many features.

    Raises:
        CalibrationError: one has another shape, or there is no second moment.
    """
    panels = sum(min(PANEL, size - start) * (size - start) for start in range(0, size, PANEL))
    shapes = {"moment": (panels,), "mean": (size,), "absmax": (size,)}
    wrong = f"moment:{first}" not in tensors
    for name, tensor in tensors.items():
        kind = name.partition(":")[0]
        expected = shapes.get(kind, (*tensor.shape[:1], size))
        wrong = wrong or tuple(tensor.shape) != expected or not tensor.is_floating_point()
    if wrong:
        raise CalibrationError(
            f"the statistics in {stored.folder} are damaged (the input of {first}): calibrate again"
        )


def load_kv_stats(stored: StoredStatistics, block: BlockPlan, device: torch.device) -> KvStats:
    """Return what is known of a block's keys and values, where `has_key_value`.

    Raises:
        CalibrationError: the block's file is missing or damaged.
    """
    about = _describe(stored, block)
    names = ["key_absmax", "value_absmax", "key_errors"]
    file = f"block-{block.index:05d}.safetensors"
    tensors = _read(stored, file, about["sha256"], names, device)
    key, value, errors = map(tensors.get, names)
    if (
        not _is_matrix(key)
        or not _is_matrix(value)
        or (errors is not None and (not _is_matrix(errors) or errors.shape[1:] != key.shape[:1]))
    ):
        raise CalibrationError(f"{stored.folder / file} is damaged (keys, values): calibrate again")
    return KvStats(key, value, about["kv_tokens"], errors)


def _is_matrix(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return tensor is not None and tensor.dim() == 2 and tensor.is_floating_point()


def load_fishers(
    stored: StoredStatistics, block: BlockPlan, device: torch.device
) -> dict[str, Tensor]:
    """Return the Fisher matrices of a block's layers by the layers' names, where `has_fisher`.

    Raises:
        CalibrationError: the block's file is missing or damaged.
    """
    digest = _describe(stored, block).get("fisher_sha256")
    if digest is None:
        return {}
    found = _read(stored, f"fisher-{block.index:05d}.safetensors", digest, None, device)
    missing = [each.name for each in block.linears if not _is_matrix(found.get(each.name))]
    if missing:
        raise CalibrationError(
            f"the statistics in {stored.folder} are damaged (the Fisher matrix of {missing[0]}): "
            f"calibrate again"
        )
    return found


def _read(
    stored: StoredStatistics,
    file: str,
    digest: str,
    names: Sequence[str] | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """Read the named tensors that a file has, or all, into memory of their own."""
    path = _find(stored.folder, file)
    if file not in stored.verified:
        _check_hash(path, digest)
        stored.verified.add(file)
    try:
        with safe_open(path, framework="pt") as reader:
            there = list(reader.keys())
            wanted = there if names is None else [name for name in names if name in there]
            return {name: reader.get_tensor(name).to(device) for name in wanted}
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"cannot read {path}: {error}") from error


def _find(folder: Path, file: str) -> Path:
    try:
        return join_inside(folder, file)
    except CheckpointError as error:
        raise CalibrationError(str(error)) from None


def _check_hash(path: Path, digest: str) -> None:
    try:
        with path.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror}; calibrate again") from error
    if found != digest:
        raise CalibrationError(
            f"{path} is damaged: its sha256 is not the one in {STATISTICS}; calibrate again"
        )
