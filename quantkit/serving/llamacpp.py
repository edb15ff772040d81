"""`llama-server`, by the options of tools/server/README.md of llama.cpp (build 11549)."""

from __future__ import annotations

from quantkit.serving.fitting import GIB, Needs
from quantkit.serving.records import (
    Machine,
    MemoryPlan,
    Rendered,
    Target,
    Wish,
    publish_port,
)

SHARE = 0.9
BASE = GIB // 2
"""CUDA's context or the program itself: a guess."""
STEP_TOKENS = 512
"""--ubatch-size."""
Q8_0_BYTES = 34 / 32
"""Of a number: 32 of them and a scale take 34 bytes."""


def find_needs(target: Target, machine: Machine, wish: Wish) -> Needs:
    """Return what llama.cpp takes; each GPU has layers of its own."""
    return Needs(SHARE, _width(wish), BASE, STEP_TOKENS, divides_layers=False)


def _width(wish: Wish) -> float:
    return Q8_0_BYTES if wish.kv_cache == "8bit" else 2.0


def name_cache_type(wish: Wish) -> str:
    """llama.cpp's name of the cache's type."""
    return "q8_0" if wish.kv_cache == "8bit" else "f16"


def render(target: Target, machine: Machine, memory: MemoryPlan, wish: Wish, name: str) -> Rendered:
    """Return the command; each slot has its part of the context."""
    options = ["-c", str(memory.context * memory.concurrency), "-np", str(memory.concurrency)]
    layers = len(target.shape.layers) + 1 if machine.gpus else 0
    options += ["-ngl", str(layers)]
    if name_cache_type(wish) != "f16":
        options += ["-ctk", name_cache_type(wish), "-ctv", name_cache_type(wish)]
    options += ["-a", name]
    place = ["--host", wish.host, "--port", str(wish.port)]
    notes = []
    if memory.concurrency > 1:
        notes.append(
            f"-c is for all {memory.concurrency} slots together: {memory.context} tokens each"
        )
    return Rendered(
        command=("llama-server", "-m", target.location, *options, *place),
        container=_container(target, machine, options, wish),
        notes=tuple(notes),
        api_key_variable="LLAMA_API_KEY",
    )


def _container(target: Target, machine: Machine, options: list[str], wish: Wish) -> tuple[str, ...]:
    """llama.cpp's published image; see docs/docker.md of llama.cpp."""
    assert target.folder is not None
    words = ["docker", "run", "--rm", *publish_port(wish)]
    if machine.gpus:
        words += ["--gpus", "all"]
    words += ["-v", f"{target.folder.absolute()}:/models:ro"]
    image = f"ghcr.io/ggml-org/llama.cpp:server{'-cuda' if machine.gpus else ''}"
    file = f"/models/{target.location.rpartition('/')[2]}"
    place = ["--host", "0.0.0.0", "--port", str(wish.port)]
    return (*words, image, "-m", file, *options, *place)
