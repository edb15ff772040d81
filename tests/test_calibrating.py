"""Statistics are taken once, and many recipes are solved from them without a walk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
import quantkit.calibrating.taking
from quantkit.calibration.stored import load_stats, open_statistics
from quantkit.calibration.walk import GroupStop
from quantkit.errors import CalibrationError, InputError, OutputError, PlanError, ResourceError
from quantkit.recipe import Recipe
from quantkit.records import Report, Statistics
from tests.calibration.test_walk import open_model, start_walk
from tests.cli.running import ROOT, run_here
from tests.helpers import make_pico_model
from tests.pico_jobs import count_walks, make_pico_job

GPTQ = {"scheme": "w4a16", "group_size": 32, "method": "gptq"}
BEST = {**GPTQ, "effort": "best"}


def make_job(folder: Path, **quantize: object) -> Recipe:
    """A pico job without an output of its own."""
    return make_pico_job(folder, quantize=quantize or GPTQ)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pico model and a calibration text."""
    folder = tmp_path_factory.mktemp("calibrated")
    make_job(folder)
    return folder


@pytest.fixture(scope="module")
def stored(folder: Path) -> Statistics:
    """Everything that there is of the model, Fisher matrices included."""
    return quantkit.calibrate(make_job(folder, **BEST), output=folder / "statistics")


def solve(folder: Path, output: Path, statistics: Any = None, **quantize: object) -> Report:
    """The report of a job without a gate."""
    recipe = make_job(folder, **quantize)
    result = quantkit.quantize(recipe, output=output, statistics=statistics, gate=False)
    return result.report


def test_what_is_stored_is_what_the_walk_of_the_original_finds(
    folder: Path, stored: Statistics
) -> None:
    """Bit by bit: second moments, means, maxima and samples of every input."""
    opened = open_statistics(stored)
    checkpoint, plan = open_model(folder / "model", make_job(folder))
    windows = opened.windows
    seen = 0
    with torch.inference_mode():
        for stop in start_walk(checkpoint, plan, windows, opened.dtype):
            if not isinstance(stop, GroupStop) or stop.stats is None:
                continue
            found = load_stats(opened, stop.block, stop.group, torch.device("cpu"))
            assert found is not None
            for name in ("second_moment", "mean", "absmax", "sample"):
                assert torch.equal(getattr(found, name), getattr(stop.stats, name)), name
            assert found.tokens == stop.stats.tokens
            assert found.drift is None
            seen += 1
    assert seen == stored.inputs == 12
    assert (stored.blocks, stored.windows, stored.sequence_length) == (3, 16, 32)


@pytest.mark.parametrize(
    "quantize",
    [
        GPTQ,
        {"scheme": "w4a16", "group_size": 32},
        {"scheme": "fp8_static", "group_size": "channel", "kv_cache": "fp8"},
    ],
    ids=["gptq", "awq+gptq", "static and kv"],
)
def test_recipes_are_solved_without_a_walk(
    folder: Path,
    stored: Statistics,
    quantize: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The first input of all is the same in both ways, and so is what is solved from it."""
    walks = count_walks(monkeypatch)
    found = solve(folder, tmp_path / "stored", stored, **quantize)
    assert not walks
    expected = solve(folder, tmp_path / "walked", **quantize)
    assert walks
    assert found.layers[0] == expected.layers[0]
    assert [layer.name for layer in found.layers] == [layer.name for layer in expected.layers]
    assert found.layers != expected.layers
    assert len(found.kv_cache) == len(expected.kv_cache)
    assert any(note.startswith("statistics of the original model") for note in found.notes)
    assert found.evidence["statistics"]["sha256"]
    assert "statistics" not in expected.evidence
    assert found.evidence["calibration"] == expected.evidence["calibration"]


def test_a_gguf_file_is_solved_from_them_too(
    folder: Path, stored: Statistics, tmp_path: Path
) -> None:
    """Its importance matrix is there, and effort best says what it cannot do."""
    exports = ({"format": "gguf", "type": "Q4_0"},)
    recipe = make_pico_job(folder, exports, quantize={"effort": "best"})
    result = quantkit.quantize(recipe, output=tmp_path / "out", statistics=stored, gate=False)
    assert any("no layer makes up for what those before it lost" in n for n in result.report.notes)
    assert all(layer.relative_error is not None for layer in result.report.layers)


def test_the_recipe_says_what_was_calibrated_on(
    folder: Path, stored: Statistics, tmp_path: Path
) -> None:
    """Its own calibration is not looked at: the data may be gone."""
    recipe = make_job(folder)
    assert recipe.calibration is not None
    elsewhere = recipe.calibration.model_copy(update={"data": "gone.txt", "samples": 3})
    recipe = recipe.model_copy(update={"calibration": elsewhere})
    result = quantkit.quantize(
        recipe, output=tmp_path / "out", statistics=stored.folder, gate=False
    )
    told = result.report.evidence["recipe"]["resolved"]["calibration"]
    assert told["data"] == str(folder / "calibration.txt")
    assert told["samples"] == 16


def test_what_is_not_in_them_is_refused_before_any_work(
    folder: Path, stored: Statistics, tmp_path: Path
) -> None:
    """Each with the remedy; and `calibrate` says it beforehand."""
    plain = quantkit.calibrate(make_job(folder), output=tmp_path / "plain")
    assert [line.split(":")[0] for line in plain.lacks] == ["auto", "effort best"]
    with pytest.raises(PlanError, match="effort best needs the Fisher matrices"):
        solve(folder, tmp_path / "out", plain, **BEST)
    manifest = json.loads((plain.folder / "statistics.json").read_text())
    manifest["holds"] |= {"key_value": False, "no_key_value": "nobody looked"}
    del manifest["blocks"]["2"]
    (plain.folder / "statistics.json").write_text(json.dumps(manifest))
    with pytest.raises(PlanError) as caught:
        solve(folder, tmp_path / "out", plain, **GPTQ, kv_cache="fp8")
    assert "nobody looked" in str(caught.value)
    assert "layers.2.self_attn.q_proj was not watched" in str(caught.value)
    auto = {"scheme": "auto", "target_bits": 14, "group_size": 32}
    with pytest.raises(PlanError, match="auto measures the layers' sensitivity"):
        solve(folder, tmp_path / "out", stored, **auto)
    with pytest.raises(InputError, match="calibration and statistics are both given"):
        quantkit.quantize(make_job(folder), statistics=stored, calibration=[[3]])
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_another_model_and_damaged_files_are_refused(
    folder: Path, stored: Statistics, tmp_path: Path
) -> None:
    """The model is told by its hashes, a file by its own."""
    other = make_pico_model(tmp_path / "other", layers=3, seed=7)
    recipe = make_job(folder)
    with pytest.raises(CalibrationError, match=r"has other files \(model.safetensors\)"):
        quantkit.quantize(
            recipe, model=other, output=tmp_path / "out", statistics=stored, gate=False
        )
    broken = shutil.copytree(stored.folder, tmp_path / "broken")
    path = broken / "block-00001.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] + 1}, path)
    with pytest.raises(CalibrationError, match=r"block-00001\.safetensors is damaged"):
        solve(folder, tmp_path / "out", broken)
    shutil.rmtree(tmp_path / "out.partial")
    (broken / "statistics.json").write_text('{"schema": 1}')
    with pytest.raises(CalibrationError, match="is damaged"):
        solve(folder, tmp_path / "out", broken)
    with pytest.raises(CalibrationError, match="holds no statistics"):
        solve(folder, tmp_path / "out", folder / "model")


def test_a_job_goes_on_with_the_same_statistics_alone(
    folder: Path, stored: Statistics, tmp_path: Path
) -> None:
    """Blocks from a walk and blocks from statistics are not mixed."""

    def stop(event: quantkit.Event) -> None:
        if event.stage == "quantize":
            raise KeyboardInterrupt

    recipe = make_job(folder)
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(recipe, output=output, statistics=stored, gate=False, progress=stop)
    with pytest.raises(InputError, match=r"differs in .*statistics"):
        quantkit.quantize(recipe, output=output, gate=False)
    told: list[str] = []
    quantkit.quantize(
        recipe,
        output=output,
        statistics=stored,
        gate=False,
        progress=lambda event: told.append(event.message),
    )
    assert any(message.startswith("resumed after 1 block") for message in told)


def test_an_interrupted_walk_keeps_the_blocks_that_it_has_seen(
    folder: Path, stored: Statistics, tmp_path: Path
) -> None:
    """The bytes are those of a walk in one go."""

    def stop(event: quantkit.Event) -> None:
        if event.stage == "calibrate" and event.done == 2:
            raise KeyboardInterrupt

    output = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        quantkit.calibrate(make_job(folder, **BEST), output=output, progress=stop)
    assert not output.exists()
    told: list[str] = []
    quantkit.calibrate(
        make_job(folder, **BEST), output=output, progress=lambda event: told.append(event.message)
    )
    assert "resumed after 2 blocks" in told
    for path in stored.folder.iterdir():
        assert path.read_bytes() == (output / path.name).read_bytes(), path.name
    assert sorted(map(os.path.basename, stored.folder.iterdir())) == sorted(os.listdir(output))


def test_the_commands_do_what_the_functions_do(
    folder: Path, stored: Statistics, tmp_path: Path
) -> None:
    """`quantize --stats`, and what it answers to a folder without statistics, at once."""
    command = ("quantize", folder / "model", "--recipe", ROOT / "recipes" / "gptq4.yaml")
    options = ("--no-gate", "--set", "quantize.group_size=32", "--json")
    done = run_here(*command, *options, "--output", tmp_path / "out", "--stats", stored.folder)
    assert done.returncode == 0, done.stderr
    evidence = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert evidence["recipe"]["overrides"] == [
        "quantize.group_size=32",
        f"calibration.data={folder / 'calibration.txt'}",
        "calibration.samples=16",
        "calibration.sequence_length=32",
    ]
    refused = run_here(*command, *options, "--output", tmp_path / "no", "--stats", folder)
    assert refused.returncode == 2
    assert "holds no statistics" in refused.stderr


def test_what_cannot_be_calibrated_is_refused(
    folder: Path, stored: Statistics, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No data, no room, an output that exists, an output that is somebody's."""
    recipe = make_job(folder)
    with pytest.raises(InputError, match="nothing to calibrate on"):
        quantkit.calibrate(recipe.model_copy(update={"calibration": None}), output=tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        quantkit.calibrate(recipe, output=stored.folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "statistics.json").write_text("{}")
    with pytest.raises(OutputError, match="not a folder that quantkit wrote"):
        quantkit.calibrate(recipe, output=tmp_path / "mine", overwrite=True)
    monkeypatch.setattr(quantkit.calibrating.taking, "packed_bytes", lambda _: 1 << 50)
    with pytest.raises(ResourceError, match=r"take [\d,]+ bytes in .* and [\d,]+ are free"):
        quantkit.calibrate(recipe, output=tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["mine"]


def test_an_iterator_is_calibrated_on_as_data_is(folder: Path, tmp_path: Path) -> None:
    """And no further than the windows need; the statistics say where they are from."""

    def count() -> Iterator[list[int]]:
        for start in range(10_000):
            assert start < 100
            yield [(start + step) % 297 + 3 for step in range(32)]

    made = quantkit.calibrate(make_job(folder), output=tmp_path / "out", calibration=count())
    assert made.source == "an iterator of the caller"
    report = solve(folder, tmp_path / "solved", made)
    assert report.evidence["calibration"]["source"] == "an iterator of the caller"
