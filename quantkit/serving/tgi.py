"""`text-generation-launcher` of TGI 3.3.5, by its docs/source/reference/launcher.md."""

from __future__ import annotations

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
from quantkit.serving.vllm import cache_width, has_eight_bits

SHARE = 0.9
"""--cuda-memory-fraction."""
BASE = 2 * GIB
"""CUDA's context, CUDA graphs and the workspaces of kernels: a guess."""
STEP_TOKENS = 4096
"""--max-batch-prefill-tokens at the least, which warming up computes at once."""
IMAGE = "ghcr.io/huggingface/text-generation-inference:3.3.5"
INSIDE_PORT = 80
"""Of the image."""


def find_needs(target: Target, machine: Machine, wish: Wish) -> Needs:
    """Return what TGI takes."""
    return Needs(SHARE, cache_width(target, wish), BASE, STEP_TOKENS)


def render(target: Target, machine: Machine, memory: MemoryPlan, wish: Wish, name: str) -> Rendered:
    """Return the command; the quantization is read from config.json by the launcher."""
    options = ["--num-shard", str(memory.gpus)]
    if target.revision is not None:
        options += ["--revision", target.revision]
    # The answer needs a token at least.
    options += ["--max-input-tokens", str(memory.context - 1)]
    options += ["--max-total-tokens", str(memory.context)]
    options += ["--max-batch-prefill-tokens", str(max(STEP_TOKENS, memory.context - 1))]
    options += ["--max-batch-total-tokens", str(memory.context * memory.concurrency)]
    options += ["--max-concurrent-requests", str(max(128, memory.concurrency))]
    if has_eight_bits(target, wish):
        options += ["--kv-cache-dtype", "fp8_e4m3fn"]
    options += ["--cuda-memory-fraction", f"{SHARE:g}", "--usage-stats", "off"]
    place = ["--hostname", wish.host, "--port", str(wish.port)]
    notes = ["the model's name in requests is free: TGI serves one model and looks at no name"]
    if wish.kv_cache == "16bit" and target.kv_cache.startswith("fp8"):
        notes.append(
            "TGI takes the FP8 cache that config.json describes; it has no option for 16 bits"
        )
    return Rendered(
        command=("text-generation-launcher", "--model-id", target.location, *options, *place),
        container=_container(target, options, wish),
        notes=tuple(notes),
        api_key_variable="API_KEY",
    )


def _container(target: Target, options: list[str], wish: Wish) -> tuple[str, ...]:
    words = ["docker", "run", "--rm", "--gpus", "all", "--shm-size", "1g"]
    words += publish_port(wish, INSIDE_PORT)
    location = target.location
    if target.folder is None:
        # By its name alone: Docker passes on the value, where there is one.
        words += ["-e", HUB_TOKEN]
    else:
        words += ["-v", f"{target.folder.absolute()}:/model:ro"]
        location = "/model"
    return (*words, IMAGE, "--model-id", location, *options)
