"""The models that quality.py measures on, made from models/demo-llama.

- `demo`: models/demo-llama itself.
- `outlier`: the same function with strong outliers. Channels of the norms, rows of up_proj and
  v_proj and the keys of one head are multiplied by powers of two, and what reads them is divided by
  the same, so that the bfloat16 checkpoint computes exactly what it computed before.
- `qwen3`: Qwen3 of 4 layers with a norm on queries and keys. It starts from 4 of the demo model's
  6 layers and learns on docs_calibration.txt from the demo model's distribution and the next token.
  400 steps of 1,024 tokens (1.5 epochs): about three minutes on two cores, and a
  perplexity of 23 on documents where the demo model has 23 as well.

usage: python benchmarks/quality_models.py FOLDER [--models demo outlier qwen3]
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import ROOT
from torch import Tensor

DEMO = ROOT / "models" / "demo-llama"
TEXT = ROOT / "calib_data" / "docs_calibration.txt"
SIDECARS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
WEIGHTS = "model.safetensors"

# --- outliers ---------------------------------------------------------------------------------

CHANNEL_FACTORS = (64.0, 32.0, 32.0, 16.0)
"""What the outlier channels of both norms are multiplied by, in every block the same channels."""
UP_FACTORS = (32.0, 16.0, 16.0, 8.0)
VALUE_FACTORS = (16.0, 8.0)
KEY_FACTOR = 16.0
"""What all keys of one head are multiplied by."""


def make_outlier(output: Path) -> None:
    """Write the demo model with outliers and check that its logits are those of the demo model."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(DEMO)
    tensors = load_file(DEMO / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    channels = torch.randperm(config.hidden_size, generator=generator)[: len(CHANNEL_FACTORS)]
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        block = {
            name.removeprefix(prefix).removesuffix(".weight"): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        add_outliers(block, channels, config.head_dim, generator)
        changed = {f"{prefix}{name}.weight": tensor for name, tensor in block.items()}
        for name, tensor in changed.items():
            tensors[name] = tensor.to(tensors[name].dtype).contiguous()
    output.mkdir(parents=True)
    save_file(tensors, output / WEIGHTS, metadata={"format": "pt"})
    for name in ("config.json", *SIDECARS):
        shutil.copyfile(DEMO / name, output / name)
    check_equal_logits(output)


def check_equal_logits(folder: Path) -> None:
    """Compare a model with the demo model on a few tokens, in float32 and to the bit."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(100, 356)[None]
    with torch.inference_mode():
        first, second = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=ids).logits
            for path in (DEMO, folder)
        )
    if not torch.equal(first, second):
        raise SystemExit(f"{folder}: the logits differ by {(first - second).abs().max():.3g}")


def add_outliers(
    block: dict[str, Tensor], channels: Tensor, head_dim: int, generator: torch.Generator
) -> None:
    """Rescale one block in place, without changing what it computes.

    Args:
        block: weight by the module's name in the block, [O, I] or [I].
        channels: int64 [C], the outlier channels of both norms.
        head_dim: features of a head.
        generator: draws the rows of up_proj and v_proj and the head.
    """
    for name, weight in block.items():
        block[name] = weight.float()
    factors = torch.tensor(CHANNEL_FACTORS)
    for norm, readers in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        block[norm][channels] *= factors
        for reader in readers:
            block[reader][:, channels] /= factors

    up, down = block["mlp.up_proj"], block["mlp.down_proj"]
    rows = torch.randperm(up.shape[0], generator=generator)[: len(UP_FACTORS)]
    up[rows] *= torch.tensor(UP_FACTORS)[:, None]
    down[:, rows] /= torch.tensor(UP_FACTORS)

    value, out = block["self_attn.v_proj"], block["self_attn.o_proj"]
    query, key = block["self_attn.q_proj"], block["self_attn.k_proj"]
    kv_heads = value.shape[0] // head_dim
    repeats = query.shape[0] // key.shape[0]
    rows = torch.randperm(value.shape[0], generator=generator)[: len(VALUE_FACTORS)]
    value[rows] *= torch.tensor(VALUE_FACTORS)[:, None]
    # Query heads h * repeats ... read the values of head h.
    by_head = out.view(out.shape[0], kv_heads, repeats, head_dim)
    for row, factor in zip(rows.tolist(), VALUE_FACTORS, strict=True):
        by_head[:, row // head_dim, :, row % head_dim] /= factor

    # The rotary embedding turns a head's features and so commutes with a factor for all of them.
    head = int(torch.randint(kv_heads, (), generator=generator))
    key.view(kv_heads, head_dim, -1)[head] *= KEY_FACTOR
    query.view(kv_heads, repeats * head_dim, -1)[head] /= KEY_FACTOR


# --- Qwen3 ------------------------------------------------------------------------------------

KEPT_LAYERS = (0, 1, 3, 5)
QUERY_KEY_NORM = 2.0
STEPS, BATCH, LENGTH = 400, 4, 256
RATE, WARMUP_STEPS = 2e-3, 15
NEXT_TOKEN_SHARE = 0.1
"""Of the loss; the rest is the divergence from the teacher."""


def build_student() -> Any:
    """Return the Qwen3 before training: the teacher's embedding and four of its blocks."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    old = teacher.config
    config = Qwen3Config(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=len(KEPT_LAYERS),
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        head_dim=old.head_dim,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=old.rope_parameters,
        max_position_embeddings=old.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
    )
    student = Qwen3ForCausalLM(config)
    student.model.embed_tokens.load_state_dict(teacher.model.embed_tokens.state_dict())
    student.model.norm.load_state_dict(teacher.model.norm.state_dict())
    for block, index in zip(student.model.layers, KEPT_LAYERS, strict=True):
        block.load_state_dict(teacher.model.layers[index].state_dict(), strict=False)
        for norm in (block.self_attn.q_norm, block.self_attn.k_norm):
            torch.nn.init.constant_(norm.weight, QUERY_KEY_NORM)
    return student


def train_qwen3(output: Path, steps: int = STEPS) -> None:
    """Train the Qwen3 on the calibration text and write it in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    student = build_student().train()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    text = TEXT.read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in student.parameters() if p.dim() == 2]},
        {"params": [p for p in student.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(
        groups,
        lr=RATE,
        betas=(0.9, 0.98),
        weight_decay=0.05,
    )
    generator = np.random.default_rng(0)
    start = time.monotonic()
    for step in range(steps):
        offsets = generator.integers(0, len(tokens) - LENGTH + 1, BATCH)
        ids = torch.stack([tokens[offset : offset + LENGTH] for offset in offsets.tolist()])
        share = min(1.0, (step + 1) / WARMUP_STEPS) * math.cos(0.5 * math.pi * step / steps) ** 2
        for group in adam.param_groups:
            group["lr"] = RATE * share
        loss = distillation_loss(teacher, student, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - start
            print(f"qwen3: step {step + 1}, loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    student.eval().to(torch.bfloat16).save_pretrained(output)
    for name in SIDECARS:
        shutil.copyfile(DEMO / name, output / name)


def distillation_loss(teacher: Any, student: Any, ids: Tensor) -> Tensor:
    """Return KL(teacher || student) and a share of the next-token loss on ids [B, T]."""
    with torch.inference_mode():
        aim = teacher(input_ids=ids, use_cache=False).logits
    aim = aim.clone().log_softmax(-1).flatten(0, 1)
    found = student(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    divergence = F.kl_div(found.flatten(0, 1), aim, log_target=True, reduction="batchmean")
    next_token = F.nll_loss(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return (1 - NEXT_TOKEN_SHARE) * divergence + NEXT_TOKEN_SHARE * next_token


# --- all of them ------------------------------------------------------------------------------

MAKERS: Mapping[str, Callable[[Path], None] | None] = MappingProxyType(
    {"demo": None, "outlier": make_outlier, "qwen3": train_qwen3}
)
"""Name of a model -> what writes it; None is the bundled model."""


def ensure_model(name: str, folder: Path) -> Path:
    """Return the folder of a model, made in `folder` where it is not there yet."""
    maker = MAKERS[name]
    if maker is None:
        return DEMO
    output = folder / name
    if output.exists():
        print(f"{name}: reused from {output}", file=sys.stderr)
        return output
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        started = time.monotonic()
        maker(Path(scratch, name))
        os.replace(Path(scratch, name), output)
    print(f"{name}: made in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return output


def main() -> None:
    """Parse the arguments and make the models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    arguments = parser.parse_args()
    for name in arguments.models:
        print(ensure_model(name, arguments.folder))


if __name__ == "__main__":
    main()
