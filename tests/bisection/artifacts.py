"""Pico artifacts, sound and broken, that the tests of bisections share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit
from quantkit.bisection.reading import open_base, open_weights
from quantkit.bisection.records import Bisection, Unit
from quantkit.bisection.survey import find_flaws, pair_up, survey
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.checkpoint.source import resolve_source
from quantkit.checkpoint.structure import find_groups
from quantkit.formats.inspect import inspect_artifact
from quantkit.running import silent

BLOCK = "model.layers.1"
UP, GATE, DOWN = (f"{BLOCK}.mlp.{name}_proj" for name in ("up", "gate", "down"))
NORM = f"{BLOCK}.post_attention_layernorm"
WEIGHTS = "model.safetensors"


def round_plainly(model: Path, output: Path, quantize: Mapping[str, Any]) -> Path:
    """Write an artifact by plain rounding; return the folder of its weights."""
    tree = {"version": 1, "quantize": {"method": "rtn", **quantize}}
    recipe = quantkit.Recipe.model_validate(tree)
    quantkit.quantize(recipe, model=model, output=output, gate=False)
    return output / "compressed-tensors"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Change the tensors of a folder in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def copy_changed(source: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Return a copy of a folder with other tensors."""
    shutil.copytree(source, target)
    return edit(target, change)


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change keys of config.json in place."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def randomize(tensors: dict[str, Tensor]) -> None:
    """Give one layer codes by chance."""
    name = f"{DOWN}.weight_packed"
    draw = torch.Generator().manual_seed(0)
    shape = tensors[name].shape
    tensors[name] = torch.randint(-(2**31), 2**31 - 1, shape, generator=draw, dtype=torch.int32)


def exchange_scales(tensors: dict[str, Tensor]) -> None:
    """Give two layers of one shape each other's scales."""
    one, other = f"{UP}.weight_scale", f"{GATE}.weight_scale"
    tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()


def fill_norm(tensors: dict[str, Tensor]) -> None:
    """Lose the weight of one norm."""
    tensors[f"{NORM}.weight"] = torch.full_like(tensors[f"{NORM}.weight"], 1.0)


def spread(tensors: dict[str, Tensor]) -> None:
    """Make norms and rows of unlike sizes, so that it matters whose they are."""
    draw = torch.Generator().manual_seed(2)
    for name, tensor in tensors.items():
        if name.endswith(("layernorm.weight", "up_proj.weight")):
            size = 0.5 if tensor.dim() == 1 else 1.0
            factors = torch.exp(size * torch.randn(len(tensor), generator=draw))
            factors = factors if tensor.dim() == 1 else factors.unsqueeze(1)
            tensors[name] = (tensor * factors).to(tensor.dtype)


def fold_scales(tensors: dict[str, Tensor]) -> None:
    """Rescale the channels of each block as AWQ does, which changes the model by little."""
    draw = torch.Generator().manual_seed(1)
    for index in range(3):
        prefix = f"model.layers.{index}"
        for front, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            ("mlp.up_proj", ("mlp.down_proj",)),
        ):
            weight = tensors[f"{prefix}.{front}.weight"]
            scale = torch.exp(0.2 * torch.randn(len(weight), generator=draw))
            divisor = scale if weight.dim() == 1 else scale.unsqueeze(1)
            tensors[f"{prefix}.{front}.weight"] = (weight / divisor).to(weight.dtype)
            for reader in readers:
                name = f"{prefix}.{reader}.weight"
                tensors[name] = (tensors[name] * scale).to(weight.dtype)


def run(artifact: Path, model: Path, text: Path, max_kl: float, **options: Any) -> Bisection:
    """Bisect on a few short windows, with a limit on KL alone."""
    limits = {
        "max_kl": max_kl,
        "max_perplexity_increase": "null",
        "min_top1_agreement": "null",
        "samples": 64,
        "max_samples": 64,
        "sequence_length": 32,
    }
    overrides = [f"gate.{key}={value}" for key, value in limits.items()]
    return quantkit.bisect(
        artifact, baseline=model, data=text, windows=8, overrides=overrides, **options
    )


def find_units(artifact: Path, model: Path) -> dict[str, Unit]:
    """Return what differs from the original's, by name, without measuring anything."""
    base = open_checkpoint(resolve_source(str(model)))
    skeleton = build_skeleton(base)
    weights = open_weights(inspect_artifact(artifact), base)
    pair = pair_up(skeleton, find_groups(base, skeleton), weights, open_base(base))
    return {unit.name: unit for unit in find_flaws(list(survey(pair, silent)))}
