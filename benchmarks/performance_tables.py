"""The tables of what run.py measured, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bound import BOUND_DTYPES
from cases import CASES, OURS, RIVAL
from contest import describe_versions
from measure import spread

PROMISES = {
    "speed_up": ("times faster than {rival}, at least", 1.0, "{:.1f}"),
    "memory_share": ("peak memory over that of {rival}, at most", 1.0, "{:.2f}"),
    "bound_ratio": ("times the bound in {dtype}, at most", 1.0, "{:.2f}"),
    "memory_bytes": ("peak memory, MB, at most", 1e6, "{:.0f}"),
    "device_bytes": ("GPU memory, MB, at most", 1e6, "{:.0f}"),
    "seconds": ("seconds, at most", 1.0, "{:.0f}"),
}
"""Promise -> its words, its unit, how its numbers are written."""
WITHIN = ("calibrate", "solve")
"""Parts of the stage `quantize`."""


def render_page(document: Mapping[str, Any]) -> str:
    """Return performance.md: the tables, and how each case was run."""
    lines = ["# Speed and memory", "", render_tables(document), ""]
    for entry in document["cases"]:
        lines += [*_describe_entry(entry), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def render_tables(document: Mapping[str, Any]) -> str:
    """Return the tables, for each machine its own, without a line end behind them."""
    machines: dict[str, list[Mapping[str, Any]]] = {}
    for entry in document["cases"]:
        machines.setdefault(name_machine(entry["machine"]), []).append(entry)
    if not machines:
        return "No case has been measured yet."
    lines: list[str] = []
    for machine, entries in machines.items():
        lines += [f"On {machine}:", ""]
        for table in (_runs_table, _bound_table, _promises_table, _prediction_table):
            rows = table(entries)
            lines += [*rows, ""] if rows else []
    return "\n".join(lines).rstrip("\n")


def name_machine(machine: Mapping[str, Any]) -> str:
    """Return the processor, the memory and the GPU of a machine in one line."""
    words = f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    return f"{machine['gpu']}; {words}" if "gpu" in machine else words


def label(entry: Mapping[str, Any]) -> str:
    """Return the name of a case, with what makes it another one than that."""
    shape, known = entry["shape"], CASES[entry["case"]]
    words = [entry["case"]]
    if shape["name"] != known.shape.name:
        words.append(f"on the shape {shape['name']}")
    elif shape["layers"] != entry["whole_layers"]:
        words.append(f"**only {shape['layers']} of {entry['whole_layers']} blocks**")
    if entry["device"] != known.device:
        words.append(f"on {entry['device']}")
    return ", ".join(words)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> list[str]:
    """A Markdown table whose first `words` columns are not numbers; nothing without rows."""
    if not rows:
        return []
    rule = ["---" if index < words else "---:" for index in range(len(header))]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def _runs_table(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    header = ["case", "tool", "runs", "seconds", "processor seconds", "peak memory, MB"]
    header += ["GPU memory, MB", "times faster", "times the bound"]
    rows = []
    for entry in entries:
        for tool, found in entry["tools"].items():
            faster, bound = "", ""
            if tool == OURS:
                compared, bounded = entry["comparison"], entry["bound"]
                faster = f"{compared['speed_up']:.1f}" if compared else ""
                bound = f"{bounded['ratio']:.2f}" if bounded else ""
            rows.append(
                (
                    label(entry),
                    tool,
                    str(len(found["runs"])),
                    _show(found["seconds"], 1, 1),
                    _show(found["cpu_seconds"], 1, 1),
                    _show(found["peak_bytes"], 1e6, 0),
                    _show(found["device_peak_bytes"], 1e6, 0),
                    faster,
                    bound,
                )
            )
    return _table(header, rows, words=2)


def _show(found: Mapping[str, float] | None, unit: float, digits: int) -> str:
    """`median (low-high)`, and the median alone of values that are the same when shown."""
    if found is None:
        return ""
    median, low, high = (f"{found[key] / unit:.{digits}f}" for key in ("median", "low", "high"))
    return median if low == high else f"{median} ({low}-{high})"


def _bound_table(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    header = ["case", "forward, TFLOP", "second moments, TFLOP", "precision of products"]
    header += ["GFLOP/s", "bound, s", "times the bound"]
    rows = []
    for entry in entries:
        bound = entry["bound"]
        if bound is not None:
            work = bound["operations"]
            rows += [
                (
                    label(entry),
                    f"{work['forward'] / 1e12:.3f}",
                    f"{work['second_moments'] / 1e12:.3f}",
                    dtype,
                    _show(bound["operations_per_second"][dtype], 1e9, 0),
                    f"{seconds:.1f}",
                    f"{bound['ratios'][dtype]:.2f}",
                )
                for dtype, seconds in bound["seconds"].items()
            ]
    return _table(header, rows, words=1)


def _promises_table(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for entry in entries:
        for promise in entry["promises"]:
            words, unit, digits = PROMISES[promise["what"]]
            words = words.format(rival=RIVAL, dtype=BOUND_DTYPES[entry["device"]])
            value, state = promise["value"], promise["state"]
            rows.append(
                (
                    label(entry),
                    words,
                    digits.format(promise["limit"] / unit),
                    "" if value is None else digits.format(value / unit),
                    f"**{state}**" if state == "not met" else state,
                )
            )
    # The last column is words again; its alignment does not matter.
    return _table(("case", "promised", "limit", "measured", "state"), rows, words=2)


def _prediction_table(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What jobs foretold of themselves, where their evidence says so; times are sums of stages."""
    rows = []
    for entry in entries:
        predicted = [timing["predicted"] for timing in entry["timings"] if timing.get("predicted")]
        if predicted:
            rows.append(
                (
                    label(entry),
                    _show(spread([_sum_stages(each["seconds"]) for each in predicted]), 1, 1),
                    _show(spread([_sum_stages(t["seconds"]) for t in entry["timings"]]), 1, 1),
                    _show(spread([each["peak_memory_bytes"] for each in predicted]), 1e6, 0),
                    _show(entry["tools"][OURS]["peak_bytes"], 1e6, 0),
                )
            )
    header = ["case", "predicted seconds of the stages", "measured"]
    header += ["predicted peak memory, MB", "measured"]
    return _table(header, rows, words=1)


def _sum_stages(seconds: Mapping[str, float]) -> float:
    return sum(value for stage, value in seconds.items() if stage not in WITHIN)


def _describe_entry(entry: Mapping[str, Any]) -> list[str]:
    shape = entry["shape"]
    read = "no calibration"
    if entry["windows"]:
        read = f"{entry['windows']} calibration windows of {entry['length']} tokens"
    threads = entry["environment"].get("OMP_NUM_THREADS")
    lines = [
        f"## {label(entry).replace('**', '')}",
        "",
        f"{entry['method']}, {entry['scheme']}, effort {entry['effort']}, {read}, on a Llama of "
        f"{shape['layers']} blocks, hidden {shape['hidden']}, feed-forward "
        f"{shape['intermediate']}, {shape['heads']} heads, {shape['kv_heads']} key/value heads, "
        f"vocabulary {shape['vocabulary']}: {entry['weight_bytes'] / 1e9:.2f} GB.",
        "",
        f"- machine: {name_machine(entry['machine'])}; the job computed in {entry['dtype']}"
        + (f"; OMP_NUM_THREADS={threads}" if threads else ""),
        f"- quantkit: {describe_versions(entry['versions'])}; commit {entry['commit']}",
    ]
    if RIVAL in entry["tools"]:
        lines.append(f"- {RIVAL}: {describe_versions(entry['rival_versions'])}")
    return [*lines, f"- command: `{entry['command']}`"]
