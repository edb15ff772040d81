"""Plans and solved blocks of pico models, made by plain rounding."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, read_tensor
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.formats.compressed_tensors import write_compressed_tensors
from quantkit.numerics.affine import choose_absmax, quantize
from quantkit.records import (
    Artifact,
    BlockPlan,
    GroupPlan,
    KvCachePlan,
    LinearPlan,
    Plan,
    QuantizedLayer,
    SolvedBlock,
    Source,
)
from quantkit.schemes import METHODS, SCHEMES

Choice = tuple[str, str, int | None]
"""Pattern of layer names, scheme, group size."""

ALL_IN_ONE = 1 << 40

INPUT_SCALE = 0.03125
"""Of every layer with static activations: a value of 4 still has a code of eight bits."""

UNLIKE: list[Choice] = [
    ("*.layers.1.mlp.down_proj", "fp8_dynamic", None),
    ("*.layers.0.mlp.down_proj", "w8a8_static", None),
    ("*.layers.0.mlp.*", "w4a16_asym", 32),
    ("*.layers.0.self_attn.*", "fp8_block", None),
    ("*.layers.1.self_attn.*", "w8a8", None),
]
"""Packed, integer and float layers in one artifact, and some that stay in 16 bits."""

MIXED: list[Choice] = [
    ("*.layers.1.mlp.down_proj", "w8a16", None),
    ("*.layers.0.mlp.*", "w4a16", 128),
    ("*.layers.1.self_attn.*", "none", None),
    ("*", "w4a16", 32),
]
"""Three groups and ignored parts; for models with 128 hidden features."""


@dataclass(frozen=True)
class Case:
    """A pico model, what is planned for it, and the solved blocks."""

    checkpoint: Checkpoint
    plan: Plan
    blocks: dict[int, SolvedBlock]

    @property
    def layers(self) -> dict[str, QuantizedLayer]:
        """All quantized layers by name."""
        return {layer.name: layer for block in self.blocks.values() for layer in block.layers}

    def write(self, folder: Path, max_shard_bytes: int = ALL_IN_ONE) -> Artifact:
        """Write the artifact."""
        return write_compressed_tensors(
            self.checkpoint, self.plan, self.blocks.__getitem__, folder, max_shard_bytes
        )


def make_case(
    folder: Path,
    choices: Sequence[Choice],
    *,
    scale_dtype: str = "bfloat16",
    kv_cache: str = "none",
) -> Case:
    """Round the layers of the model in `folder` that match; the first choice that matches wins.

    Scales that calibration would give are made up.
    """
    checkpoint = open_checkpoint(Source(str(folder), folder, None))
    skeleton = build_skeleton(checkpoint)
    blocks = tuple(
        _plan_block(index, f"model.layers.{index}", block, choices)
        for index, block in enumerate(skeleton.get_submodule("model.layers").children())
    )
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    plan = Plan(
        model="pico",
        family="test",
        blocks=blocks,
        notes=(),
        scale_dtype=scale_dtype,
        parameters=parameters,
        baseline_bytes=0,
        artifact_bytes=0,
        bits_per_weight=0.0,
        block_bytes=0,
        activation_bytes=0,
        statistics_bytes=0,
        disk_bytes=0,
        kv_cache=_plan_cache(skeleton, blocks, kv_cache),
    )
    solved = {block.index: _solve(checkpoint, plan, block) for block in blocks}
    return Case(checkpoint, plan, solved)


def _plan_block(index: int, prefix: str, block: nn.Module, choices: Sequence[Choice]) -> BlockPlan:
    groups = []
    for relative, module in block.named_modules():
        if isinstance(module, nn.Linear):
            name = f"{prefix}.{relative}"
            scheme, group_size = _choose(name, choices)
            linear = LinearPlan(
                name,
                module.out_features,
                module.in_features,
                module.bias is not None,
                SCHEMES[scheme],
                group_size,
                METHODS["rtn"],
            )
            groups.append(GroupPlan((linear,), None))
    return BlockPlan(index, prefix, tuple(groups))


def _plan_cache(
    skeleton: nn.Module, blocks: Sequence[BlockPlan], kv_cache: str
) -> KvCachePlan | None:
    if kv_cache == "none":
        return None
    config: Any = skeleton.config
    names = tuple(f"{block.prefix}.self_attn" for block in blocks)
    per_head = kv_cache == "fp8_per_head"
    return KvCachePlan(per_head, names, config.num_key_value_heads, config.head_dim)


def _choose(name: str, choices: Sequence[Choice]) -> tuple[str, int | None]:
    for pattern, scheme, group_size in choices:
        if fnmatch.fnmatch(name, pattern):
            return scheme, group_size
    return "none", None


def _solve(checkpoint: Checkpoint, plan: Plan, block: BlockPlan) -> SolvedBlock:
    layers = []
    scale_dtype = getattr(torch, plan.scale_dtype)
    for group in block.groups:
        for linear in group.linears:
            if linear.quantized:
                weight = read_tensor(checkpoint, f"{linear.name}.weight").float()
                scheme = linear.scheme
                scale, zero_point = choose_absmax(weight, scheme, linear.group_size, scale_dtype)
                codes = quantize(weight, scale, zero_point, scheme)
                inputs = torch.tensor([INPUT_SCALE], dtype=scale_dtype) if scheme.static else None
                layers.append(
                    QuantizedLayer(
                        linear.name, scheme, linear.group_size, codes, scale, zero_point, inputs
                    )
                )
    return SolvedBlock(block.index, tuple(layers), {}, (), added=_add_scales(plan, block))


def _add_scales(plan: Plan, block: BlockPlan) -> dict[str, Tensor]:
    """Scales of the key/value cache: another one for each block, part and head."""
    cache, added = plan.kv_cache, {}
    for name in cache.attentions if cache is not None else ():
        if cache is not None and name.startswith(f"{block.prefix}."):
            heads = cache.kv_heads if cache.per_head else 1
            for part, unit in (("k_scale", 1 / 64), ("v_scale", 1 / 128)):
                scale = (torch.arange(heads) + block.index + 1) * unit
                shape = (heads, 1, 1) if cache.per_head else (1,)
                dtype = getattr(torch, plan.scale_dtype)
                added[f"{name}.{part}"] = scale.to(dtype).reshape(shape)
    return added


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of an artifact, as the safetensors library reads them."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found = load_file(file)
        assert not tensors.keys() & found.keys()
        tensors |= found
    return tensors


def list_files(folder: Path) -> list[Path]:
    """Return every file below `folder`."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
