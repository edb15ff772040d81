"""Judging worker for the transformers runtime: a script, run as `python transformers_worker.py`.

It may run under another interpreter than quantkit's, so it imports the standard library, torch and
transformers only. Requests come as JSON, one line each, on standard input; each gets one line of
JSON on standard output. The end of the input, or `exit`, ends the worker.

    {"op": "load", "path", "device": "auto"|"cpu"|"cuda", "threads"}
        -> {"ok": true, "vocab", "dtype", "device", "kv_cache": null|"fp8"|"fp8 per head",
            "unexpected": [names], "positions": the longest sequence, or null, "versions": {...}}
    {"op": "logits", "ids": [[...], ...], "file", "last"}
        -> {"ok": true, "shape": [B, T, V], "finite"}; the raw float32 logits are in `file`. `last`
            may be left out; else those of the last positions are enough: [B, last, V]
    {"op": "generate", "prompt_ids": [...], "max_new_tokens"}
        -> {"ok": true, "ids": [...]}, the greedy continuation, a token that ends it included
    {"op": "continue", "prompts": [[...], ...], "max_new_tokens"}
        -> {"ok": true, "ids": [[...], ...]}, the same of several prompts
    {"op": "time", "ids": [[...], ...], "new_tokens"}
        -> {"ok": true, "prefill", "decoding"}: seconds that `ids` [B, T] took at once, and the
            `new_tokens` greedy steps behind them together; no token ends it
    {"op": "exit"} -> {"ok": true}
    what went wrong -> {"ok": false, "kind": "memory"|"disk"|"package"|"other", "error", "package"}

On a CPU the arithmetic is float32 on exactly the values that are stored: that keeps rounding noise
far below any quantization error, and does not depend on what 16-bit instructions the CPU has. On
CUDA it is the checkpoint's own dtype.

An artifact that declares an FP8 key/value cache is computed with one: compressed-tensors rounds
keys and values as its scales say, with a cache and without, and what attention then sees is looked
at before anything is measured.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

# Run by its path, the script is part of no package, and PYTHONSAFEPATH hides its folder.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from worker_protocol import (  # type: ignore[import-not-found]
    FAILURES,
    find_versions,
    loading_libraries,
    quicken_float32,
    serve,
)

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_FLOATS = 1 << 24
"""Logits that are converted and written at a time."""

MAX_NAMES = 100
"""Names of tensors in an answer."""

PROBE_ATTENTION = "quantkit_kv_probe"
PROBE_TOKENS = 16

PACKAGES = ("torch", "transformers", "compressed-tensors")
"""Whose versions the evidence names."""

OUT_OF_MEMORY = "allocate memory"
"""Words of torch on a CPU."""

Reply = dict[str, Any]


def main() -> int:
    """Serve requests from standard input until it ends."""
    model: Any = None

    def answer(request: Reply) -> Reply:
        nonlocal model
        if request["op"] == "load":
            model, reply = load(request["path"], request["device"], request["threads"])
            return reply
        if request["op"] == "logits":
            return write_logits(model, request["ids"], request["file"], request.get("last", 0))
        if request["op"] == "generate":
            return generate(model, request["prompt_ids"], request["max_new_tokens"])
        if request["op"] == "continue":
            return continue_prompts(model, request["prompts"], request["max_new_tokens"])
        if request["op"] == "time":
            return measure(model, request["ids"], request["new_tokens"])
        return {"ok": True}

    # Libraries raise a KeyError for a file that lacks something.
    return int(serve(answer, (*FAILURES, KeyError), OUT_OF_MEMORY, PACKAGES))


def load(path: str, device: str, threads: int) -> tuple[Any, Reply]:
    """Load the checkpoint or artifact in folder `path` and say what it became.

    Raises:
        ValueError: tensors are missing or have the wrong shape; transformers would fill them with
            random numbers and go on. Or there is an adapter, or a key/value cache is not rounded as
            the config says.
    """
    with loading_libraries():
        import torch
        import transformers

        models = transformers.AutoModelForCausalLM
    if not os.path.isdir(path):
        raise ValueError(f"{path} is not a folder")
    # transformers would apply it unasked where peft is installed, and servers would not.
    if os.path.exists(os.path.join(path, "adapter_config.json")):
        raise ValueError(f"{path} holds an adapter (adapter_config.json): merge it first")
    torch.set_num_threads(threads)
    quicken_float32()
    transformers.utils.logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, found = models.from_pretrained(
        path,
        dtype="auto" if device == "cuda" else torch.float32,
        attn_implementation="sdpa",
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    for fault in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in found[fault])
        if names:
            raise ValueError(f"{len(names)} {fault.replace('_', ' ')}, for instance {names[0]}")
    model = model.eval().to(device)
    stops = model.generation_config.eos_token_id
    # A checkpoint may ask for sampling or for a repetition penalty: greedy means neither.
    model.generation_config = transformers.GenerationConfig(eos_token_id=stops, pad_token_id=0)
    return model, {
        "ok": True,
        "vocab": _vocabulary(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "kv_cache": check_kv_cache(model, path),
        "unexpected": sorted(map(str, found["unexpected_keys"]))[:MAX_NAMES],
        "positions": _positions(model),
        "versions": find_versions(*PACKAGES),
    }


def check_kv_cache(model: Any, path: str) -> str | None:
    """Say how keys and values are rounded; None where the config in folder `path` asks for nothing.

    Raises:
        ValueError: it asks for what is not computed here, or attention sees other values.
    """
    with open(os.path.join(path, "config.json"), encoding="utf-8") as handle:
        config = json.load(handle)
    scheme = (config.get("quantization_config") or {}).get("kv_cache_scheme")
    if scheme is None:
        return None
    kind = (scheme.get("type"), scheme.get("num_bits"), bool(scheme.get("dynamic")))
    if kind != ("float", 8, False):
        raise ValueError(f"the key/value cache is declared as {scheme}: only static FP8 is judged")
    seen = _observe_attention(model)
    wrong = sorted(name for name, rounded in seen.items() if not rounded)
    if wrong or not seen:
        raise ValueError(
            f"config.json declares an FP8 key/value cache, but attention sees keys and values that "
            f"are not rounded to it, in {len(wrong)} of {len(seen)} attention layers"
            f"{': ' + wrong[0] if wrong else ''}"
        )
    return "fp8 per head" if scheme.get("strategy") == "attn_head" else "fp8"


def _observe_attention(model: Any) -> dict[str, bool]:
    """Run a few tokens; attention layer -> whether its keys and values fit its scales."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    names = {module: name for name, module in model.named_modules()}
    seen = {name: False for module, name in names.items() if hasattr(module, "k_scale")}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **rest: Any
    ) -> Any:
        scales = getattr(module, "k_scale", None), getattr(module, "v_scale", None)
        seen[names[module]] = all(map(_is_rounded, (key, value), scales))
        return sdpa_attention_forward(module, query, key, value, *args, **rest)

    AttentionInterface.register(PROBE_ATTENTION, attend)
    AttentionMaskInterface.register(PROBE_ATTENTION, sdpa_mask)
    usual = model.config._attn_implementation
    model.set_attn_implementation(PROBE_ATTENTION)
    tokens = torch.arange(PROBE_TOKENS, device=model.device).remainder(_vocabulary(model))
    with torch.inference_mode():
        model(input_ids=tokens.unsqueeze(0), use_cache=False)
    model.set_attn_implementation(usual)
    return seen


def _is_rounded(states: Tensor, scale: Tensor | None) -> bool:
    """Whether `states` are codes of FP8 times `scale`, within the rounding of their dtype."""
    import torch

    if scale is None or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        return False
    codes = states.float() / scale.float()
    rounded = codes.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()
    # Halfway between two codes is up to 1/16 of a value away from them; bfloat16 rounds by 1/256.
    return bool(((codes - rounded).abs() <= codes.abs() / 64).all())


def write_logits(model: Any, ids: list[list[int]], file: str, last: int) -> Reply:
    """Write the logits of the `last` positions of `ids` [B, T], or of all for 0, in chunks."""
    import torch

    with torch.inference_mode():
        tokens = torch.tensor(ids, device=model.device)
        head = _keep_logits(model, last) if last else {}
        logits: Tensor = model(input_ids=tokens, use_cache=False, **head).logits[:, -last:]
        shape = list(logits.shape)
        rows = logits.reshape(-1, shape[-1])
        step = max(1, CHUNK_FLOATS // shape[-1])
        finite = True
        with open(file, "wb") as handle:
            for start in range(0, rows.shape[0], step):
                chunk = rows[start : start + step].float().cpu().contiguous()
                finite = finite and bool(torch.isfinite(chunk).all())
                handle.write(chunk.numpy().data)
    return {"ok": True, "shape": shape, "finite": finite}


def generate(model: Any, prompt_ids: list[int], max_new_tokens: int) -> Reply:
    """Continue `prompt_ids` with the most probable tokens, within the model's positions."""
    import torch

    room = min(max_new_tokens, (_positions(model) or sys.maxsize) - len(prompt_ids))
    if room < 1:
        return {"ok": True, "ids": []}
    tokens = torch.tensor([prompt_ids], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=room,
            do_sample=False,
        )
    return {"ok": True, "ids": output[0, len(prompt_ids) :].tolist()}


def continue_prompts(model: Any, prompts: list[list[int]], max_new_tokens: int) -> Reply:
    """Continue several prompts at once, as `generate` does it; shorter ones are padded in front."""
    import torch

    longest = max(map(len, prompts))
    room = min(max_new_tokens, (_positions(model) or sys.maxsize) - longest)
    if room < 1:
        return {"ok": True, "ids": [[] for _ in prompts]}
    padding = [[0] * (longest - len(prompt)) for prompt in prompts]
    tokens = [pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
    mask = [pad + [1] * len(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor(tokens, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=room,
            do_sample=False,
        )
    stops = model.generation_config.eos_token_id
    ends = {stops} if isinstance(stops, int) else set(stops or ())
    found = []
    for row in output[:, longest:].tolist():
        # What has ended is filled up while others go on.
        end = next((place for place, token in enumerate(row) if token in ends), len(row))
        found.append(row[: end + 1])
    return {"ok": True, "ids": found}


def measure(model: Any, ids: list[list[int]], new_tokens: int) -> Reply:
    """Time one pass over `ids` [B, T] and `new_tokens` greedy steps behind it."""
    import torch

    tokens, past = torch.tensor(ids, device=model.device), None
    # As in generation, only the last position is put through the head.
    head = _keep_logits(model, 1)
    clock = [time.perf_counter()]
    with torch.inference_mode():
        for _ in range(new_tokens + 1):
            output = model(input_ids=tokens, past_key_values=past, use_cache=True, **head)
            tokens, past = output.logits[:, -1:].argmax(dim=-1), output.past_key_values
            # The token is looked at, so that a GPU has finished.
            tokens.tolist()
            clock.append(time.perf_counter())
    return {"ok": True, "prefill": clock[1] - clock[0], "decoding": clock[-1] - clock[1]}


def _keep_logits(model: Any, last: int) -> dict[str, int]:
    """Arguments by which only the last positions are put through the head; not all models can."""
    can = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": last} if can else {}


def _positions(model: Any) -> int | None:
    """The longest sequence, as the config has it."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _vocabulary(model: Any) -> int:
    head = model.get_output_embeddings()
    if head is not None and hasattr(head, "out_features"):
        return int(head.out_features)
    return int(model.config.get_text_config().vocab_size)


if __name__ == "__main__":
    sys.exit(main())
