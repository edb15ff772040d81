"""Blocks run one at a time against transformers' own forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit.allocation.streams import (
    compute_logits,
    place_block,
    place_outside,
    record,
    run_block,
)
from quantkit.calibration.placing import empty
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.checkpoint.structure import find_groups
from quantkit.errors import CheckpointError
from tests.allocation.conftest import CPU, load_whole, make_windows, open_folder
from tests.helpers import make_pico_model

LENGTH = 24


def run_in_blocks(folder: Path, ids: Tensor) -> Tensor:
    """Logits [N, T, V] of a model of which one block is in memory at a time."""
    checkpoint = open_folder(folder)
    model = build_skeleton(checkpoint)
    prefixes = [block.prefix for block in find_groups(checkpoint, model).blocks]
    with torch.inference_mode():
        place_outside(model, checkpoint, prefixes, CPU)
        recording = record(model, prefixes, ids, CPU)
        hidden = recording.hidden
        for index, prefix in enumerate(prefixes):
            place_block(model, checkpoint, prefix, CPU)
            hidden = run_block(model, prefixes, index, recording, hidden, CPU)
            empty(model.get_submodule(prefix))
        logits = compute_logits(model, prefixes, hidden.flatten(0, 1), recording.in_tuple)
    return logits.unflatten(0, ids.shape)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "olmo2", "phi3"])
def test_logits_are_those_of_the_models_own_forward(family: str, tmp_path: Path) -> None:
    """Untied heads, capped logits, scaled embeddings, sliding windows, other norms."""
    folder = make_pico_model(
        tmp_path,
        family=family,
        hidden=32,
        intermediate=64,
        vocab=64,
        dtype="float32",
        tied=family != "qwen3",
        tokenizer=False,
    )
    ids = torch.from_numpy(make_windows(50, LENGTH, 64).ids)

    found = run_in_blocks(folder, ids)

    with torch.inference_mode():
        expected = load_whole(folder)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_block_can_run_in_place(pico: Path) -> None:
    """Of many streams only one copy is held."""
    checkpoint = open_folder(pico)
    model = build_skeleton(checkpoint)
    prefixes = ["model.layers.0", "model.layers.1"]
    ids = torch.from_numpy(make_windows(4, LENGTH, 64).ids)
    with torch.inference_mode():
        place_outside(model, checkpoint, prefixes, CPU)
        recording = record(model, prefixes, ids, CPU)
        place_block(model, checkpoint, prefixes[0], CPU)
        hidden = recording.hidden.clone()
        output = run_block(model, prefixes, 0, recording, hidden, CPU)
        same = run_block(model, prefixes, 0, recording, hidden, CPU, in_place=True)

    assert same.data_ptr() == hidden.data_ptr()
    torch.testing.assert_close(same, output, rtol=0, atol=0)
    assert not torch.equal(output, recording.hidden)


class _Decoder(nn.Module):
    """What is not Llama-like: `between` is done to what a block returns."""

    base_model_prefix = ""

    def __init__(self, between: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.between = between

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden: Tensor = self.embedding(input_ids)
        for layer in self.layers:
            hidden = self.between(layer(hidden))
        return hidden


def test_blocks_may_return_tuples() -> None:
    """As those of older architectures do."""
    ids = torch.zeros(1, 4, dtype=torch.int64)

    recording = record(_Decoder(itemgetter(0)), ["layers.0", "layers.1"], ids, CPU)

    assert recording.in_tuple
    assert recording.hidden.shape == (1, 4, 4)


def test_a_forward_that_works_between_blocks_is_refused() -> None:
    """A block on its own would not be the model's."""
    ids = torch.zeros(1, 4, dtype=torch.int64)

    with pytest.raises(CheckpointError, match="changes hidden states between blocks"):
        record(_Decoder(lambda hidden: hidden * 2), ["layers.0", "layers.1"], ids, CPU)


def test_modules_have_their_own_forward_again(pico: Path) -> None:
    """Also when the run fails."""
    checkpoint = open_folder(pico)
    model = build_skeleton(checkpoint)
    prefixes = ["model.layers.0", "model.layers.1"]
    with torch.inference_mode():
        place_outside(model, checkpoint, prefixes, CPU)
        with pytest.raises(IndexError):
            record(model, prefixes, torch.full((1, 4), 1_000_000), CPU)

    held: list[Mapping[str, object]] = [vars(model.get_submodule(name)) for name in prefixes]
    assert not any("forward" in attributes for attributes in held)
