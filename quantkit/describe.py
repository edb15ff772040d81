"""JSON-ready descriptions of what a job worked with: for evidence, and for a resume to compare."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quantkit import tracing
from quantkit.functions import describe_function
from quantkit.records import Artifact, OpenChoice, Plan, Source, TextRows, TokenWindows

_PACKAGES = (
    "torch",
    "transformers",
    "compressed-tensors",
    "safetensors",
    "tokenizers",
    "numpy",
    "numba",
    "triton",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-genai",
)


@dataclass
class Stopwatch:
    """Seconds spent in each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to `stage`, which is a span where spans are recorded."""
        start = time.perf_counter()
        try:
            with tracing.span(stage):
                yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
            tracing.tell_peak_memory(peak_memory_bytes)


def peak_memory_bytes() -> int:
    """The most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def package_versions() -> dict[str, str]:
    """Versions of what computed the result."""
    found = {"python": sys.version.split()[0]}
    for package in ("quantkit", *_PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe_windows(windows: TokenWindows | None) -> dict[str, Any] | None:
    """Where token windows came from, their shape and their hash."""
    if windows is None:
        return None
    count, length = windows.ids.shape
    return {
        "source": windows.source,
        "sha256": windows.sha256,
        "windows": count,
        "sequence_length": length,
        "notes": list(windows.notes),
    }


def describe_texts(rows: TextRows | None) -> dict[str, Any] | None:
    """Where the texts of an encoder came from, how many there are, and their hash."""
    if rows is None:
        return None
    return {
        "source": rows.source,
        "sha256": rows.sha256,
        "texts": len(rows.ids),
        "pairs": len(rows.pairs),
        "labels": len(rows.labels),
        "tokens": sum(map(len, rows.ids)),
        "longest": max(map(len, rows.ids)),
        "notes": list(rows.notes),
    }


def describe_artifact(artifact: Artifact, root: Path) -> dict[str, Any]:
    """An artifact's files and their hashes, with its folder relative to `root`."""
    return {
        "name": artifact.name,
        "format": artifact.format,
        "path": artifact.folder.relative_to(root).as_posix(),
        "files": dict(sorted(artifact.files.items())),
        "tensor_bytes": artifact.tensor_bytes,
        "bits_per_weight": artifact.bits_per_weight,
    }


def describe_model(source: Source, files: Mapping[str, str]) -> dict[str, Any]:
    """The checkpoint: what the user called it, its revision, its files' hashes."""
    found = {"name": source.name, "revision": source.revision, "files": dict(sorted(files.items()))}
    # Of a model in memory: where it once came from says nothing of the weights that it has now.
    return found if source.loaded_from is None else {**found, "loaded_from": source.loaded_from}


def describe_plan(plan: Plan) -> dict[str, Any]:
    """The part of a plan that the solved blocks depend on."""
    layers = {
        linear.name: [
            linear.scheme.name,
            linear.group_size,
            linear.method.name,
            linear.effort.name,
            *(["one scale"] if linear.one_scale else []),
            *linear.ggml_types,
        ]
        for linear in plan.linears
    }
    return {
        "family": plan.family,
        "scale_dtype": plan.scale_dtype,
        "layers": layers,
        "kv_cache": None if plan.kv_cache is None else asdict(plan.kv_cache),
        "gguf_leads": plan.gguf_leads,
        "choice": None if plan.choice is None else _describe_choice(plan.choice),
        **describe_solvers(plan),
    }


def describe_solvers(plan: Plan) -> dict[str, Any]:
    """Say of each of the user's own solvers, by its name, which code it is; empty without one."""
    candidates = () if plan.choice is None else plan.choice.units
    open_linears = (
        linear for unit in candidates for each in unit.candidates for linear in each.linears
    )
    found: dict[str, Any] = {}
    for linear in (*plan.linears, *open_linears):
        solver = linear.method.solver
        if solver is not None:
            found[linear.method.name.rpartition("+")[2]] = {
                **asdict(describe_function(solver.function)),
                "needs_statistics": solver.needs_statistics,
            }
    return {"solvers": dict(sorted(found.items()))} if found else {}


def _describe_choice(choice: OpenChoice) -> dict[str, Any]:
    """What a choice of schemes depends on besides the model and the data."""
    return {
        "target_bits": choice.target_bits,
        "max_kl": choice.max_kl,
        "measured": [choice.windows, choice.window_tokens],
        "candidates": {
            unit.candidates[0].linears[0].name: [
                [candidate.scheme, candidate.size_bytes] for candidate in unit.candidates
            ]
            for unit in choice.units
        },
    }
