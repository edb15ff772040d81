"""Checkpoints of other tools, judged alone, beside others, and as a baseline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import quantkit
from quantkit.errors import ArtifactError
from tests.formats.cases import stored_tensors
from tests.formats.readers.packers import (
    Codes,
    gptq_config,
    linear_names,
    make_fp8,
    pack_gptq,
    write_foreign,
)
from tests.helpers import make_pico_model, pico_text

GATE = (
    "gate.samples=8",
    "gate.sequence_length=32",
    "gate.probes=null",
    "gate.timeout_seconds=120",
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit model, its weights rounded and stored as GPTQ, and a text."""
    folder = tmp_path_factory.mktemp("foreign")
    make_pico_model(folder / "model", layers=1, dtype="float16")
    round_to_gptq(folder / "model", folder / "gptq")
    (folder / "text.txt").write_text(pico_text(600, seed=3))
    return folder


def round_to_gptq(model: Path, folder: Path) -> None:
    """Round the layers of a model to groups of 32 and store them in GPTQ's second layout."""
    tensors = stored_tensors(model)
    parts = {}
    for name in linear_names(tensors):
        weight = tensors[f"{name}.weight"].float()
        grouped = weight.reshape(len(weight), -1, 32)
        low, high = grouped.amin(dim=2), grouped.amax(dim=2)
        scale = ((high - low) / 15).half()
        zeros = torch.round(-low / scale.float()).clamp(0, 15).int()
        steps = torch.round(grouped / scale.float().unsqueeze(2)) + zeros.unsqueeze(2)
        groups = tuple(column // 32 for column in range(weight.shape[1]))
        codes = steps.clamp(0, 15).int().reshape(weight.shape)
        parts[name] = pack_gptq(Codes(codes, zeros, scale, groups), 4, version=2)
    write_foreign(model, folder, parts, gptq_config(checkpoint_format="gptq_v2"))


def test_gptq_and_its_repacking_get_the_same_numbers(bench: Path, tmp_path: Path) -> None:
    """One is judged on its dequantized weights, the other as transformers loads it.

    Against a baseline that is dequantized as well; the notes say what was.
    """
    make_fp8(bench / "model", tmp_path / "fp8")
    quantkit.convert(bench / "gptq", to="compressed-tensors", output=tmp_path / "packed")
    report = quantkit.compare(
        tmp_path / "fp8",
        [bench / "gptq", tmp_path / "packed"],
        data=bench / "text.txt",
        output=tmp_path / "out",
        overrides=GATE,
        device="cpu",
        footprint=False,
    )
    first, second = (row.judgement for row in report.artifacts)
    assert first.kl is not None
    assert second.kl is not None
    assert 0 < first.kl.value == second.kl.value
    assert first.perplexity == second.perplexity
    assert [row.format for row in report.artifacts] == ["gptq", "compressed-tensors"]
    assert [row.scheme for row in report.artifacts] == ["w4a16_asym g32"] * 2
    notes = [note for note in report.notes if "dequantized" in note]
    assert [note.split(" and was judged")[0] for note in notes] == [
        "the baseline is FP8",
        "gptq is GPTQ",
    ]
    assert not list(tmp_path.rglob("dequantized-*"))


def test_an_fp8_model_is_judged_on_its_weights(bench: Path, tmp_path: Path) -> None:
    """The note says what is not measured."""
    make_fp8(bench / "model", tmp_path / "fp8")
    report = quantkit.gate(
        tmp_path / "fp8",
        baseline=bench / "model",
        data=bench / "text.txt",
        output=tmp_path / "out",
        overrides=GATE,
        device="cpu",
    )
    (row,) = report.artifacts
    assert row.judgement.kl is not None
    assert 0 < row.judgement.kl.value < 0.1
    (note,) = (note for note in report.notes if "dequantized" in note)
    assert note.startswith("the artifact is FP8 and was judged on its dequantized weights")
    assert "rounds their inputs to FP8, which is not measured" in note
    assert not list(tmp_path.rglob("dequantized-*"))


def test_a_damaged_artifact_leaves_no_report(bench: Path, tmp_path: Path) -> None:
    """One line, found while it is dequantized."""
    round_to_gptq(bench / "model", tmp_path / "gptq")
    tensors = stored_tensors(tmp_path / "gptq")
    name = "model.layers.0.mlp.up_proj.g_idx"
    tensors[name] = torch.full_like(tensors[name], 9)
    save_file(tensors, tmp_path / "gptq" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="names group 9"):
        quantkit.gate(
            tmp_path / "gptq",
            baseline=bench / "model",
            data=bench / "text.txt",
            output=tmp_path / "out",
            overrides=GATE,
            device="cpu",
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptq"]
