"""Per-layer records put in order: which block, which kind, which ones are worst."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quantkit.records import LayerRecord
from quantkit.report.rounding import ABSENT, format_percent, format_significant

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class LayerRow:
    """One layer, rounded for people. `record` has the same unrounded."""

    name: str
    block: int | None
    scheme: str
    bits: str
    method: str
    output_error: float | None
    error: str
    ratio: float | None
    against_rounding: str
    """Its output error as a multiple of plain rounding's: `0.43×`."""
    weight_error: str
    damping: str
    scaling: str
    """The transform of the input that was kept, with its exponent: `awq 0.45`."""
    fallback: str
    """Why it got something other than what was asked for; empty where it did not."""
    record: LayerRecord


def layer_rows(layers: Iterable[LayerRecord]) -> tuple[LayerRow, ...]:
    """Return one row a layer, in the order of the records."""
    return tuple(_layer_row(record) for record in layers)


def _layer_row(record: LayerRecord) -> LayerRow:
    ratio = rounding_ratio(record)
    return LayerRow(
        name=record.name,
        block=locate(record.name)[0],
        scheme=_describe_layer(record),
        bits=f"{record.bits_per_weight:.3f}",
        method=_describe_method(record),
        output_error=output_error(record),
        error=format_percent(output_error(record)),
        ratio=ratio,
        against_rounding=ABSENT if ratio is None else f"{ratio:.2f}×",
        weight_error=format_percent(record.weight_error),
        damping=format_significant(record.damping, 2),
        scaling=_describe_scaling(record),
        fallback=record.fallback or "",
        record=record,
    )


def _describe_layer(record: LayerRecord) -> str:
    """Return the scheme with its groups, or the type with the GGUF file: `Q6_K of Q4_K_M`."""
    if record.file_type is not None:
        return f"{record.scheme} of {record.file_type}"
    return describe_scheme(record.scheme, record.group_size)


def _describe_method(record: LayerRecord) -> str:
    """Return the method and what was done after it: `gptq, bias corrected`."""
    notes = (
        ("Fisher", record.coupled),
        ("drift followed", record.followed_drift),
        ("bias corrected", record.bias_corrected),
    )
    more = [words for words, holds in notes if holds]
    return ", ".join([record.method, *more])


def _describe_scaling(record: LayerRecord) -> str:
    kept = (("awq", record.awq_exponent), ("smoothed", record.smoothing_exponent))
    return " ".join(f"{name} {value:.2f}" for name, value in kept if value is not None) or ABSENT


def output_error(record: LayerRecord) -> float | None:
    """Return the output error, with rounded activations where the scheme rounds them."""
    if record.activation_error is not None:
        return record.activation_error
    return record.relative_error


def plain_output_error(record: LayerRecord) -> float | None:
    """Return the output error that plain rounding without scaling would have."""
    if record.activation_error is not None:
        return record.rtn_activation_error
    return record.rtn_relative_error


def describe_scheme(scheme: str, group_size: int | None) -> str:
    """Return a scheme with its groups: `w4a16 g128`, `w8a16 per channel`, `none`."""
    if scheme == "none":
        return scheme
    return f"{scheme} g{group_size}" if group_size else f"{scheme} per channel"


def locate(name: str) -> tuple[int | None, str]:
    """Return block index and kind of a layer's full name.

    `model.layers.3.mlp.down_proj` -> (3, "mlp.down_proj"). Further numbers, as of experts, become
    `*`. A layer outside of the blocks has no index and keeps its name.
    """
    match = _BLOCK.search(name)
    if match is None:
        return None, name
    kind = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", "." + name[match.end() :])[1:]
    return int(match.group(1)), kind


def short_kinds(kinds: Sequence[str]) -> dict[str, str]:
    """Map each kind to its last component where that is unique: `self_attn.q_proj` -> `q_proj`."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    return {
        kind: word if last.count(word) == 1 else kind
        for kind, word in zip(kinds, last, strict=True)
    }


def rounding_ratio(record: LayerRecord) -> float | None:
    """Return the output error as a multiple of plain rounding's; None where either is unknown."""
    ours, rounding = output_error(record), plain_output_error(record)
    if ours is None or rounding is None or not (is_positive(ours) and is_positive(rounding)):
        return None
    return ours / rounding


def is_positive(value: float | None) -> bool:
    """Whether a value can stand on a logarithmic scale."""
    return value is not None and math.isfinite(value) and value > 0


def geometric_mean(values: Sequence[float]) -> float | None:
    """Return the geometric mean of positive values, or None where there are none."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def layer_error(record: LayerRecord) -> float:
    """Return the output error, or the weight error where no statistics were taken."""
    error = output_error(record)
    return record.weight_error if error is None else error


def worst_layers(layers: Iterable[LayerRecord], count: int = 3) -> tuple[LayerRecord, ...]:
    """Return the layers with the largest error, largest first; a NaN counts as the largest.

    Where any layer has an output error, only such layers are compared: the two kinds of error are
    not on one scale.
    """
    records = list(layers)
    measured = [record for record in records if output_error(record) is not None] or records

    def order(record: LayerRecord) -> float:
        error = layer_error(record)
        return math.inf if math.isnan(error) else error

    return tuple(sorted(measured, key=order, reverse=True)[:count])
