"""Which linear layers of a decoder block share an input, from a data file or from a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from quantkit.checkpoint.families import Family, Fold, load_family
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import build_skeleton, summarize_names
from quantkit.checkpoint.trace import BlockStructure, InputGroup, trace_blocks
from quantkit.errors import CheckpointError
from quantkit.records import FoldPlan

STRUCTURAL = "structural"
"""Name of the family of a model that was traced."""


@dataclass(frozen=True)
class Structure:
    """The decoder blocks of a model, and what in them is left alone."""

    family: str
    blocks: tuple[BlockStructure, ...]
    notes: tuple[str, ...]


def find_groups(checkpoint: Checkpoint, skeleton: nn.Module | None = None) -> Structure:
    """Find the decoder blocks and the linear layers in them that share an input.

    A family's data file says it and where scales can be folded. For other models one forward of
    a few tokens through a model of zeros tells which layers are called with the same input; nothing
    is folded then, and layers that share an input are taken to be fused by a server.

    Raises:
        CheckpointError: the data file does not describe the model, or it cannot be traced.
    """
    skeleton = skeleton if skeleton is not None else build_skeleton(checkpoint)
    family = load_family(str(checkpoint.config.get("model_type")))
    if family is None:
        blocks = trace_blocks(checkpoint)
        name = STRUCTURAL
    else:
        blocks = apply_family(family, skeleton)
        name = family.name
    return Structure(name, blocks, _note_left_alone(skeleton, blocks))


def apply_family(family: Family, skeleton: nn.Module) -> tuple[BlockStructure, ...]:
    """Give a family's groups the full names of each block of the model."""
    try:
        for name in (family.embedding, family.final_norm):
            skeleton.get_submodule(name)
        count = len(_as_list(skeleton.get_submodule(family.blocks)))
        blocks = []
        for index in range(count):
            prefix = f"{family.blocks}.{index}"
            groups = []
            for group in family.groups:
                names = tuple(f"{prefix}.{name}" for name in group.linears)
                linears = [_as_linear(skeleton.get_submodule(name)) for name in names]
                groups.append(InputGroup(names, _plan_fold(group.fold, prefix, skeleton, linears)))
            fused = tuple(tuple(f"{prefix}.{name}" for name in part) for part in family.fused)
            attention = None if family.attention is None else f"{prefix}.{family.attention}"
            if attention is not None:
                skeleton.get_submodule(attention)
            blocks.append(BlockStructure(prefix, tuple(groups), fused, attention))
    except (AttributeError, TypeError) as error:
        raise CheckpointError(
            f"the family file {family.name} does not describe this model: {error}"
        ) from None
    return tuple(blocks)


def _as_list(module: nn.Module) -> nn.ModuleList:
    if not isinstance(module, nn.ModuleList):
        raise TypeError(f"{type(module).__name__} is not a list of blocks")
    return module


def _as_linear(module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{type(module).__name__} is not a linear layer")
    return module


def _plan_fold(
    fold: Fold | None, prefix: str, skeleton: nn.Module, linears: Sequence[nn.Linear]
) -> FoldPlan | None:
    """Place a fold, and count how often an output of the layer in front is read.

    Raises:
        AttributeError, TypeError: the module in front is not there or does not fit.
    """
    if fold is None:
        return None
    name = f"{prefix}.{fold.module}"
    module = skeleton.get_submodule(name)
    if fold.kind == "norm":
        return FoldPlan(name, "norm")
    channels, features = _as_linear(module).out_features, linears[0].in_features
    if not fold.per_head:
        if channels != features:
            raise TypeError(f"{name} has {channels} outputs for {features} inputs")
        return FoldPlan(name, "linear")
    attention = skeleton.get_submodule(name.rpartition(".")[0])
    head_dim = int(attention.head_dim)  # type: ignore[arg-type]
    if features % channels or channels % head_dim:
        raise TypeError(f"{name} has {channels} outputs for {features} inputs")
    return FoldPlan(name, "linear", features // channels, head_dim)


def _note_left_alone(skeleton: nn.Module, blocks: Sequence[BlockStructure]) -> tuple[str, ...]:
    """Say which weights no group holds: nothing is left out silently."""
    planned = {name for block in blocks for group in block.groups for name in group.linears}
    prefixes = tuple(f"{block.prefix}." for block in blocks)
    head = _name_of(skeleton, _output_embedding(skeleton))
    linears = [
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and name not in planned and name != head
    ]
    covered = {f"{name}.weight" for name in (*planned, *linears)}
    others = [
        name
        for name, parameter in skeleton.named_parameters()
        if parameter.ndim >= 2 and name.startswith(prefixes) and name not in covered
    ]
    notes = []
    for names, why in ((linears, "in no input group"), (others, "not a linear layer")):
        notes += [f"left alone: {name} ({why})" for name in summarize_names(names)]
    return tuple(notes)


def output_embedding_name(skeleton: nn.Module) -> str | None:
    """Return the full name of the layer that makes logits, `lm_head` in most models."""
    return _name_of(skeleton, _output_embedding(skeleton))


def _output_embedding(skeleton: nn.Module) -> nn.Module | None:
    head: nn.Module | None = skeleton.get_output_embeddings()  # type: ignore[operator]
    return head


def _name_of(skeleton: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in skeleton.named_modules() if module is wanted), None)
