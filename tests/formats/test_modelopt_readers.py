"""NVIDIA's ModelOpt and this package read and write the same layout: `make integrations`.

ModelOpt 0.47 exports without a GPU, so that its own files can be compared with ours.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.formats.verify import verify_artifact
from quantkit.recipe import validate
from tests.formats.cases import stored_tensors
from tests.formats.test_modelopt import SCHEMES, read_json, solve, write
from tests.helpers import make_pico_model

pytestmark = pytest.mark.integrations

CONFIGS = {
    "fp8_static": "FP8_DEFAULT_CFG",
    "w8a8_static": "INT8_SMOOTHQUANT_CFG",
    "w4a16": "INT4_AWQ_CFG",
}
"""Scheme -> ModelOpt's own recipe of it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups of 128 divide its rows."""
    return make_pico_model(
        tmp_path_factory.mktemp("readers") / "model", hidden=128, intermediate=256, tied=False
    )


@pytest.fixture(scope="module", params=CONFIGS)
def exported(
    model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[str, Path]:
    """A scheme, and what ModelOpt itself makes of the model."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    scheme = request.param
    config: Any = copy.deepcopy(getattr(mtq, CONFIGS[scheme]))
    if scheme == "fp8_static":
        config["quant_cfg"] += copy.deepcopy(mtq.FP8_KV_CFG)["quant_cfg"]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    ids = torch.randint(3, 250, (4, 32), generator=torch.Generator().manual_seed(0))

    def calibrate(module: nn.Module) -> None:
        module(ids)

    quantized = mtq.quantize(loaded, config, calibrate)
    folder = tmp_path_factory.mktemp("exported") / scheme
    with torch.inference_mode():
        export_hf_checkpoint(quantized, dtype=torch.bfloat16, export_dir=folder)
    return scheme, folder


def quantize(model: Path, output: Path, scheme: str) -> Path:
    """Do the same by a job; return the artifact's folder."""
    recipe = {
        "version": 1,
        "model": str(model),
        "output": str(output),
        "calibration": {
            "data": "calib_data/docs_calibration.txt",
            "samples": 4,
            "sequence_length": 64,
        },
        "quantize": {"scheme": scheme, "kv_cache": "fp8" if scheme == "fp8_static" else "none"},
        "export": [{"format": "modelopt"}],
    }
    quantkit.quantize(validate(recipe), gate=False, device="cpu")
    return output / "modelopt"


def describe(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes."""
    return {name: (each.dtype, tuple(each.shape)) for name, each in tensors.items()}


def test_a_job_writes_what_modelopt_writes(
    model: Path, tmp_path: Path, exported: tuple[str, Path]
) -> None:
    """The same tensors under the same names, and the same description.

    Ours has a `pre_quant_scale` of ones on every layer of W4A16_AWQ: ModelOpt leaves it out where
    servers make one layer of several, and these do not look at it there.
    """
    scheme, theirs = exported
    ours = quantize(model, tmp_path / "out", scheme)
    mine, other = (describe(stored_tensors(folder)) for folder in (ours, theirs))
    added = mine.keys() - other.keys()
    assert all(name.endswith("_proj.pre_quant_scale") for name in added)
    assert bool(added) == (scheme == "w4a16")
    assert {name: mine[name] for name in other} == other
    described, expected = (read_json(each / "hf_quant_config.json") for each in (ours, theirs))
    assert described == expected
    # ModelOpt writes groups for FP8 and FP4 alone.
    block, known = (
        read_json(each / "config.json")["quantization_config"] for each in (ours, theirs)
    )
    assert {key: block[key] for key in known} == known
    assert block.keys() - known.keys() <= {"config_groups", "group_size"}


def test_what_modelopt_writes_is_read(model: Path, exported: tuple[str, Path]) -> None:
    """Decoded, its weights are roundings of the original's, and nothing is missing."""
    scheme, theirs = exported
    checked = verify_artifact(theirs, str(model))
    assert (checked.format, checked.scheme.partition(" ")[0]) == ("modelopt", scheme)
    assert checked.problems == ()
    assert checked.comparison is not None
    assert 0 < checked.comparison.largest_error < (0.2 if scheme == "w4a16" else 0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_modelopt_decodes_and_encodes_our_layers(model: Path, tmp_path: Path, scheme: str) -> None:
    """Its functions give our weights from our tensors, or our codes from our weights."""
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.quant_utils import from_quantized_weight, to_quantized_weight

    case = solve(model, scheme, "fp8")
    folder = write(case, tmp_path / "modelopt").folder
    stored = stored_tensors(folder)
    formats = {
        "fp8_static": "fp8",
        "fp8_dynamic": "fp8_pc_pt",
        "w8a8_static": "int8_sq",
        "w4a16": "int4_awq",
    }
    for name, layer in case.layers.items():
        weight = layer.codes.float() * layer.scale.float().repeat_interleave(
            layer.codes.shape[1] // layer.scale.shape[1], dim=1
        )
        codes, scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale"]
        again = to_quantized_weight(weight, scale, formats[scheme], block_size=layer.group_size)
        assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
        if scheme in ("fp8_static", "w8a8_static"):
            decoded = from_quantized_weight(codes, scale, formats[scheme], torch.float32)
            assert torch.equal(decoded, weight)
    nested = json.loads((folder / "hf_quant_config.json").read_text())
    flat = read_json(folder / "config.json")["quantization_config"]
    known = convert_hf_quant_config_format(nested)
    assert {key: flat[key] for key in known} == known
