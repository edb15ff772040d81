"""The transformers worker with an FP8 key/value cache, against a forward written by hand."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.judging.evaluate import WORKERS
from tests.helpers import make_pico_model

HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 16, 2
IDS = torch.from_numpy(np.random.default_rng(0).integers(3, 300, (3, 20)))
SCHEME = {"num_bits": 8, "type": "float", "dynamic": False, "symmetric": True}


def make_artifact(
    folder: Path, strategy: str, *, family: str = "llama", window: int | None = None
) -> Path:
    """A 16-bit checkpoint whose config declares an FP8 cache, with scales that differ by layer."""
    make_pico_model(folder, family=family, tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(LAYERS):
        for part, base in (("k", 0.011), ("v", 0.0007)):  # Values are clipped, keys are not.
            scale = torch.tensor([base * (layer + 1)])
            if strategy == "attn_head":
                scale = torch.cat([scale, scale * 1.7]).reshape(KV_HEADS, 1, 1)
            tensors[f"model.layers.{layer}.self_attn.{part}_scale"] = scale.bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    declare(folder, SCHEME | {"strategy": strategy}, sliding_window=window)
    return folder


def declare(folder: Path, scheme: Mapping[str, Any], **config: Any) -> None:
    """Write a cache scheme (and other keys) into a folder's config."""
    path = folder / "config.json"
    description = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "compressed",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": dict(scheme),
    }
    document = json.loads(path.read_text()) | config | {"quantization_config": description}
    path.write_text(json.dumps(document))


# --- the forward by hand ------------------------------------------------------------------------


def fp8_values() -> Tensor:
    """Every value of float8_e4m3fn, from its bits: sign, 4 bits of exponent, 3 of mantissa."""
    values = []
    for bits in range(127):  # 127 is NaN.
        exponent, mantissa = bits >> 3, bits & 7
        normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values.append(mantissa / 8 * 2.0**-6 if exponent == 0 else normal)
    positive = torch.tensor(values)
    return torch.cat([-positive.flip(0), positive[1:]])


FP8 = fp8_values()


def cache(states: Tensor, scale: Tensor) -> Tensor:
    """Write states [B, H, T, D] to an FP8 cache and read them back: the nearest value wins."""
    codes = states / scale.float()
    middles = (FP8[1:] + FP8[:-1]) / 2
    return FP8[torch.bucketize(codes.contiguous(), middles)] * scale.float()


def norm(states: Tensor, weight: Tensor) -> Tensor:
    return states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def rotate(states: Tensor) -> Tensor:
    """Rotary embedding of [B, H, T, D] with base 10000."""
    half = DIM // 2
    angles = torch.arange(states.shape[2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    first, second = states[..., :half], states[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attend(states: Tensor, part: dict[str, Tensor], window: int | None, rounded: bool) -> Tensor:
    """Grouped attention [B, T, C] -> [B, T, C], a head and a query position at a time."""
    batch, length, _ = states.shape

    def project(name: str) -> Tensor:
        out = states @ part[f"{name}_proj.weight"].T + part.get(f"{name}_proj.bias", 0)
        out = out.reshape(batch, length, -1, DIM)
        weight = part.get(f"{name}_norm.weight")
        return (out if weight is None else norm(out, weight)).transpose(1, 2)

    query, key, value = rotate(project("q")), rotate(project("k")), project("v")
    if rounded:
        key, value = cache(key, part["k_scale"]), cache(value, part["v_scale"])
    out = torch.zeros(batch, length, HEADS, DIM)
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        for now in range(length):
            first = 0 if window is None else max(0, now - window + 1)
            keys, values = key[:, group, first : now + 1], value[:, group, first : now + 1]
            scores = (keys @ query[:, head, now, :, None])[..., 0] / DIM**0.5
            out[:, now, head] = (scores.softmax(-1)[:, None] @ values)[:, 0]
    return out.reshape(batch, length, -1) @ part["o_proj.weight"].T


def forward(folder: Path, ids: Tensor, *, window: int | None = None, rounded: bool = True):
    """Logits [B, T, V] of a pico model in float32."""
    tensors = {
        name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    states = tensors["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        part = {k.removeprefix("self_attn."): v for k, v in own.items()}
        states = states + attend(norm(states, own["input_layernorm.weight"]), part, window, rounded)
        inputs = norm(states, own["post_attention_layernorm.weight"])
        gate, up = (inputs @ own[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        states = states + (torch.nn.functional.silu(gate) * up) @ own["mlp.down_proj.weight"].T
    return norm(states, tensors["model.norm.weight"]) @ tensors["model.embed_tokens.weight"].T


# --- the worker ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(WORKERS["transformers"])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def say(process: subprocess.Popen[str], **request: object) -> dict[str, Any]:
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def load(process: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    return say(process, op="load", path=str(folder), device="cpu", threads=1)


def logits(process: subprocess.Popen[str], file: Path) -> Tensor:
    answer = say(process, op="logits", ids=IDS.tolist(), file=str(file))
    return torch.from_numpy(np.fromfile(file, np.float32)).reshape(answer["shape"])


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
@pytest.mark.parametrize(
    ("family", "window"), [("llama", None), ("mistral", 5), ("qwen2", None), ("qwen3", None)]
)
def test_keys_and_values_are_rounded_as_a_server_caches_them(
    worker: subprocess.Popen[str], tmp_path: Path, strategy: str, family: str, window: int | None
) -> None:
    """After norms and rotary embedding, at all positions, the last one included."""
    folder = make_artifact(tmp_path / "artifact", strategy, family=family, window=window)

    answer = load(worker, folder)
    found = logits(worker, tmp_path / "logits")

    assert answer["kv_cache"] == ("fp8" if strategy == "tensor" else "fp8 per head")
    assert answer["unexpected"] == []
    expected = forward(folder, IDS, window=window)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (forward(folder, IDS, window=window, rounded=False) - expected).abs().max() > 0.05


def test_generation_reads_a_rounded_cache(worker: subprocess.Popen[str], tmp_path: Path) -> None:
    """Token by token with a cache, what full forwards without one give."""
    folder = make_artifact(tmp_path / "artifact", "attn_head")
    load(worker, folder)
    tokens = IDS[:1, :6]
    for _ in range(8):
        tokens = torch.cat([tokens, forward(folder, tokens)[:, -1:].argmax(-1)], dim=1)

    answer = say(worker, op="generate", prompt_ids=IDS[0, :6].tolist(), max_new_tokens=8)

    assert answer["ids"] == tokens[0, 6:].tolist()


def test_a_cache_that_is_not_declared_is_not_rounded(
    worker: subprocess.Popen[str], tmp_path: Path
) -> None:
    """The baseline's, for one."""
    answer = load(worker, make_pico_model(tmp_path / "model", tokenizer=False))
    assert (answer["ok"], answer["kv_cache"]) == (True, None)


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (None, "missing keys, for instance model.layers.1.self_attn.v_scale"),
        (torch.tensor([0.0]), "in 1 of 2 attention layers: model.layers.1.self_attn"),
        (torch.tensor([-0.5]), "in 1 of 2 attention layers"),
        (torch.tensor([torch.nan]), "in 1 of 2 attention layers"),
    ],
)
def test_scales_that_are_missing_or_senseless_are_refused(
    worker: subprocess.Popen[str], tmp_path: Path, scale: Tensor | None, words: str
) -> None:
    """What transformers would fill a missing one with is random."""
    folder = make_artifact(tmp_path / "artifact", "tensor")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.v_scale"
    del tensors[name]
    if scale is not None:
        tensors[name] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    answer = load(worker, folder)

    assert answer["ok"] is False
    assert words in answer["error"]


def test_a_cache_of_another_kind_is_refused(worker: subprocess.Popen[str], tmp_path: Path) -> None:
    """Only what servers have is judged."""
    folder = make_artifact(tmp_path / "artifact", "tensor")
    declare(folder, SCHEME | {"strategy": "tensor", "type": "int"})
    assert "only static FP8 is judged" in load(worker, folder)["error"]


def test_a_runtime_that_rounds_nothing_is_found_out(tmp_path: Path) -> None:
    """Whatever the config says, what attention sees counts."""
    from transformers import AutoModelForCausalLM

    spec = importlib.util.spec_from_file_location("worker", WORKERS["transformers"])
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = make_artifact(tmp_path / "artifact", "tensor")
    plain = AutoModelForCausalLM.from_pretrained(
        make_pico_model(tmp_path / "model", tokenizer=False), attn_implementation="sdpa"
    )
    with pytest.raises(ValueError, match="in 2 of 2 attention layers"):
        script.check_kv_cache(plain, str(folder))

    rounded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    assert script.check_kv_cache(rounded, str(folder)) == "fp8"
    assert rounded.config._attn_implementation == "sdpa"
    rounded.model.layers[0].self_attn.quantization_enabled = False
    with pytest.raises(ValueError, match=r"in 1 of 2 .*: model\.layers\.0\.self_attn"):
        script.check_kv_cache(rounded, str(folder))
