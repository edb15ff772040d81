"""Smooth the input of a group for GGUF files.

llama.cpp rounds what a quantized matrix is multiplied with to eight bits, in blocks of 32 or 256
channels with one scale each (`quantize_row_q8_0`, `quantize_row_q8_K`), so that a channel which is
much larger than its neighbours takes their precision. As for schemes with rounded activations
(`solvers/smoothquant.py`), the columns of the weights are multiplied by a scale that the operation
in front is divided by, and only where the error of held-out tokens falls. A file holds norms in
float32 and a scale for each few weights of a row in float16, so what is in front takes the division
without being rounded anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.blocks.draft import Draft
from quantkit.ggml_types import GGML_TYPES
from quantkit.numerics.ggml.codec import divide_rows
from quantkit.ranks import from_first
from quantkit.records import FoldPlan, GgufPlan, GroupPlan, LayerStats, LinearPlan
from quantkit.schemes import METHODS, SCHEMES
from quantkit.solvers import choose_smoothing, collapse_heads

_JUDGED_AS = SCHEMES["w4a8"]
"""Four bits in groups, inputs of eight bits with a scale a token: near to what llama.cpp does."""
_GROUP_SIZE = 32


def smooth_input(
    group: GroupPlan,
    linears: Sequence[LinearPlan],
    weights: Sequence[Tensor],
    stats: LayerStats,
    tensors: Mapping[str, Tensor],
    draft: Draft,
    files: Sequence[GgufPlan],
) -> tuple[Tensor, float] | None:
    """Choose a scale float32 [I] for the input of a group and note what is divided by it.

    Args:
        linears: the encoded layers of the group; nothing is scaled where one of its layers is not
            encoded in every file.
        weights: float32 [O_i, I], one for each of `linears`.
        stats: of the input.
        tensors: the block's tensors as the checkpoint has them.
        draft: `divided` and `replay` are added to.
        files: of the job.

    Returns:
        The scale by which the columns are to be multiplied, and the exponent that made it; None
        where no scale helps or nothing can take it.
    """
    plan = group.fold
    columns = linears[0].in_features
    if plan is None or len(linears) < len(group.linears) or columns % _GROUP_SIZE:
        return None
    # A layer that a file holds as it is would not be multiplied.
    if not all(GGML_TYPES[name].quantized for linear in linears for name in linear.ggml_types):
        return None
    judged = [
        replace(
            linear,
            scheme=_JUDGED_AS,
            group_size=_GROUP_SIZE,
            method=METHODS["smoothquant+gptq"],
        )
        for linear in linears
    ]
    choice = from_first(
        draft.ranks,
        lambda: choose_smoothing(weights, stats, judged, torch.float16, plan.repeat, plan.head_dim),
    )
    if choice.exponent is None:
        return None
    rows = choice.scale
    if plan.kind == "linear":
        rows = collapse_heads(choice.scale, plan.repeat, plan.head_dim)
        if not _takes(plan, rows, draft, files):
            return None
    for leaf in ("weight", "bias"):
        name = f"{plan.module}.{leaf}"
        if name in tensors:
            draft.divided[name] = rows
    draft.replay[f"smooth:{linears[0].name}"] = choice.scale
    return choice.scale, choice.exponent


def _takes(plan: FoldPlan, rows: Tensor, draft: Draft, files: Sequence[GgufPlan]) -> bool:
    """Whether every file can hold the rows of the layer in front divided."""
    name = f"{plan.module}.weight"
    for number, file in enumerate(files):
        packed = draft.encoded.get(f"{number}:{name}")
        if packed is None:
            continue
        if divide_rows(GGML_TYPES[file.weights[name]], packed, rows) is None:
            return False
    return True
