"""The compressed-tensors writer: solved blocks and the checkpoint's other bytes -> an artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.block_writing import Dialect, plain_config, write_blocks
from quantkit.formats.encoding import encode_part, specify_layer
from quantkit.formats.kv_scales import specify_scales
from quantkit.formats.layouts import INPUT_SCALE, PARTS
from quantkit.formats.quantization_config import build_quantization_config
from quantkit.formats.shards import write_document
from quantkit.records import Artifact, Plan, SolvedBlock

FORMAT = "compressed-tensors"


def write_compressed_tensors(
    checkpoint: Checkpoint,
    plan: Plan,
    blocks: Callable[[int], SolvedBlock],
    folder: Path,
    max_shard_bytes: int,
) -> Artifact:
    """Write the artifact into `folder`; see `write_blocks`.

    Raises:
        CheckpointError, ResourceError, OutputError, ValueError: as `write_blocks`.
    """
    return write_blocks(checkpoint, plan, blocks, folder, max_shard_bytes, _DIALECT)


def _write_config(
    checkpoint: Checkpoint, plan: Plan, skeleton: torch.nn.Module, folder: Path
) -> dict[str, str]:
    """Write the checkpoint's config with the description of what is quantized."""
    modules = [
        name for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    config = plain_config(checkpoint)
    description = build_quantization_config(plan.linears, modules, plan.kv_cache)
    if description is not None:
        config["quantization_config"] = description
    return {"config.json": write_document(folder / "config.json", config)}


_DIALECT = Dialect(
    format=FORMAT,
    parts=frozenset(PARTS),
    specify_layer=specify_layer,
    encode_part=encode_part,
    specify_scales=specify_scales,
    place_scales=dict,
    is_late=lambda spec: spec.name.endswith(f".{INPUT_SCALE}"),
    write_documents=_write_config,
)
