"""The results of run.py: medians, ratios, what became of the promises, and what is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bound import BOUND_DTYPES
from cases import CASES, OURS, RIVAL, Case
from measure import RESULTS, ROOT, Measured, spread
from performance_tables import render_page, render_tables
from shapes import SHAPES

NAME = "performance"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- results: begin -->\n", "\n<!-- results: end -->"
"""What the generated tables stand between in the documentation."""
QUANTITIES = ("seconds", "cpu_seconds", "peak_bytes", "device_peak_bytes")


# --- an entry ---------------------------------------------------------------------------------


def summarize(
    case: Case,
    measured: Mapping[str, Sequence[Measured]],
    work: Mapping[str, int] | None,
    speeds: Sequence[Mapping[str, Any]],
    circumstances: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a case's entry of the results.

    Args:
        case: what was run.
        measured: tool -> its runs.
        work: `forward` and `second_moments`, operations; None: the job reads no windows.
        speeds: operations per second of each probe: `float32`, `bfloat16`.
        circumstances: what else the entry says: machine, versions, commit, command.
    """
    tools = {tool: _describe_runs(runs) for tool, runs in measured.items()}
    bound = None if work is None else _bound(case.device, work, speeds, tools[OURS])
    entry = {
        "case": case.name,
        "shape": asdict(case.shape),
        "whole_layers": SHAPES[case.shape.name].layers,
        "method": case.method,
        "scheme": case.scheme,
        "effort": case.effort,
        "device": case.device,
        "windows": case.windows,
        "length": case.length,
        "tools": tools,
        "comparison": _compare(tools),
        "bound": bound,
        **circumstances,
    }
    return {**entry, "promises": judge_promises(case, entry)}


def _describe_runs(runs: Sequence[Measured]) -> dict[str, Any]:
    described: dict[str, Any] = {"runs": [asdict(run) for run in runs]}
    for quantity in QUANTITIES:
        values = [value for run in runs if (value := getattr(run, quantity)) is not None]
        described[quantity] = spread(values) if values else None
    return described


def _compare(tools: Mapping[str, Any]) -> dict[str, float] | None:
    """Our medians against those of the rival, where it ran."""
    if RIVAL not in tools:
        return None
    ours, rival = tools[OURS], tools[RIVAL]
    return {
        "speed_up": rival["seconds"]["median"] / ours["seconds"]["median"],
        "memory_share": ours["peak_bytes"]["median"] / rival["peak_bytes"]["median"],
    }


def _bound(
    device: str,
    work: Mapping[str, int],
    speeds: Sequence[Mapping[str, Any]],
    ours: Mapping[str, Any],
) -> dict[str, Any]:
    """The operations, how fast they can be, and how far from it the job is."""
    operations = sum(work.values())
    measured = {
        dtype: spread([speed[dtype] for speed in speeds]) for dtype in ("float32", "bfloat16")
    }
    seconds = {dtype: operations / speed["median"] for dtype, speed in measured.items()}
    ratios = {dtype: ours["seconds"]["median"] / bound for dtype, bound in seconds.items()}
    judged = BOUND_DTYPES[device]
    return {
        "operations": dict(work),
        "threads": speeds[0]["threads"],
        "operations_per_second": measured,
        "seconds": seconds,
        "ratios": ratios,
        "judged_by": judged,
        "ratio": ratios[judged],
    }


# --- promises ---------------------------------------------------------------------------------


def judge_promises(case: Case, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare an entry with what is promised of its case.

    Absolute limits are those of the whole model, and are not judged on a shortened one.

    Returns:
        For each promise `what`, `limit` and `value` in its unit, and `state`: `met`, `not met`, or
        `not judged: ` and why.
    """
    promises, compared, bound = case.promises, entry["comparison"], entry["bound"]
    alone = "the rival was not run"
    ratios = [
        ("speed_up", compared and compared["speed_up"], alone),
        ("memory_share", compared and compared["memory_share"], alone),
        ("bound_ratio", bound and bound["ratio"], "there is no bound"),
    ]
    ours = entry["tools"][OURS]
    absolute = [
        (what, found and found["median"], "it was not measured")
        if case.whole
        else (what, None, "the model is shortened")
        for what, found in (
            ("memory_bytes", ours["peak_bytes"]),
            ("device_bytes", ours["device_peak_bytes"]),
            ("seconds", ours["seconds"]),
        )
    ]
    judged = []
    for what, value, missing in (*ratios, *absolute):
        limit = getattr(promises, what)
        if limit is not None:
            state = f"not judged: {missing}" if value is None else _judge(what, limit, value)
            judged.append({"what": what, "limit": limit, "value": value, "state": state})
    return judged


def _judge(what: str, limit: float, value: float) -> str:
    kept = value >= limit if what == "speed_up" else value <= limit
    return "met" if kept else "not met"


# --- files ------------------------------------------------------------------------------------


def merge(document: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results with an entry in the place of the last one of its case.

    A shortened model and another device are not the same case. One without the rival replaces one
    with it.
    """
    others = [old for old in document["cases"] if _key(old) != _key(entry)]
    order = list(CASES)
    merged = sorted(
        [*others, entry],
        key=lambda found: (order.index(found["case"]), -found["shape"]["layers"], _key(found)),
    )
    return {"cases": merged}


def _key(entry: Mapping[str, Any]) -> tuple[str, str, int, str]:
    shape = entry["shape"]
    return entry["case"], shape["name"], shape["layers"], entry["device"]


def read_results(folder: Path) -> dict[str, Any]:
    """Return the results kept in a folder; no cases where there are none."""
    path = folder / f"{NAME}.json"
    if not path.exists():
        return {"cases": []}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def keep_result(folder: Path, entry: Mapping[str, Any]) -> None:
    """Merge an entry into the results of a folder, make the tables again and print the entry's."""
    document = merge(read_results(folder), entry)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=2, ensure_ascii=False)
    (folder / f"{NAME}.json").write_text(text + "\n", encoding="utf-8")
    render_again(folder)
    print(render_tables({"cases": [entry]}), flush=True)


def render_again(folder: Path) -> None:
    """Write performance.md, and the tables of the documentation where the folder is their own."""
    document = read_results(folder)
    (folder / f"{NAME}.md").write_text(render_page(document), encoding="utf-8")
    if folder.resolve() == RESULTS:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(insert_tables(page, render_tables(document)), encoding="utf-8")


def insert_tables(page: str, tables: str) -> str:
    """Return the page with the tables between its two marks."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return f"{page[:start]}{tables}{page[end:]}"
