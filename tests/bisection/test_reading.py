"""Weights of other tools' formats, and what cannot be bisected."""

from __future__ import annotations

from pathlib import Path

import pytest

import quantkit
from quantkit.errors import ArtifactError
from tests.bisection.artifacts import run
from tests.formats.readers.packers import make_fp8
from tests.helpers import make_pico_model
from tests.test_artifacts_foreign import round_to_gptq


def test_formats_of_other_tools_are_decoded(text: Path, tmp_path: Path) -> None:
    """GPTQ and FP8 folders: their layers are ranked, and all restored is the original."""
    model = make_pico_model(tmp_path / "model", layers=1, dtype="float16")
    round_to_gptq(model, tmp_path / "gptq")
    make_fp8(model, tmp_path / "fp8")
    for name in ("gptq", "fp8"):
        found = run(tmp_path / name, model, text, 1.0)
        assert found.format == name
        assert found.outcome == "passes"
        assert found.kl_restored < 1e-6 < found.kl
        assert not any(suspect.flaw for suspect in found.units)
    assert any("FP8" in note for note in found.notes)


def test_an_onnx_graph_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    """With what can be bisected instead."""
    recipe = quantkit.Recipe.model_validate(
        {
            "version": 1,
            "quantize": {"scheme": "w4a16", "group_size": 32, "method": "rtn"},
            "export": [{"format": "onnx"}],
        }
    )
    quantkit.quantize(recipe, model=model, output=tmp_path / "out", gate=False)
    with pytest.raises(ArtifactError, match="bisect the compressed-tensors artifact"):
        run(tmp_path / "out" / "onnx", model, text, 1.0)
