"""The scales of an FP8 key/value cache, rounded for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quantkit.records import KvRecord
from quantkit.report.rounding import format_significant

KV_TITLES = ("Attention", "Key scale", "Largest key", "Value scale", "Largest value")


@dataclass(frozen=True)
class KvRow:
    """One attention layer. Where there is one figure a head, the smallest and the largest."""

    name: str
    key_scale: str
    key_absmax: str
    value_scale: str
    value_absmax: str


def kv_rows(records: Iterable[KvRecord]) -> tuple[KvRow, ...]:
    """Return one row an attention layer, in the order of the records."""
    return tuple(
        KvRow(
            record.name,
            _range(record.key_scale),
            _range(record.key_absmax),
            _range(record.value_scale),
            _range(record.value_absmax),
        )
        for record in records
    )


def _range(values: Sequence[float]) -> str:
    low, high = (format_significant(bound(values), 3) for bound in (min, max))
    return low if low == high else f"{low} to {high}"
