"""Plans with an export in ModelOpt's layout: what fits, its size, and what is told."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.errors import PlanError
from quantkit.planning import make_plan
from quantkit.recipe import validate
from quantkit.records import Plan, Source
from tests.helpers import make_pico_model

DATA = {"data": "calib_data/docs_calibration.txt", "samples": 4, "sequence_length": 64}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Groups of 64 divide its rows."""
    folder = tmp_path_factory.mktemp("planning") / "model"
    make_pico_model(folder, hidden=128, intermediate=256, tied=False, tokenizer=False)
    return open_checkpoint(Source(str(folder), folder, None))


def plan(checkpoint: Checkpoint, *formats: str, gate: object = None, **quantize: Any) -> Plan:
    """Plan an export to `modelopt`, or to `formats`."""
    tree = {
        "version": 1,
        "calibration": DATA,
        "quantize": {"group_size": 64, **quantize},
        "export": [{"format": name} for name in formats or ("modelopt",)],
        "gate": gate,
    }
    return make_plan(validate(tree), checkpoint, gate=gate is not None)


@pytest.mark.parametrize(
    ("scheme", "algorithm"),
    [
        ("fp8_static", "FP8"),
        ("fp8_dynamic", "FP8_PER_CHANNEL_PER_TOKEN"),
        ("w8a8_static", "W8A8_SQ_PER_CHANNEL"),
        ("w4a16", "W4A16_AWQ"),
    ],
)
def test_the_algorithm_is_named(checkpoint: Checkpoint, scheme: str, algorithm: str) -> None:
    found = plan(checkpoint, scheme=scheme).modelopt
    assert found is not None
    assert found.algorithm == algorithm


def test_fp8_has_one_scale_where_the_layout_asks_for_it(checkpoint: Checkpoint) -> None:
    """In the other formats of the job too; without the layout, rows have their own."""
    both = plan(checkpoint, "compressed-tensors", "modelopt", scheme="fp8_static")
    assert all(linear.one_scale for linear in both.linears)
    assert any("share one scale" in note for note in both.notes)
    alone = plan(checkpoint, "compressed-tensors", scheme="fp8_static")
    assert not any(linear.one_scale for linear in alone.linears)
    assert alone.modelopt is None
    assert both.artifact_bytes == alone.artifact_bytes
    assert not any(each.one_scale for each in plan(checkpoint, scheme="fp8_dynamic").linears)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scheme": "w4a16_asym"}, "format modelopt has no scheme w4a16_asym; the nearest"),
        ({"scheme": "fp8_block"}, "format modelopt has no scheme fp8_block"),
        ({"scheme": "w4a16", "group_size": 32}, "no group_size 32 for w4a16; use 64 or 128"),
        ({"scheme": "w4a16", "group_size": "channel"}, "no group_size channel for w4a16"),
        (
            {"scheme": "fp8_static", "method": "smoothquant"},
            "one scale for all rows of an FP8 layer, which method smoothquant would divide",
        ),
        (
            {
                "scheme": "fp8_static",
                "method": "gptq",
                "overrides": [{"match": "*.v_proj", "method": "rtn"}],
            },
            "self_attn.q_proj (6 layers): format modelopt has one scale for FP8 layers that a",
        ),
        ({"scheme": "fp8_static", "kv_cache": "fp8_per_head"}, "use kv_cache fp8"),
        ({"scheme": "none"}, "no layer has a scheme that it has"),
        (
            {
                "scheme": "w4a16",
                "overrides": [{"match": "*.down_proj", "scheme": "fp8_dynamic"}],
            },
            "one scheme and group_size for all layers that are quantized, and there are w4a16 g64",
        ),
        (
            {"scheme": "auto", "target_bits": 8.0, "candidates": ["w4a16", "fp8_dynamic", "none"]},
            "quantize.candidates may name none and one other",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    checkpoint: Checkpoint, settings: dict[str, Any], words: str
) -> None:
    """Before any work, with the remedy."""
    with pytest.raises(PlanError) as caught:
        plan(checkpoint, **settings)
    assert words in str(caught.value)


def test_vllm_judges_what_its_reader_knows(checkpoint: Checkpoint) -> None:
    gate = {"data": "calib_data/docs_evaluation.txt", "sequence_length": 64, "runtime": "vllm"}
    with pytest.raises(PlanError, match="has no W4A16_AWQ"):
        plan(checkpoint, gate=gate, scheme="w4a16")
    assert plan(checkpoint, gate=gate, scheme="fp8_static").modelopt is not None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scheme": "w8a8_static"}, "its PyTorch backend has no such layer"),
        ({"scheme": "fp8_static", "kv_cache": "fp8"}, "takes 1 for the scales of an FP8"),
    ],
)
def test_what_the_server_does_otherwise_is_told(
    checkpoint: Checkpoint, settings: dict[str, Any], words: str
) -> None:
    assert any(words in note for note in plan(checkpoint, **settings).notes)
