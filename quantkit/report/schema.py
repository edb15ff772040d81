"""The JSON Schema of report.json: which keys there are, and what each means."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from quantkit.records import (
    Allocation,
    Check,
    Footprint,
    Generation,
    KvRecord,
    LayerRecord,
    Parting,
    Probe,
    Speed,
    TaskResult,
    Verdict,
)

SCHEMA = 1
"""Raised when a key changes its meaning or goes; new keys alone do not raise it."""

_NUMBER: Mapping[str, Any] = {"type": ["number", "null"]}
"""Null where it is a NaN or an infinity, which JSON lacks."""


def document_schema() -> dict[str, Any]:
    """Return the schema of `report_document`'s data, in draft 2020-12 of JSON Schema.

    Every key that is written is required; others may come without a new `SCHEMA`, so more keys are
    allowed. What is a record of quantkit has the fields of that record.
    """
    whole = _object(
        "What a job or a gate found. Numbers are unrounded; null stands for what was not measured "
        "or is not finite. Shares are fractions, divergences are nats per token.",
        {
            "schema": {"const": SCHEMA},
            "model": _text("the baseline, as the user named it"),
            "verdict": _verdict(
                "of the job: the worst of its artifacts', or the best of those that compete"
            ),
            "baseline": _object(
                "the original", {"name": _text(""), "size_bytes": {"type": "integer"}}
            ),
            "artifacts": _list("what was judged", _artifact()),
            "layers": _list("how each layer was solved", _record(LayerRecord)),
            "kv_cache": _list("scales of a quantized cache", _record(KvRecord)),
            "allocation": _maybe(_record(Allocation)),
            "comparison": {"type": "boolean", "description": "whether the artifacts compete"},
            "differences": _list("of each pair of artifacts that compete", _difference()),
            "baseline_footprint": _maybe(_record(Footprint)),
            "notes": _list("what the reader should know", _text("")),
            "evidence": {
                "type": "object",
                "description": "recipe, versions, hashes, data and timings; its keys depend on "
                "the job",
            },
        },
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "report.json of quantkit",
        **whole,
        "$defs": {
            "interval": _object(
                "a value and the bounds of its confidence interval",
                dict.fromkeys(("value", "low", "high"), _NUMBER),
            )
        },
    }


def _artifact() -> dict[str, Any]:
    return _object(
        "one artifact",
        {
            "name": _text(""),
            "path": _text("of the artifact, relative to the job's folder, or as it was given"),
            "format": _text("for instance compressed-tensors, gguf, onnx"),
            "scheme": _text(""),
            "size_bytes": {"type": "integer", "description": "bytes of all tensors"},
            "bits_per_weight": _number("8 x size / parameters of the original"),
            "runtime": _text("what computed it; empty where nothing was measured"),
            "task": _maybe(_text("what an encoder is for; null for decoders")),
            "metrics": _metrics(),
            "measures": _list("what encoders are judged by", _measure()),
            "speed": _list("baseline and artifact, alternately", _record(Speed)),
            "checks": _list("each limit and what follows", _check()),
            "verdict": _verdict("of the artifact"),
            "reasons": _list("why it is not PASS", _text("")),
            "confidence": _number("of the intervals that decided"),
            "windows": {"type": "integer", "description": "windows (or texts) that were measured"},
            "looks": _list("numbers of windows at which might be judged", {"type": "integer"}),
            "measured_with": {
                "type": "object",
                "description": "packages, dtype and device",
                "additionalProperties": {"type": "string"},
            },
            "details": _maybe(_details()),
            "probes": _list("behaviour beside the baseline's", _record(Probe)),
            "tasks": _list("tasks of lm-eval, on the same documents", _record(TaskResult)),
            "footprint": _maybe(_record(Footprint)),
        },
    )


def _check() -> dict[str, Any]:
    found = _record(Check)
    own = _object(
        "of a check of the user's own, which has no interval, and may have no numbers",
        {
            "detail": _text("what it found"),
            "function": _text("its qualified name"),
            "sha256": _maybe(_text("of its source")),
        },
    )
    return _object(found["description"], {**found["properties"], "custom": _maybe(own)})


def _metrics() -> dict[str, Any]:
    perplexity = dict.fromkeys(("baseline", "value", "increase", "low", "high"), _NUMBER)
    kl = dict.fromkeys(("mean", "p99", "max", "low", "high"), _NUMBER)
    return _object(
        "of decoders",
        {
            "perplexity": _maybe(_object("low and high bound the increase", perplexity)),
            "kl": _maybe(_object("KL(baseline || artifact)", kl)),
            "top1_agreement": _maybe(_value("share of positions with the same first token")),
        },
    )


def _measure() -> dict[str, Any]:
    keys = {"name": _text(""), "baseline": _NUMBER, "value": _NUMBER}
    return _object("one measure", keys | {"low": _NUMBER, "high": _NUMBER})


def _details() -> dict[str, Any]:
    share = _number("share of positions")
    numbers = {name: _list("", _NUMBER) for name in ("baseline_nll", "artifact_nll", "kl")}
    return _object(
        "what the windows show besides the metrics with limits",
        {
            "reverse_kl": _value("KL(artifact || baseline)"),
            "top5_agreement": _value(
                "share of the baseline's five first tokens that are among the artifact's"
            ),
            "flips": _value(
                "share of positions at which exactly one model puts the token that came first"
            ),
            "lost": share | {"description": "share of positions at which only the baseline does"},
            "positions": _list(
                "by position in the window",
                _object(
                    "positions start to stop - 1, from 0",
                    {
                        "start": {"type": "integer"},
                        "stop": {"type": "integer"},
                        "kl": _value(""),
                        "top1_agreement": _value(""),
                    },
                ),
            ),
            "domains": _list(
                "by kind of text",
                _object(
                    "one kind; the interval is over windows that hold some",
                    {
                        "name": _text(""),
                        "windows": {"type": "integer"},
                        "tokens": {"type": "integer"},
                        "kl": _value(""),
                        "perplexity_increase": _NUMBER,
                        "top1_agreement": _NUMBER,
                    },
                ),
            ),
            "partings": _list("of the worst windows, the worst first", _record(Parting)),
            "generations": _list("continuations side by side", _record(Generation)),
            "windows": _object(
                "one number a window: its number in the data, and means over its positions",
                {"numbers": _list("", {"type": "integer"}), **numbers},
            ),
        },
    )


def _difference() -> dict[str, Any]:
    return _object(
        "two artifacts on the same windows",
        {
            "first": _text(""),
            "second": _text(""),
            "windows": {"type": "integer"},
            "kl": _value("mean KL of the first minus that of the second, paired"),
            "significant": {"type": "boolean"},
        },
    )


def _object(description: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    about = {"description": description} if description else {}
    keys = {name: dict(schema) for name, schema in properties.items()}
    return {"type": "object", **about, "required": list(keys), "properties": keys}


def _list(description: str, items: Mapping[str, Any]) -> dict[str, Any]:
    about = {"description": description} if description else {}
    return {"type": "array", **about, "items": dict(items)}


def _maybe(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [dict(schema), {"type": "null"}]}


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description} if description else {"type": "string"}


def _number(description: str) -> dict[str, Any]:
    return {**_NUMBER, "description": description}


def _verdict(description: str) -> dict[str, Any]:
    return {"enum": list(get_args(Verdict)), "description": description}


def _value(description: str) -> dict[str, Any]:
    about = {"description": description} if description else {}
    return {"$ref": "#/$defs/interval", **about}


def _record(record: type[Any]) -> dict[str, Any]:
    """The schema of what `asdict` makes of a record: its fields, by their types."""
    hints = get_type_hints(record)
    lines = (record.__doc__ or "").strip().split("\n\n")[0]
    keys = {field.name: _of_type(hints[field.name]) for field in fields(record)}
    return _object(" ".join(lines.split()), keys)


def _of_type(hint: Any) -> dict[str, Any]:
    """The schema of one field.

    Raises:
        TypeError: a record has a field of a kind that no schema is known for.
    """
    plain = {str: "string", bool: "boolean", int: "integer"}
    if hint in plain:
        return {"type": plain[hint]}
    if hint is float:
        return dict(_NUMBER)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (types.UnionType, Union) and type(None) in inner and len(inner) == 2:
        (kind,) = (each for each in inner if each is not type(None))
        found = _of_type(kind)
        return found if found == _NUMBER else _maybe(found)
    if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        return _list("", _of_type(inner[0]))
    if is_dataclass(hint) and isinstance(hint, type):
        return _record(hint)
    raise TypeError(f"no schema for a field of type {hint!r}")
