"""`quantkit doctor`: what this machine has, what it can do, and what to install for the rest."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import quantkit
from quantkit.cli.console import Reply, make_table
from quantkit.cli.options import JsonOption, QuietOption
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
    "numba": "encoding GGUF types as fast as llama.cpp",
    "onnx": "writing and reading ONNX files",
    "onnxruntime": "the gate of ONNX files, in ONNX Runtime",
    "onnxruntime-genai": "decoders as ONNX files, and their gate",
    "onnxscript": "encoders as ONNX files",
    "xllamacpp": "the gate of GGUF files, in llama.cpp",
}
_OPTIONAL_INSTALL = {
    "datasets": 'pip install "quantkit[datasets]"',
    "numba": 'pip install "quantkit[fast]"',
    "onnx": 'pip install "quantkit[onnx]"',
    "onnxruntime": 'pip install "quantkit[onnx]"',
    "onnxruntime-genai": 'pip install "quantkit[onnx]"',
    "onnxscript": 'pip install "quantkit[onnx]"',
    "xllamacpp": 'pip install "quantkit[llama-cpp]"',
}
_RUNTIMES = {
    "transformers": ("torch", "transformers", "compressed-tensors", "accelerate"),
    "vllm": ("vllm",),
    "llama.cpp": ("xllamacpp",),
    "onnxruntime": ("onnxruntime",),
}
"""Runtime -> the packages that make it up."""


@dataclass(frozen=True)
class Missing:
    """A package that is absent, what it is for, and how to get it."""

    package: str
    purpose: str
    install: str
    required: bool


def doctor(json: JsonOption = False, quiet: QuietOption = False) -> Reply:
    """Check the machine: hardware, packages, runtimes, and the speed of a matmul."""
    versions = {name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)}
    missing = _find_missing(versions)
    document = {
        "quantkit": quantkit.__version__,
        "machine": _examine_machine(),
        "packages": versions,
        "runtimes": {name: _examine_runtime(name) for name in _RUNTIMES},
        "missing": [asdict(item) for item in missing],
        "device": _examine_device() if versions["torch"] else None,
    }
    broken = any(item.required for item in missing)
    return Reply(document, _lines(document, missing), exit_code=2 if broken else 0)


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


def _examine_runtime(name: str) -> dict[str, Any]:
    """Whether a runtime is there, and what it can do."""
    versions = {package: _version(package) for package in _RUNTIMES[name]}
    found = all(versions.values())
    return {
        "found": found,
        "packages": versions,
        "abilities": _examine_onnxruntime() if found and name == "onnxruntime" else [],
    }


def _examine_onnxruntime() -> list[str]:
    """What ONNX Runtime computes on, and whether it generates."""
    # It collects usage data unless this is set before it is imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ImportError as error:
        return [f"it cannot be imported: {error}"]
    providers = [
        name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()
    ]
    generator = _version("onnxruntime-genai")
    return [
        f"version {onnxruntime.__version__}",
        f"providers {', '.join(providers)}; the gate uses CPU",
        f"generation by onnxruntime-genai {generator}"
        if generator
        else f"no onnxruntime-genai, which decoders need: {_OPTIONAL_INSTALL['onnxruntime-genai']}",
    ]


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


def _lines(document: dict[str, Any], missing: list[Missing]) -> list[Any]:
    machine = document["machine"]
    rows = [
        ("machine", f"{machine['system']}, Python {machine['python']}"),
        ("cores", str(machine["cores"])),
        ("memory", format_bytes(machine["memory_bytes"])),
        ("free disk", f"{format_bytes(machine['free_disk_bytes'])} in the working folder"),
        *_device_rows(document["device"]),
        *((name, found or "missing") for name, found in document["packages"].items()),
        *((f"runtime {name}", _say(runtime)) for name, runtime in document["runtimes"].items()),
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


def _say(runtime: dict[str, Any]) -> str:
    found = "found" if runtime["found"] else "not found"
    return "; ".join([found, *runtime["abilities"]])
