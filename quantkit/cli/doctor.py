"""`quantkit doctor`: what this machine has, what it can do, and what to install for the rest."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import quantkit
from quantkit.cli.console import Reply
from quantkit.cli.layout import Line, make_table
from quantkit.cli.options import JsonOption, QuietOption
from quantkit.cli.runtimes import findings_document
from quantkit.judging.abilities import RuntimeFindings, examine_runtimes
from quantkit.report.rounding import format_bytes, format_significant

EXAMPLE = "Example: quantkit doctor"

_REQUIRED = (
    "accelerate",
    "compressed-tensors",
    "greenlet",
    "huggingface-hub",
    "jinja2",
    "numpy",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "regex",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "typer",
)
_OPTIONAL = {
    "datasets": "calibration data by datasets id",
    "lm-eval": "judging by lm-eval tasks",
    "numba": "encoding GGUF types as fast as llama.cpp",
    "onnx": "writing and reading ONNX files",
    "onnxruntime-genai": "decoders as ONNX files, and their gate",
    "onnxscript": "encoders as ONNX files",
}
_OPTIONAL_INSTALL = {
    "datasets": 'pip install "quantkit[datasets]"',
    "lm-eval": 'pip install "quantkit[tasks]"',
    "numba": 'pip install "quantkit[fast]"',
    "onnx": 'pip install "quantkit[onnx]"',
    "onnxruntime-genai": 'pip install "quantkit[onnx]"',
    "onnxscript": 'pip install "quantkit[onnx]"',
}
_RUNTIME_PURPOSES = {
    "transformers": "every job",
    "vllm": "the gate in vLLM",
    "llama.cpp": "the gate of GGUF files, in llama.cpp",
    "onnxruntime": "the gate of ONNX files, in ONNX Runtime",
}


@dataclass(frozen=True)
class Missing:
    """A package or runtime that is absent or broken, what it is for, and how to get it."""

    package: str
    purpose: str
    install: str
    required: bool


def doctor(json: JsonOption = False, quiet: QuietOption = False) -> Reply:
    """Check the machine: hardware, packages, runtimes, and the speed of a matmul."""
    versions = {name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)}
    runtimes = examine_runtimes({})
    missing = [*_find_missing(versions), *_find_missing_runtimes(runtimes)]
    document = {
        "quantkit": quantkit.__version__,
        "machine": _examine_machine(),
        "packages": versions,
        "runtimes": {findings.runtime: findings_document(findings) for findings in runtimes},
        "missing": [asdict(item) for item in missing],
        "device": _examine_device() if versions["torch"] else None,
    }
    broken = any(item.required for item in missing)
    return Reply(document, _lines(document, runtimes, missing), exit_code=2 if broken else 0)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _find_missing(versions: dict[str, str | None]) -> list[Missing]:
    absent = [name for name in _REQUIRED if versions[name] is None]
    install = f"pip install {' '.join(absent)}"
    found = [Missing(name, "every job", install, True) for name in absent]
    return found + [
        Missing(name, purpose, _OPTIONAL_INSTALL[name], False)
        for name, purpose in _OPTIONAL.items()
        if versions[name] is None
    ]


def _find_missing_runtimes(runtimes: Sequence[RuntimeFindings]) -> list[Missing]:
    """Runtimes that are nowhere, broken, or made from other versions; what to run for each."""
    # Packages of transformers that are absent have lines of their own.
    return [
        Missing(found.runtime, _RUNTIME_PURPOSES[found.runtime], "  or  ".join(found.advice), False)
        for found in runtimes
        if found.advice and found.runtime != "transformers"
    ]


def _examine_machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    page = os.sysconf("SC_PAGE_SIZE")
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": sys.version.split()[0],
        "cores": cores,
        "memory_bytes": page * os.sysconf("SC_PHYS_PAGES"),
        "free_disk_bytes": shutil.disk_usage(os.getcwd()).free,
    }


def _examine_device() -> dict[str, Any]:
    """The GPUs that torch sees, and the matmul speeds that choose the compute dtype."""
    import torch

    from quantkit.calibration.compute import choose_compute_dtype, choose_device

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append({"name": properties.name, "memory_bytes": properties.total_memory})
    device = choose_device("auto")
    dtype, probe = choose_compute_dtype(device)
    return {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "float32_gflops": probe.float32_gflops,
        "bfloat16_gflops": probe.bfloat16_gflops,
    }


def _lines(
    document: dict[str, Any], runtimes: Sequence[RuntimeFindings], missing: Sequence[Missing]
) -> list[Line]:
    machine = document["machine"]
    rows = [
        ("machine", f"{machine['system']}, Python {machine['python']}"),
        ("cores", str(machine["cores"])),
        ("memory", format_bytes(machine["memory_bytes"])),
        ("free disk", f"{format_bytes(machine['free_disk_bytes'])} in the working folder"),
        *_device_rows(document["device"]),
        *((name, found or "missing") for name, found in document["packages"].items()),
        *((f"runtime {found.runtime}", _say(found)) for found in runtimes),
    ]
    advice = [f"missing: {item.package} (for {item.purpose}): {item.install}" for item in missing]
    return [make_table(rows), *(advice or ["Nothing is missing."])]


def _device_rows(device: dict[str, Any] | None) -> list[tuple[str, str]]:
    if device is None:
        return []
    rows = [
        ("GPU", f"{gpu['name']}, {format_bytes(gpu['memory_bytes'])}") for gpu in device["gpus"]
    ] or [("GPU", "none that torch sees")]
    if device["device"] == "cpu":
        float32, bfloat16 = (
            format_significant(device[f"{name}_gflops"]) for name in ("float32", "bfloat16")
        )
        speeds = f"{float32} GFLOP/s in float32, {bfloat16} in bfloat16"
        rows.append(("matmul", f"{speeds}, {device['threads']} threads"))
    rows.append(("computes in", f"{device['compute_dtype']} on {device['device']}"))
    return rows


def _say(found: RuntimeFindings) -> str:
    """Where a runtime is, and what it can do or what is wrong with it."""
    if found.where == "nowhere":
        return "; ".join(["not found", *found.notes])
    place = f"{found.where} ({found.python})" if found.where == "its environment" else found.where
    if found.abilities is None:
        return f"broken, in {place}: {found.problem}"
    can = found.abilities
    abilities = (
        can.version,
        f"in {place}",
        f"on {can.computes_on}",
        f"generation {can.generation}",
        f"KV cache {can.kv_cache}",
        f"loads {can.loads}",
    )
    return "; ".join([*abilities, *found.notes])
