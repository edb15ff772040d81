"""The writer of ModelOpt's layout: solved blocks, and the checkpoint's other bytes -> a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.block_writing import Dialect, plain_config, write_blocks
from quantkit.formats.modelopt.description import FILE, describe_layers
from quantkit.formats.modelopt.layout import (
    PARTS,
    encode_part,
    is_late,
    place_scales,
    specify_layer,
    specify_scales,
)
from quantkit.formats.shards import write_document
from quantkit.records import Artifact, Plan, SolvedBlock
from quantkit.schemes import MODELOPT, MODELOPT_ALGORITHMS


def write_modelopt(
    checkpoint: Checkpoint,
    plan: Plan,
    blocks: Callable[[int], SolvedBlock],
    folder: Path,
    max_shard_bytes: int,
) -> Artifact:
    """Write the artifact into `folder`; see `write_blocks`.

    Raises:
        CheckpointError, ResourceError, OutputError: as `write_blocks`.
        ValueError: a solved block does not fit the plan, or the plan has more than one algorithm.
    """
    return write_blocks(checkpoint, plan, blocks, folder, max_shard_bytes, _DIALECT)


def _write_documents(
    checkpoint: Checkpoint, plan: Plan, skeleton: nn.Module, folder: Path
) -> dict[str, str]:
    """Write hf_quant_config.json, and the checkpoint's config with the same description."""
    layers = [linear for linear in plan.linears if linear.quantized]
    forms = {(MODELOPT_ALGORITHMS[linear.scheme.name], linear.group_size) for linear in layers}
    if len(forms) != 1:
        raise ValueError(f"one algorithm for all layers was planned, not {sorted(forms)}")
    algorithm, group_size = forms.pop()
    excluded = _find_excluded(checkpoint, skeleton, {linear.name for linear in layers})
    kv_cache = "none" if plan.kv_cache is None else "fp8"
    nested, flat = describe_layers(algorithm, group_size, excluded, kv_cache)
    config = {**plain_config(checkpoint), "quantization_config": flat}
    return {
        FILE: write_document(folder / FILE, nested),
        "config.json": write_document(folder / "config.json", config),
    }


def _find_excluded(checkpoint: Checkpoint, skeleton: nn.Module, quantized: set[str]) -> list[str]:
    """Name the modules that readers could take for quantized ones.

    Those are the linear layers, and whatever else has a matrix: transformers' routers of experts
    are no linear layers, and servers make such of them. ModelOpt lists embeddings, too.
    """
    found = set()
    for name, module in skeleton.named_modules():
        weight = checkpoint.tensors.get(f"{name}.weight")
        if isinstance(module, nn.Linear) or (weight is not None and len(weight.shape) == 2):
            found.add(name)
    return sorted(found - quantized)


_DIALECT = Dialect(
    format=MODELOPT,
    parts=frozenset(PARTS),
    specify_layer=specify_layer,
    encode_part=encode_part,
    specify_scales=specify_scales,
    place_scales=place_scales,
    is_late=is_late,
    write_documents=_write_documents,
)
