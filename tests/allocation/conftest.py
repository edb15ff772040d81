"""Pico models in float32, whose tensors can be compared to the last digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.planning import make_plan
from quantkit.recipe import validate
from quantkit.records import Plan, TokenWindows
from tests.helpers import make_pico_model

CPU = torch.device("cpu")


def open_folder(folder: Path) -> Checkpoint:
    return open_checkpoint(resolve_source(str(folder)))


def load_whole(folder: Path) -> torch.nn.Module:
    """The model as transformers loads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_windows(count: int, length: int, vocabulary: int, seed: int = 0) -> TokenWindows:
    """Random tokens, all of which count."""
    ids = np.random.default_rng(seed).integers(3, vocabulary, (count, length))
    return TokenWindows(ids, np.ones((count, length), np.float32), "random", "0")


def plan_auto(checkpoint: Checkpoint, samples: int, length: int, **quantize: Any) -> Plan:
    """The open plan of a recipe with `scheme: auto`."""
    recipe = validate(
        {
            "version": 1,
            "calibration": {"data": "x.txt", "samples": samples, "sequence_length": length},
            "quantize": {"scheme": "auto", "max_kl": 1.0, "group_size": 32, **quantize},
        }
    )
    return make_plan(recipe, checkpoint, gate=False)


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks, 32 wide."""
    return make_pico_model(
        tmp_path_factory.mktemp("allocation") / "llama",
        hidden=32,
        intermediate=64,
        vocab=64,
        dtype="float32",
        tokenizer=False,
    )
