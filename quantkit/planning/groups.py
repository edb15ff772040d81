"""What the solvers of an input group do, as counts that time and memory are foretold by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.records import BlockPlan, GroupPlan, LinearPlan
from quantkit.solvers.rounding import alike


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
    """Return the quantized layers of a group, as the solver joins them to matrices."""
    linears = [linear for linear in group.linears if linear.quantized]
    joined = [[linears[index] for index in members] for members in alike(linears)]
    return [
        SolvedMatrix(sum(each.out_features for each in found), found[0].in_features, found[0])
        for found in joined
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
