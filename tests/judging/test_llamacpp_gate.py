"""`gate` and `compare` on GGUF files: the file in llama.cpp, its baseline in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest

import quantkit
from quantkit.errors import InputError
from tests.judging.gguf_files import write_gguf

DEMO = Path(__file__).parent.parent.parent / "models" / "demo-llama"
TEXT = Path(__file__).parent.parent.parent / "calib_data" / "docs_evaluation.txt"
GATE = (
    "gate.samples=8",
    "gate.sequence_length=64",
    "gate.probes=null",
    "gate.timeout_seconds=120",
)
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def test_a_gguf_file_is_judged_where_it_will_be_served(tmp_path: Path) -> None:
    """`auto` is llama.cpp; one that is not the recorded file fails, whatever its numbers are."""
    folder = tmp_path / "out" / "gguf"
    folder.mkdir(parents=True)
    file = write_gguf(DEMO, folder / "demo-Q8_0.gguf", kind=Q8_0)
    other = {"path": "gguf", "files": {"demo-Q4_0.gguf": "0" * 64}}
    row = {"path": "gguf", "files": {file.name: "0" * 64}}
    (tmp_path / "out" / "quantkit.json").write_text(json.dumps({"artifacts": [other, row]}))

    report = quantkit.gate(
        file, baseline=DEMO, data=TEXT, output=tmp_path / "report", overrides=GATE, device="cpu"
    )

    (found,) = report.artifacts
    assert (found.format, found.runtime) == ("gguf", "llama.cpp")
    assert found.judgement.kl is not None
    assert 1e-5 < found.judgement.kl.value < 5e-3
    assert report.verdict == "FAIL"
    (reason,) = found.judgement.reasons
    assert "'demo-Q8_0.gguf' is not the one that was written" in reason
    measured = report.evidence["measured_with"][file.name]
    assert measured["dtype"] == "Q8_0 against float32"


def test_artifacts_of_several_formats_compete_each_in_its_runtime(tmp_path: Path) -> None:
    """On the same tokens, in one report; what no runtime of the recipe loads is refused."""
    file = write_gguf(DEMO, tmp_path / "demo.gguf", kind=Q8_0)
    copy = shutil.copytree(DEMO, tmp_path / "copy")
    output = tmp_path / "out"

    report = quantkit.compare(
        DEMO,
        [file, copy],
        data=TEXT,
        output=output,
        overrides=GATE,
        device="cpu",
        footprint=False,
    )
    with pytest.raises(InputError, match="transformers does not load gguf"):
        quantkit.compare(
            DEMO,
            [copy, file],
            data=TEXT,
            output=tmp_path / "refused",
            overrides=(*GATE, "gate.runtime=transformers"),
        )

    assert [row.runtime for row in report.artifacts] == ["llama.cpp", "transformers"]
    assert [row.judgement.verdict for row in report.artifacts] == ["PASS", "FAIL"]
    assert report.verdict == "PASS"
    assert not (tmp_path / "refused").exists()
