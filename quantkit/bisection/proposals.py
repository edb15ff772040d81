"""What to write into the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from quantkit.bisection.choosing import Choice
from quantkit.bisection.records import AGAIN, ORIGINAL, Proposal, Remedy, Unit
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.inspected import Inspection
from quantkit.ggml_types import GGUF

_FLOATS = {"BF16": "BF16", "F16": "F16"}
"""Dtype of the original -> the type in a GGUF file that holds it; others need F32."""


def propose(
    found: Inspection, choice: Choice, units: Mapping[str, Unit], base: Checkpoint
) -> Proposal:
    """Make the overrides that stand for a choice, and the size with them."""
    tensor_bytes = found.tensor_bytes + choice.added_bytes
    bits = 8 * tensor_bytes / found.parameters
    if choice.remedy == AGAIN:
        return Proposal(AGAIN, choice.layers, "", tensor_bytes, bits, choice.judgement)
    if found.format == GGUF:
        rows = [_type_row(name, choice.remedy, base) for name in choice.layers]
        # The mix is the recipe's own; only what is new is said.
        rows = _shorten(rows, units, base)
        tree: dict[str, Any] = {"export": [{"format": GGUF, "overrides": rows}]}
        scheme = str(rows[0]["type"])
    else:
        scheme = "none" if choice.remedy == ORIGINAL else choice.remedy
        rows = [_scheme_row(units[name], scheme) for name in choice.layers]
        tree = {"quantize": {"overrides": _shorten(rows, units, base)}}
    return Proposal(
        scheme=scheme,
        layers=choice.layers,
        recipe=yaml.safe_dump(tree, sort_keys=False, default_flow_style=False),
        tensor_bytes=tensor_bytes,
        bits_per_weight=bits,
        judgement=choice.judgement,
    )


def _scheme_row(unit: Unit, scheme: str) -> dict[str, Any]:
    row: dict[str, Any] = {"match": unit.name, "scheme": scheme}
    if scheme != "none":
        row["group_size"] = unit.form.group_size or "channel"
    return row


def _type_row(name: str, remedy: Remedy, base: Checkpoint) -> dict[str, Any]:
    kind = remedy
    if remedy == ORIGINAL:
        # A head of the artifact's own may be tied in the original.
        stored = base.tensors.get(f"{name}.weight")
        kind = "F32" if stored is None else _FLOATS.get(stored.dtype, "F32")
    return {"match": f"{name}.weight", "type": kind}


def _shorten(
    rows: Sequence[Mapping[str, Any]], units: Mapping[str, Unit], base: Checkpoint
) -> list[dict[str, Any]]:
    """Bring rows together where one pattern matches the chosen layers and no others.

    Others of the same kind may be in float, and would be rounded by what was not measured.
    """
    matrices = [name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")]
    chosen = {str(row["match"]).removesuffix(".weight") for row in rows}
    short: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = str(row["match"]).removesuffix(".weight")
        ending = str(row["match"]).removeprefix(name)
        unit = units[name]
        alike = {each for each in matrices if each.endswith(f".{unit.kind}")}
        whole = unit.block is not None and len(alike) > 1 and alike <= chosen
        match = f"*.{unit.kind}{ending}" if whole else str(row["match"])
        short.setdefault(match, {**row, "match": match})
    return list(short.values())
