"""Artifacts that exist, judged alone and against each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import quantkit
from quantkit.artifacts import _distinct_names
from quantkit.errors import InputError
from tests.helpers import make_pico_model, pico_text

GATE = ("gate.samples=4", "gate.sequence_length=64", "gate.timeout_seconds=120")


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Path]:
    """A baseline, an exact copy of it, one with different weights, and a text."""
    folder = tmp_path_factory.mktemp("trio")
    baseline = make_pico_model(folder / "base", seed=1)
    shutil.copytree(baseline, folder / "copy")
    other = make_pico_model(folder / "other", seed=2)
    text = folder / "text.txt"
    text.write_text(pico_text(600, 3))
    return baseline, folder / "copy", other, text


def test_compare_measures_all_on_the_same_tokens(
    trio: tuple[Path, Path, Path, Path], tmp_path: Path
) -> None:
    """One row an artifact in the order given; the report's verdict is the best of them."""
    baseline, copy, other, text = trio
    report = quantkit.compare(
        baseline, [other, copy], data=text, output=tmp_path / "out", overrides=GATE, device="cpu"
    )
    assert [row.name for row in report.artifacts] == ["other", "copy"]
    divergences = [row.judgement.kl.value for row in report.artifacts if row.judgement.kl]
    assert divergences[0] > 0.1
    assert divergences[1] == 0
    assert report.comparison
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["name"] for row in document["artifacts"]] == ["other", "copy"]
    # A copy that differs in nothing is suspicious; the other gets away with few windows.
    verdicts = [row.judgement.verdict for row in report.artifacts]
    assert verdicts == ["INCONCLUSIVE", "FAIL"]
    assert report.verdict == "INCONCLUSIVE"


def test_compare_refuses_nothing_and_the_same_twice(
    trio: tuple[Path, Path, Path, Path], tmp_path: Path
) -> None:
    """Before any model is loaded."""
    baseline, copy, _, text = trio
    with pytest.raises(InputError, match="name at least one artifact"):
        quantkit.compare(baseline, [], data=text, output=tmp_path / "out")
    with pytest.raises(InputError, match="named twice"):
        quantkit.compare(baseline, [copy, copy], data=text, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_artifacts_are_named_by_as_much_of_their_paths_as_it_takes() -> None:
    """Folders that are all called compressed-tensors are told apart by their parents."""
    assert _distinct_names(["a/x", "b/y"]) == ["x", "y"]
    paths = ["run/awq4/compressed-tensors", "run/fp8/compressed-tensors", "run/other"]
    assert _distinct_names(paths) == ["awq4/compressed-tensors", "fp8/compressed-tensors", "other"]
