"""Plans and solved blocks of pico models, made by plain rounding."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


def make_case(folder: Path, choices: Sequence[Choice], *, scale_dtype: str = "bfloat16") -> Case:
    """Round the layers of the model in `folder` that match; the first choice that matches wins."""
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


def _choose(name: str, choices: Sequence[Choice]) -> tuple[str, int | None]:
    for pattern, scheme, group_size in choices:
        if fnmatch.fnmatch(name, pattern):
            return scheme, group_size
    return "none", None


def _solve(checkpoint: Checkpoint, plan: Plan, block: BlockPlan) -> SolvedBlock:
    layers = []
    for group in block.groups:
        for linear in group.linears:
            if linear.quantized:
                weight = read_tensor(checkpoint, f"{linear.name}.weight").float()
                scale, zero_point = choose_absmax(
                    weight, linear.scheme, linear.group_size, getattr(torch, plan.scale_dtype)
                )
                codes = quantize(weight, scale, zero_point, linear.scheme.weight_bits)
                layers.append(
                    QuantizedLayer(
                        linear.name, linear.scheme, linear.group_size, codes, scale, zero_point
                    )
                )
    return SolvedBlock(block.index, tuple(layers), {}, ())


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
