"""A block on its way: what is known while it is solved, its frozen record, and its replay."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from quantkit.numerics.affine import decode
from quantkit.ranks import ALONE, Ranks
from quantkit.records import (
    BlockPlan,
    GroupPlan,
    KvRecord,
    LayerRecord,
    QuantizedLayer,
    SolvedBlock,
)


@dataclass
class Draft:
    """What is known of a block while its groups are being solved.

    ranks: the processes that solve it together, in step. What a choice depends on is the same for
    all; the choice is the first one's.
    """

    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    records: list[LayerRecord] = field(default_factory=list)
    replay: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)
    kv: KvRecord | None = None
    encoded: dict[str, Tensor] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    divided: dict[str, Tensor] = field(default_factory=dict)
    ranks: Ranks = ALONE


def finish_block(block: BlockPlan, draft: Draft) -> SolvedBlock:
    """Freeze a block whose groups are all solved."""
    return SolvedBlock(
        block.index,
        tuple(draft.layers.values()),
        dict(draft.dense),
        tuple(draft.records),
        dict(draft.replay),
        dict(draft.added),
        draft.kv,
        dict(draft.encoded),
        dict(draft.importance),
        dict(draft.divided),
    )


def replay_input_group(group: GroupPlan, block: SolvedBlock) -> dict[str, Tensor]:
    """Return the weights and biases that the walk had for a group of a block solved before.

    They are bit-equal to those that `solve_input_group` returned, so that a resumed job ends in
    the same bytes.
    """
    layers = {layer.name: layer for layer in block.layers}
    linears = [linear for linear in group.linears if linear.quantized]
    fold = block.replay.get(f"fold:{linears[0].name}")
    live = {}
    for linear in linears:
        layer = layers[linear.name]
        scale = block.replay.get(f"scale:{linear.name}", layer.scale)
        weight = decode(layer.codes, scale, layer.zero_point, layer.scheme)
        live[f"{linear.name}.weight"] = weight if fold is None else weight / fold
        bias = block.replay.get(f"bias:{linear.name}")
        if bias is not None:
            live[f"{linear.name}.bias"] = bias.float()
    return live
