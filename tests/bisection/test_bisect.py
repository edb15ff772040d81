"""What is broken is found by its name, and what is proposed really passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import quantkit
from quantkit.errors import ArtifactError, InputError, OutputError
from quantkit.judging.sampling import find_look_confidence
from tests.bisection.artifacts import (
    DOWN,
    GATE,
    NORM,
    UP,
    copy_changed,
    edit_config,
    exchange_scales,
    fill_norm,
    fold_scales,
    randomize,
    round_plainly,
    run,
)

LIMIT = 0.18
"""Above what the sound artifact has, below what any damage makes."""
FOLDED_LIMIT = 0.2
"""The same of the artifact with folded scales."""


def test_an_artifact_that_passes_is_told_so(sound: Path, model: Path, text: Path) -> None:
    """With its ranking, and nothing proposed."""
    found = run(sound, model, text, LIMIT)
    assert (found.outcome, found.exit_code, found.guilty) == ("passes", 0, ())
    assert found.proposal is None
    assert found.judgement is not None
    assert found.judgement.verdict == "PASS"
    assert len(found.blocks) == 3
    assert not any(suspect.flaw for suspect in (*found.blocks, *found.units))
    assert found.kl_restored < 1e-6 < found.kl


@pytest.mark.parametrize(
    ("change", "names"),
    [(randomize, {DOWN}), (exchange_scales, {UP, GATE}), (fill_norm, {NORM})],
)
def test_what_is_broken_is_found_by_its_name(
    change: Callable[[dict[str, Tensor]], None],
    names: set[str],
    sound: Path,
    model: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    """It alone is named, and the proposal is the same recipe again."""
    found = run(copy_changed(sound, tmp_path / "broken", change), model, text, LIMIT)
    assert (found.outcome, set(found.guilty)) == ("defect", names)
    assert {unit.name for unit in found.units if unit.flaw} == names
    assert found.proposal is not None
    assert found.proposal.recipe == ""
    assert found.proposal.judgement.verdict == "PASS"


@pytest.mark.parametrize(("change", "name"), [(None, None), (randomize, DOWN), (fill_norm, NORM)])
def test_folded_scales_are_no_damage_and_hide_none(
    change: Callable[[dict[str, Tensor]], None] | None,
    name: str | None,
    model: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    """A layer alone goes back with what was folded into it, also where its neighbour is broken."""
    folded = copy_changed(model, tmp_path / "folded", fold_scales)
    artifact = round_plainly(folded, tmp_path / "out", {"scheme": "w4a16", "group_size": 32})
    if change is not None:
        artifact = copy_changed(artifact, tmp_path / "broken", change)
    found = run(artifact, model, text, FOLDED_LIMIT)
    assert found.guilty == (() if name is None else (name,))
    assert found.outcome == ("passes" if name is None else "defect")
    assert found.kl_restored < 1e-6
    # A layer put back without its scales would make things far worse.
    assert all(unit.share > -0.2 for unit in found.units)


def test_numbers_of_the_config_are_found(
    sound: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    """Where all weights are sound and restoring them does not help."""
    artifact = copy_changed(sound, tmp_path / "other", lambda tensors: None)
    edit_config(artifact, rms_norm_eps=0.5)
    found = run(artifact, model, text, LIMIT)
    assert (found.outcome, found.guilty) == ("config", ("config.json",))
    assert "rms_norm_eps is 0.5 and not 1e-06" in found.summary
    assert found.blocks[0].name == "config.json"


def make_outliers(tensors: dict[str, Tensor]) -> None:
    """Make one scale a row too coarse for the layers of one kind."""
    for index in (0, 2):
        name = f"model.layers.{index}.mlp.down_proj.weight"
        columns = torch.ones(tensors[name].shape[1])
        columns[::40] = 10.0
        tensors[name] = (tensors[name] * columns).to(tensors[name].dtype)


def test_a_proposed_override_really_passes(model: Path, text: Path, tmp_path: Path) -> None:
    """The same recipe with the proposal in it gives an artifact that its gate passes."""
    original = copy_changed(model, tmp_path / "outlier", make_outliers)
    settings = {"scheme": "w4a16", "group_size": "channel"}
    artifact = round_plainly(original, tmp_path / "coarse", settings)
    found = run(artifact, original, text, LIMIT)
    assert (found.outcome, found.exit_code) == ("budget", 0)
    assert found.proposal is not None
    assert found.proposal.scheme == "w8a16"
    assert {"model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"} & set(found.guilty)
    proposed = yaml.safe_load(found.proposal.recipe)["quantize"]
    gate = {
        "data": str(text),
        "samples": 64,
        "max_samples": 64,
        "sequence_length": 32,
        "max_kl": LIMIT,
        "max_perplexity_increase": None,
        "min_top1_agreement": None,
        "probes": None,
    }
    tree = {"version": 1, "quantize": {"method": "rtn", **settings, **proposed}, "gate": gate}
    recipe = quantkit.Recipe.model_validate(tree)
    result = quantkit.quantize(recipe, model=original, output=tmp_path / "mended")
    assert result.verdict == "PASS", result.report.artifacts[0].judgement.reasons
    assert result.artifacts[0].tensor_bytes == found.proposal.tensor_bytes
    assert result.report.artifacts[0].judgement.kl.value == pytest.approx(
        found.proposal.judgement.kl.value, rel=0.02
    )


def test_no_choice_that_was_not_measured_to_pass_is_proposed(
    sound: Path, model: Path, text: Path
) -> None:
    """A limit that no layer can hold is answered with exit code 4."""
    found = run(sound, model, text, 1e-12)
    assert (found.outcome, found.exit_code, found.proposal) == ("unsolved", 4, None)


def test_the_original_itself_has_no_guilty_weight(model: Path, text: Path) -> None:
    """All that could differ is equal."""
    found = run(model, model, text, LIMIT)
    assert found.kl == 0
    assert (found.blocks, found.units) == ((), ())


def test_a_verdict_is_as_sure_as_the_gates(sound: Path, model: Path, text: Path) -> None:
    """At its first look, which shares the error with those that may follow."""
    settings = ("samples=16", "max_samples=64", "sequence_length=32", f"max_kl={LIMIT}")
    overrides = [f"gate.{each}" for each in settings]
    overrides += ["gate.max_perplexity_increase=null", "gate.min_top1_agreement=null"]
    found = quantkit.bisect(sound, baseline=model, data=text, windows=8, overrides=overrides)
    assert found.judgement is not None
    assert (found.judgement.windows, found.judgement.looks) == (16, (16, 32, 64))
    assert found.judgement.confidence == find_look_confidence(0.95, 3)


def test_results_are_written_whole(sound: Path, model: Path, text: Path, tmp_path: Path) -> None:
    """JSON without NaN, and a page; a folder that exists is left alone."""
    run(sound, model, text, LIMIT, output=tmp_path / "result")
    document = json.loads((tmp_path / "result" / "bisect.json").read_text())
    assert document["outcome"] == "passes"
    assert len(document["units"]) > 3
    page = (tmp_path / "result" / "bisect.md").read_text()
    assert "| restored | KL then |" in page
    with pytest.raises(OutputError, match="exists"):
        run(sound, model, text, LIMIT, output=tmp_path / "result")


def test_what_cannot_be_decoded_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    """By name, with what to do."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError):
        run(tmp_path, model, text, LIMIT)
    with pytest.raises(InputError, match="windows 0"):
        quantkit.bisect(model, baseline=model, data=text, windows=0)


def test_a_gguf_file_gets_types(model: Path, text: Path, tmp_path: Path) -> None:
    """Of single tensors, below the export; the recipe that has them is valid."""
    quantkit.convert(model, to="gguf:Q4_0", output=tmp_path / "out", pre_tokenizer="gpt-2")
    found = run(tmp_path / "out", model, text, 0.12)
    assert (found.format, found.outcome) == ("gguf", "budget")
    assert found.proposal is not None
    export = yaml.safe_load(found.proposal.recipe)["export"][0]
    assert {row["type"] for row in export["overrides"]} == {"Q8_0"}
    quantkit.Recipe.model_validate({"version": 1, "export": [{**export, "type": "Q4_0"}]})
