"""Calibrate once: the statistics of the original model, for many recipes to be solved from.

The walk is that of `quantize`, but nothing is solved on the way: every block is given what the
original ones before it give. What is stored, and how, is in calibration/stored.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.calibrating.taking import (
    KIND,
    Taking,
    check_room,
    plan_taking,
    take_fishers,
    take_statistics,
)
from quantkit.calibration.compute import choose_compute_dtype, choose_device
from quantkit.calibration.sources import find_kind
from quantkit.calibration.stored_manifest import SCHEMA
from quantkit.checkpoint.reader import Checkpoint, hash_files
from quantkit.describe import Stopwatch, describe_model, describe_windows, package_versions
from quantkit.durable import write_words
from quantkit.encoders.architectures import is_encoder
from quantkit.errors import InputError, RecipeError, writing
from quantkit.inputs import RecipeLike
from quantkit.job_windows import find_calibration
from quantkit.materials import (
    Materials,
    check_materials,
    gather_materials,
    opened_model,
    refuse_sharing,
)
from quantkit.numerics.onednn import quick_float32
from quantkit.ranks import read_ranks
from quantkit.recipe import CalibrationSpec, Overrides
from quantkit.records import (
    Event,
    Progress,
    Statistics,
    TokenWindows,
)
from quantkit.running import memory_errors, silent, staged
from quantkit.schemes import EFFORTS
from quantkit.staging import STATISTICS, commit
from quantkit.workspace import (
    Workspace,
    load_about,
    open_workspace,
    take_out,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@quick_float32()
def calibrate(
    recipe: RecipeLike,
    *,
    model: str | os.PathLike[str] | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | os.PathLike[str],
    calibration: Iterable[object] | None = None,
    overrides: Overrides = (),
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Statistics:
    """Walk a model once and store the statistics of all its inputs, for many recipes.

    Of the recipe its `model`, its `calibration` and its `quantize.effort` are used: with effort
    `best` the Fisher matrices are measured too. The statistics of every linear layer of the blocks
    are stored, whatever the recipe would do with it, and the ranges of keys and values where the
    attention layers are known.

    The folder appears when all is done. An interrupted walk leaves the blocks that it has seen in
    `<output>.partial`; the same call walks again and takes only the statistics of the others.

    Args:
        recipe: a `Recipe`, the path of one, or the name of a shipped one.
        model: replaces the recipe's model: a name, or a model of transformers in memory.
        tokenizer: of a model in memory.
        output: folder to make.
        calibration: examples in place of the recipe's data; see `quantize`.
        overrides: `KEY=VALUE` pairs as of `--set`; only for recipes from files.
        device: `auto`, `cpu` or `cuda`.
        overwrite: replace an output that exists, and an unfinished walk that differs.
        progress: called after each step.

    Raises:
        InputError: something that was given cannot be used.
        ResourceError: memory or disk ran out; the blocks that were seen are kept.
    """
    tell = progress or silent
    watch = Stopwatch()
    refuse_sharing(model, None)
    if read_ranks().size > 1:
        raise InputError("statistics are taken by one process: start calibrate without torchrun")
    with ExitStack() as stack, memory_errors():
        with watch.time("prepare"):
            tell(
                Event("prepare", 0, 1, "reading the recipe, the checkpoint's headers and the data")
            )
            materials = gather_materials(
                recipe,
                model=model,
                tokenizer=tokenizer,
                output=output,
                overrides=overrides,
                examples=calibration,
            )
            place = materials.loaded.output
            spec = _find_spec(materials)
            check_materials(materials, overwrite=overwrite, gate=False)
        folder = stack.enter_context(staged(place, overwrite=overwrite, tell=tell))
        with watch.time("prepare"):
            checkpoint = stack.enter_context(opened_model(materials))
            prepared = _prepare(materials, checkpoint, spec, device)
            files = hash_files(checkpoint)
            tell(Event("prepare", 1, 1))
        check_room(prepared, place)
        workspace = open_workspace(folder, _depends_on(prepared, files), restart=overwrite)
        with watch.time("calibrate"):
            take_statistics(prepared, workspace, tell)
        if prepared.wants_fisher:
            with watch.time("fisher"):
                take_fishers(prepared, workspace, tell)
        manifest = _finish(prepared, workspace, folder, files, spec)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        commit(folder, place, overwrite=overwrite)
    return _summarize(prepared, place, manifest, size, watch)


def _find_spec(materials: Materials) -> CalibrationSpec:
    """Return what is to be calibrated on.

    Raises:
        InputError: the recipe does not say, or the data is not there.
    """
    spec = materials.loaded.recipe.calibration
    if spec is None:
        raise RecipeError(
            "nothing to calibrate on: write `calibration:` with `data:` in the recipe"
        )
    if materials.examples is None:
        # Here it is read whatever the recipe's method is.
        find_kind(spec.data)
        if materials.live is not None and materials.live.tokenizer is None:
            raise InputError("the model in memory has no tokenizer to read text: pass tokenizer=")
    return spec


def _prepare(
    materials: Materials, checkpoint: Checkpoint, spec: CalibrationSpec, device: str
) -> Taking:
    """Plan the walk and read the windows."""
    if is_encoder(checkpoint.config):
        raise InputError(
            f"{checkpoint.source.name} is an encoder: its job takes minutes, and takes its "
            f"statistics itself"
        )
    recipe = materials.loaded.recipe
    plan, no_key_value = plan_taking(recipe, checkpoint)
    windows = find_calibration(spec, checkpoint, plan, materials.examples)
    chosen = choose_device(device)
    dtype, _ = choose_compute_dtype(chosen, getattr(torch, plan.scale_dtype))
    effort = EFFORTS[recipe.quantize.effort]
    return Taking(checkpoint, plan, windows, chosen, dtype, effort.whole_model, no_key_value)


def _depends_on(prepared: Taking, files: Mapping[str, str]) -> dict[str, Any]:
    """What the statistics depend on: a walk that goes on must agree in all of it."""
    return {
        "model": dict(sorted(files.items())),
        "calibration": describe_windows(prepared.windows),
        "compute": _describe_compute(prepared),
        "versions": package_versions(),
        "effort": "best" if prepared.wants_fisher else "normal",
    }


def _describe_compute(prepared: Taking) -> dict[str, Any]:
    return {
        "device": prepared.device.type,
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "processes": 1,
    }


def _finish(
    prepared: Taking,
    workspace: Workspace,
    folder: Path,
    files: Mapping[str, str],
    spec: CalibrationSpec,
) -> Mapping[str, Any]:
    """Give the files their names and write the manifest, which makes them statistics."""
    blocks: dict[str, Any] = {}
    for block in prepared.plan.blocks:
        about = load_about(workspace, KIND, block.index)
        place = folder / f"block-{block.index:05d}.safetensors"
        about["sha256"] = take_out(workspace, KIND, block.index, place)
        if prepared.wants_fisher:
            place = folder / f"fisher-{block.index:05d}.safetensors"
            about["fisher_sha256"] = take_out(workspace, "fisher", block.index, place)
        blocks[str(block.index)] = about
    manifest = {
        "schema": SCHEMA,
        "of": "the original model: no block has seen what quantized ones before it give",
        "model": describe_model(prepared.checkpoint.source, files),
        "calibration": describe_windows(prepared.windows),
        "spec": spec.model_dump(mode="json"),
        "compute": _describe_compute(prepared),
        "versions": package_versions(),
        "holds": {
            "key_value": prepared.plan.kv_cache is not None,
            "no_key_value": prepared.no_key_value,
            "fisher": prepared.wants_fisher,
        },
        "windows_sha256": _write_windows(prepared.windows, folder),
        "blocks": blocks,
    }
    write_words(folder / STATISTICS, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def _write_windows(windows: TokenWindows, folder: Path) -> str:
    from safetensors.torch import save_file

    path = folder / "windows.safetensors"
    tensors: dict[str, Tensor] = {
        "ids": torch.from_numpy(windows.ids),
        "weights": torch.from_numpy(windows.weights),
    }
    with writing(path):
        save_file(tensors, path)
        return hashlib.sha256(path.read_bytes()).hexdigest()


def _summarize(
    prepared: Taking, output: Path, manifest: Mapping[str, Any], size: int, watch: Stopwatch
) -> Statistics:
    count, length = prepared.windows.ids.shape
    lacks = ["auto: it measures the sensitivity of the layers with forward passes of its own"]
    if not prepared.wants_fisher:
        lacks.append("effort best: its Fisher matrices are measured for a recipe of effort best")
    if prepared.no_key_value is not None:
        lacks.append(f"kv_cache: {prepared.no_key_value}")
    return Statistics(
        folder=output,
        model=prepared.checkpoint.source.name,
        source=prepared.windows.source,
        windows=count,
        sequence_length=length,
        blocks=len(prepared.plan.blocks),
        inputs=sum(len(about["groups"]) for about in manifest["blocks"].values()),
        size_bytes=size,
        lacks=tuple(lacks),
        notes=prepared.windows.notes,
        seconds=dict(watch.seconds),
    )
