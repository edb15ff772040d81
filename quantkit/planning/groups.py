"""What the solvers of an input group do, as counts that time and memory are foretold by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.records import BlockPlan, GroupPlan, LinearPlan


@dataclass(frozen=True)
class SolvedMatrix:
    """Layers of a group that are solved as one matrix of `rows` x `columns`."""

    rows: int
    columns: int
    first: LinearPlan
    """Whose scheme, method and effort all of them have."""

    @property
    def elements(self) -> int:
        """Weights of the matrix."""
        return self.rows * self.columns


def solved_matrices(group: GroupPlan) -> list[SolvedMatrix]:
    """Return the quantized layers of a group, those with equal settings as one matrix.

    Layers that are rounded plainly are done one by one.
    """
    members: dict[object, list[LinearPlan]] = {}
    for linear in group.linears:
        if linear.quantized:
            alone = linear.name if linear.method.rounder == "rtn" else None
            key = (linear.scheme, linear.group_size, linear.method, linear.effort, alone)
            members.setdefault(key, []).append(linear)
    return [
        SolvedMatrix(sum(each.out_features for each in found), found[0].in_features, found[0])
        for found in members.values()
    ]


def block_weights(block: BlockPlan) -> int:
    """Weights of a block's linear layers."""
    return sum(linear.out_features * linear.in_features for linear in block.linears)


def group_weights(groups: Sequence[GroupPlan]) -> int:
    """Weights of the linear layers of some groups."""
    return sum(
        linear.out_features * linear.in_features for group in groups for linear in group.linears
    )


def holds_outputs(group: GroupPlan) -> bool:
    """Whether the outputs of a group stay alive while the next one's input is computed.

    Attention has its queries, keys and values at hand until its output layer has run; a
    feed-forward multiplies what its first layers give, and drops them.
    """
    parent = group.linears[0].name.rpartition(".")[0].rpartition(".")[2]
    return "att" in parent.lower()
