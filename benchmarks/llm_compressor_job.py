"""Quantize a checkpoint with llm-compressor on given token windows.

Runs in llm-compressor's own environment (scripts/setup_rival.sh) and imports nothing of quantkit.
The recipes are those of its documentation, with its own defaults for everything else: for W4A16
`GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])` and
`AWQModifier(duo_scaling="both")` with a `QuantizationModifier`; for W8A8
`SmoothQuantModifier(smoothing_strength=0.8)` with a `GPTQModifier`; for FP8_DYNAMIC a
`QuantizationModifier` alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

METHODS = ("rtn", "gptq", "awq", "awq+gptq", "smoothquant+gptq")
SCHEMES = ("W4A16", "W8A8", "FP8_DYNAMIC")


def make_recipe(method: str, scheme: str) -> list[Any]:
    """Return the modifiers of one method."""
    targets: dict[str, Any] = {"targets": "Linear", "scheme": scheme, "ignore": ["lm_head"]}
    match method:
        case "rtn":
            return [QuantizationModifier(**targets)]
        case "gptq":
            return [GPTQModifier(**targets)]
        case "awq":
            return [AWQModifier(duo_scaling="both"), QuantizationModifier(**targets)]
        case "awq+gptq":
            return [AWQModifier(duo_scaling="both"), GPTQModifier(**targets)]
        case "smoothquant+gptq":
            return [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(**targets)]
    raise ValueError(f"unknown method {method!r}")


def allow_awq_without_accelerator() -> None:
    """Make pinning a no-op: 0.14 pins memory for its AWQ even where there is nothing to pin for,
    which torch refuses, so that on a CPU its AWQ cannot run at all.
    """
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None


def main() -> None:
    """Parse the arguments, quantize, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--windows", type=Path, required=True, help=".npy, int64 [N, T]")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--scheme", choices=SCHEMES, default="W4A16")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=1)
    arguments = parser.parse_args()

    allow_awq_without_accelerator()
    windows = np.load(arguments.windows)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    rows = windows.tolist()
    masks = np.ones_like(windows).tolist()
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(arguments.model),
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": masks}),
        recipe=make_recipe(arguments.method, arguments.scheme),
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
        batch_size=arguments.batch_size,
        output_dir=str(arguments.output),
    )


if __name__ == "__main__":
    main()
