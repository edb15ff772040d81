"""Some of the broken artifacts of benchmarks/broken_artifacts.py, on a tiny scale."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import quantkit
from benchmarks.damage import DAMAGE, Damage
from quantkit.errors import InputError
from tests.cli.running import ROOT

MODEL = ROOT / "models" / "demo-llama"
SETTINGS = (
    "quantize.method=rtn",
    "gate.samples=8",
    "gate.sequence_length=64",
    "export=[{format: compressed-tensors}, {format: gguf, type: Q4_K_M}, {format: onnx}]",
)
WINDOWS = ("gate.samples=8", "gate.sequence_length=64", "gate.probes.max_new_tokens=8")
FOLDERS = {"w4a16": "compressed-tensors", "gguf": "gguf", "onnx_int4": "onnx"}
VERIFIED = (
    ("w4a16", "scales shifted"),
    ("w4a16", "layer missing"),
    ("w4a16", "end of sequence lost"),
    ("w4a16", "file truncated"),
    ("w4a16", "chat template cut"),
    ("w4a16", "vocabulary permuted"),
    ("w4a16", "rope scaled"),
    ("gguf", "rows not permuted"),
    ("gguf", "d and dmin exchanged"),
    ("gguf", "end of sequence lost"),
    ("gguf", "another end of sequence"),
    ("onnx_int4", "scales transposed"),
    ("onnx_int4", "zero points of 7"),
    ("onnx_int4", "end of sequence lost"),
    ("onnx_int4", "chat template lost"),
)
"""What `verify` sees against the original."""
JUDGED = (
    ("gguf", "BOS flag flipped"),
    ("onnx_int4", "rope theta"),
)
"""What the gate alone sees."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three formats of one quick job."""
    output = tmp_path_factory.mktemp("sound") / "out"
    quantkit.quantize(
        "onnx-int4", model=MODEL, output=output, overrides=SETTINGS, device="cpu", gate=False
    )
    return output


def break_copy(sound: Path, folder: Path, artifact: str, name: str) -> Path:
    """Return a broken copy, without the evidence that has the hashes."""
    (damage,) = (each for each in DAMAGE if (each.artifact, each.name) == (artifact, name))
    copy = Path(shutil.copytree(sound / FOLDERS[artifact], folder / "artifact"))
    damage.apply(copy, MODEL)
    return copy


def find_problems(artifact: Path) -> tuple[str, ...]:
    """What `verify` says, as a problem or as an error."""
    try:
        return quantkit.verify(artifact, against=MODEL).problems
    except InputError as error:
        return (str(error),)


@pytest.mark.parametrize("artifact", FOLDERS)
def test_a_sound_artifact_has_no_problem(sound: Path, artifact: str) -> None:
    """Else the rest would prove nothing."""
    assert find_problems(sound / FOLDERS[artifact]) == ()


@pytest.mark.parametrize(("artifact", "name"), VERIFIED)
def test_verify_sees_damage(sound: Path, tmp_path: Path, artifact: str, name: str) -> None:
    """Whatever it does to the numbers of short windows."""
    assert find_problems(break_copy(sound, tmp_path, artifact, name))


@pytest.mark.parametrize(("artifact", "name"), JUDGED)
def test_the_gate_sees_damage(sound: Path, tmp_path: Path, artifact: str, name: str) -> None:
    """By what the runtime computes, or by how it reads a prompt."""
    report = quantkit.gate(
        break_copy(sound, tmp_path, artifact, name),
        baseline=MODEL,
        data=ROOT / "calib_data" / "docs_evaluation.txt",
        overrides=WINDOWS,
        device="cpu",
    )

    assert report.verdict == "FAIL"
    assert report.artifacts[0].judgement.reasons


def test_the_user_may_make_notes_of_what_lies_beside(sound: Path, tmp_path: Path) -> None:
    """For servers that are given token ids: nothing else is wrong here but eight short windows."""
    report = quantkit.gate(
        break_copy(sound, tmp_path, "gguf", "chat template lost"),
        baseline=MODEL,
        data=ROOT / "calib_data" / "docs_evaluation.txt",
        overrides=(*WINDOWS, "gate.tokenizer=note"),
        device="cpu",
    )

    words = "its chat template is lost"
    assert any(words in note for note in report.notes)
    assert not any(words in reason for reason in report.artifacts[0].judgement.reasons)


def test_kinds_of_damage_have_names_of_their_own() -> None:
    """No two of one artifact are called the same."""

    def name(damage: Damage) -> tuple[str, str]:
        return damage.artifact, damage.name

    assert len(set(map(name, DAMAGE))) == len(DAMAGE) >= 20
