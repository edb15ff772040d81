"""`trtllm-serve`, by the options of tensorrt_llm/commands/serve.py (1.x, its PyTorch backend)."""

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
"""--kv_cache_free_gpu_memory_fraction, of what the weights leave."""
BASE = 2 * GIB
"""CUDA's context, CUDA graphs and the workspaces of kernels: a guess."""
STEP_TOKENS = 8192
"""--max_num_tokens."""
CONFIG = "trtllm.yaml"
IMAGE = "nvcr.io/nvidia/tensorrt-llm/release:1.0.0"


def find_needs(target: Target, machine: Machine, wish: Wish) -> Needs:
    """Return what TensorRT-LLM takes."""
    return Needs(SHARE, cache_width(target, wish), BASE, STEP_TOKENS)


def render(target: Target, machine: Machine, memory: MemoryPlan, wish: Wish, name: str) -> Rendered:
    """Return the command, and the file of what it has no option for."""
    options = ["--tp_size", str(memory.gpus), "--max_seq_len", str(memory.context)]
    options += ["--max_batch_size", str(memory.concurrency)]
    options += ["--max_num_tokens", str(STEP_TOKENS)]
    options += ["--kv_cache_free_gpu_memory_fraction", f"{SHARE:g}"]
    if target.revision is not None:
        options += ["--revision", target.revision]
    dtype = "fp8" if has_eight_bits(target, wish) else "auto"
    files = {}
    if dtype != "auto":
        files[CONFIG] = f"kv_cache_config:\n  dtype: {dtype}\n"
        options += ["--extra_llm_api_options", CONFIG]
    place = ["--host", wish.host, "--port", str(wish.port)]
    return Rendered(
        command=("trtllm-serve", target.location, *options, *place),
        files=files,
        container=_container(target, options, wish, files),
        # It calls a folder's model by the folder's own name (serve/openai_server.py).
        model_name=target.location if target.folder is None else target.folder.absolute().name,
        notes=("trtllm-serve names the model after its folder; --model-name has no effect",)
        if wish.model_name is not None
        else (),
    )


def _container(
    target: Target, options: list[str], wish: Wish, files: dict[str, str]
) -> tuple[str, ...]:
    words = ["docker", "run", "--rm", "--gpus", "all", "--ipc", "host"]
    words += ["--ulimit", "memlock=-1", "--ulimit", "stack=67108864"]
    words += publish_port(wish)
    location = target.location
    if target.folder is None:
        # By its name alone: Docker passes on the value, where there is one.
        words += ["-e", HUB_TOKEN]
    else:
        # The name of the folder is the model's.
        location = f"/models/{target.folder.absolute().name}"
        words += ["-v", f"{target.folder.absolute()}:{location}:ro"]
    if files:
        words += ["-v", f"./{CONFIG}:/{CONFIG}:ro"]
        options = [f"/{CONFIG}" if option == CONFIG else option for option in options]
    place = ["--host", "0.0.0.0", "--port", str(wish.port)]
    return (*words, IMAGE, "trtllm-serve", location, *options, *place)
