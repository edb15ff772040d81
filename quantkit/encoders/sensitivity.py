"""How much each quantized layer costs the whole encoder, and which layers to leave in float.

The cost is what users see: the mean of 1 - cosine between embeddings with and without INT8, or
the mean KL divergence between the labels' probabilities; of a single score, its squared error as a
share of the scores' variance. Shapes: B texts, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from quantkit.encoders.data import make_batches
from quantkit.encoders.model import run_encoder
from quantkit.encoders.simulation import simulated
from quantkit.numerics.divergence import quick_divergence
from quantkit.records import Event, Progress
from quantkit.records.encoders import EncoderInfo, EncoderLayer, EncoderTable, TextRows

AUTO_ERROR = 0.005
"""For `float_layers: auto`: mean cost below which all layers are quantized. It is half of what the
gate lets an embedding lose."""

MOST_FLOAT = 0.1
"""Share of the quantized weights that `auto` leaves in float at the most: each takes four times
the bytes, and its layer the time of the original."""

MEASURED_TEXTS = 32
_BATCH_TOKENS = 1024


@dataclass(frozen=True)
class FloatChoice:
    """Layers that stay in float, in the order of the forward, and what is to be said of them."""

    layers: tuple[str, ...]
    notes: tuple[str, ...]


def choose_float_layers(
    model: nn.Module,
    info: EncoderInfo,
    layers: Sequence[EncoderLayer],
    tables: Sequence[EncoderTable],
    rows: TextRows,
    wanted: int | Literal["auto"],
    tell: Progress,
) -> FloatChoice:
    """Choose the layers that lower the cost the most, each measured by leaving it alone in float.

    Args:
        model: float32.
        layers, tables: all that are quantized.
        rows: texts; up to 32 of them, evenly spread, are used.
        wanted: how many layers; auto: as few as bring the cost to `AUTO_ERROR`, but no more than a
            tenth of the weights.
    """
    texts = _spread(rows)
    exact = list(_outputs(model, info, texts))
    # The tables in float are made once: they are the largest part of a small encoder.
    with simulated(model, (), tables):
        total = _cost(model, info, layers, texts, exact)
        if wanted == "auto" and total <= AUTO_ERROR:
            return FloatChoice((), (f"{_describe(info)} on {len(texts.ids)} texts: {total:.2g}",))
        gains = []
        for number, layer in enumerate(layers):
            tell(Event("sensitivity", number, len(layers), layer.name))
            others = [each for each in layers if each is not layer]
            gains.append(total - _cost(model, info, others, texts, exact))
        tell(Event("sensitivity", len(layers), len(layers)))
        chosen = _choose(layers, gains, total, wanted)
        left = [layer for layer in layers if layer.name not in chosen]
        after = _cost(model, info, left, texts, exact)
    names = tuple(layer.name for layer in layers if layer.name in chosen)
    return FloatChoice(names, tuple(_notes(info, layers, chosen, (total, after), texts, wanted)))


def _choose(
    layers: Sequence[EncoderLayer],
    gains: Sequence[float],
    total: float,
    wanted: int | Literal["auto"],
) -> frozenset[str]:
    """Take layers by their gain; gains of single layers add up to first order."""
    order = sorted(range(len(layers)), key=lambda index: (-gains[index], index))
    if wanted != "auto":
        return frozenset(layers[index].name for index in order[:wanted])
    budget = MOST_FLOAT * sum(layer.codes.numel() for layer in layers)
    chosen: list[str] = []
    for index in order:
        size = layers[index].codes.numel()
        if total <= AUTO_ERROR or gains[index] <= 0:
            break
        if size <= budget:
            chosen.append(layers[index].name)
            budget -= size
            total -= gains[index]
    return frozenset(chosen)


def _notes(
    info: EncoderInfo,
    layers: Sequence[EncoderLayer],
    chosen: frozenset[str],
    costs: tuple[float, float],
    texts: TextRows,
    wanted: int | Literal["auto"],
) -> Iterator[str]:
    before, after = costs
    yield (
        f"{_describe(info)} on {len(texts.ids)} texts: {before:.2g} with all layers in INT8, "
        f"{after:.2g} with {len(chosen)} of {len(layers)} left in float"
    )
    if wanted == "auto" and after > AUTO_ERROR:
        yield (
            f"that is above {AUTO_ERROR:g}, and more layers in float would take more than "
            f"{MOST_FLOAT:.0%} of the weights; export.float_layers sets their number"
        )


def _describe(info: EncoderInfo) -> str:
    if info.task == "embedding":
        return "mean 1 - cosine"
    if info.multi_label:
        return "mean KL divergence of labels, summed over them"
    if len(info.labels) == 1:
        return "mean squared error of scores, as a share of their variance"
    return "mean KL divergence of labels"


def _spread(rows: TextRows) -> TextRows:
    """Return a few texts, evenly spread."""
    count = len(rows.ids)
    kept = sorted({index * count // MEASURED_TEXTS for index in range(MEASURED_TEXTS)})
    return TextRows(
        ids=tuple(rows.ids[index] for index in kept),
        type_ids=tuple(rows.type_ids[index] for index in kept),
        labels=(),
        pairs=(),
        source=rows.source,
        sha256=rows.sha256,
    )


def _outputs(
    model: nn.Module, info: EncoderInfo, texts: TextRows
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the outputs of each batch, and its attention mask."""
    for _, arrays in make_batches(texts, info, _BATCH_TOKENS):
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with torch.no_grad():
            yield run_encoder(model, info, batch), batch["attention_mask"]


def _cost(
    model: nn.Module,
    info: EncoderInfo,
    layers: Sequence[EncoderLayer],
    texts: TextRows,
    exact: Sequence[tuple[Tensor, Tensor]],
) -> float:
    """Return the mean cost of quantizing `layers` besides what is quantized already."""
    parts = []
    with simulated(model, layers):
        for (found, mask), (wanted, _) in zip(_outputs(model, info, texts), exact, strict=True):
            parts.append(_compare(info, *_outputs_that_count(info, wanted, found, mask)))
    cost = float(torch.cat(parts).double().mean())
    return cost / _variance(info, exact) if _is_score(info) else cost


def _is_score(info: EncoderInfo) -> bool:
    """Whether the model gives one number, of which there is no distribution."""
    return info.task != "embedding" and len(info.labels) == 1 and not info.multi_label


def _variance(info: EncoderInfo, exact: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the variance of all scores, or where they are all alike their mean square."""
    pairs = [_outputs_that_count(info, wanted, wanted, mask)[0] for wanted, mask in exact]
    scores = torch.cat([each.reshape(-1) for each in pairs]).double()
    return float(scores.var(correction=0)) or float(scores.square().mean()) or 1.0


def _outputs_that_count(
    info: EncoderInfo, wanted: Tensor, found: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Leave out the labels of padding."""
    if info.task == "token-classification":
        return wanted[mask > 0], found[mask > 0]
    return wanted, found


def _compare(info: EncoderInfo, wanted: Tensor, found: Tensor) -> Tensor:
    """Return the costs of the texts, or of the tokens where those have labels; of scores their
    squared errors."""
    if info.task == "embedding":
        return 1 - nn.functional.cosine_similarity(wanted, found, dim=-1)
    if info.multi_label:
        both = _binary_divergence(wanted, found) + _binary_divergence(-wanted, -found)
        return both.sum(dim=-1)
    if _is_score(info):
        return (wanted - found).square().squeeze(-1)
    return quick_divergence(torch.log_softmax(wanted, dim=-1), found)


def _binary_divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Return the part that one outcome has in the KL divergence of two probabilities.

    Args:
        wanted, found: logits of the outcome.
    """
    known = nn.functional.logsigmoid(wanted)
    return known.exp() * (known - nn.functional.logsigmoid(found))
