"""A model on a GPU is written as it is, and stays there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.live import saved
from tests.helpers import make_pico_model

pytestmark = pytest.mark.gpu


def test_a_model_on_the_gpu_gives_the_bytes_of_its_copy_on_the_cpu(tmp_path: Path) -> None:
    """And takes no more of the GPU's memory than one of its tensors."""
    folder = make_pico_model(tmp_path / "model", hidden=256, intermediate=1024)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with saved(model, None, tmp_path / "cpu") as written:
        expected = (written / "model.safetensors").read_bytes()
    model = model.to("cuda")
    largest = max(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with saved(model, None, tmp_path / "gpu") as written:
        assert (written / "model.safetensors").read_bytes() == expected
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() <= before + 2 * largest
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
