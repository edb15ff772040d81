"""Measured costs of the types of a GGUF file against whole models with one layer replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from quantkit.allocation.sensitivity import measure_costs
from quantkit.ggml_types import GGML_TYPES
from quantkit.job import plan_job
from quantkit.numerics.ggml.codec import decode, encode_rows
from quantkit.recipe import validate
from quantkit.records import LayerStats
from quantkit.schemes import EFFORTS
from quantkit.solvers.ggml import solve_ggml
from tests.allocation.conftest import CPU, load_whole, make_windows, open_folder
from tests.helpers import make_pico_model

LENGTH, COUNT, VOCABULARY = 16, 12, 300


@pytest.mark.parametrize(
    ("method", "effort"), [("rtn", "fast"), ("gptq", "fast"), ("gptq", "normal"), ("gptq", "best")]
)
def test_costs_are_those_of_one_layer_as_the_job_encodes_it(
    method: str, effort: str, tmp_path: Path
) -> None:
    """At the least effort as llama.cpp does; without a look at the whole model at the most."""
    folder = make_pico_model(
        tmp_path, hidden=32, intermediate=64, layers=2, vocab=VOCABULARY, dtype="float32"
    )
    export = {
        "format": "gguf",
        "type": "auto",
        "target_bits": 20.0,
        "candidates": ["Q4_0", "Q5_1", "F32"],
    }
    recipe = validate(
        {
            "version": 1,
            "calibration": {"data": "x.txt", "samples": COUNT, "sequence_length": LENGTH},
            "quantize": {"method": method, "effort": effort},
            "export": [export],
        }
    )
    plan = plan_job(recipe, open_folder(folder), gate=False)
    choice = plan.choice
    assert choice is not None
    windows = make_windows(COUNT, LENGTH, VOCABULARY)

    costs = measure_costs(
        open_folder(folder), plan, choice, windows, device=CPU, tell=lambda event: None
    )

    model = load_whole(folder)
    measured, observed = (
        torch.from_numpy(part)
        for part in (windows.ids[: choice.windows], windows.ids[choice.windows :])
    )
    with torch.inference_mode():
        log_p = model(input_ids=measured, use_cache=False).logits.double().log_softmax(-1)
        for unit, row in zip(choice.units, costs, strict=True):
            module = model.get_submodule(unit.candidates[0].linears[0].name)
            inputs = observe(model, module, observed)
            importance = inputs.square().mean(0) if method == "gptq" else None
            weight = module.get_parameter("weight").clone()
            for candidate, cost in zip(unit.candidates, row, strict=True):
                kind = GGML_TYPES[candidate.scheme]
                rows = decode(kind, encode_rows(kind, weight, importance))
                if effort != "fast" and kind.quantized:
                    stats = LayerStats(inputs.T @ inputs / len(inputs), len(inputs))
                    solved = solve_ggml(weight, kind, stats, EFFORTS["normal"])
                    rows = solved.blocks.dequantize()
                module.weight = nn.Parameter(rows, requires_grad=False)
                log_q = model(input_ids=measured, use_cache=False).logits.double().log_softmax(-1)
                module.weight = nn.Parameter(weight, requires_grad=False)
                expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
                assert cost == pytest.approx(expected, rel=5e-3, abs=1e-10)
                assert (cost == 0) == (candidate.scheme == "F32")


def observe(model: nn.Module, module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return a layer's input [tokens, I]."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    model(input_ids=ids, use_cache=False)
    hook.remove()
    return seen[0]
