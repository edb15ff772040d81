"""What a job holds while it solves, and what it leaves when it is stopped."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit import block_loop, job
from quantkit.calibration import stats, walk
from quantkit.calibration.parking import Room, choose_room
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import NotYetError, OutputError, ResourceError
from quantkit.planning.prediction import predict
from quantkit.recipe import Recipe
from quantkit.records import BlockPlan, Event, Prediction
from tests.helpers import make_pico_model, pico_text


def make_job(folder: Path, **quantize: object) -> Recipe:
    """An ungated job on a float32 model, whose tensors the walk takes as they are."""
    make_pico_model(folder / "model", hidden=32, intermediate=64, layers=3, dtype="float32")
    (folder / "calibration.txt").write_text(pico_text(600, seed=1))
    return Recipe.model_validate(
        {
            "version": 1,
            "model": str(folder / "model"),
            "output": str(folder / "out"),
            "calibration": {
                "data": str(folder / "calibration.txt"),
                "samples": 8,
                "sequence_length": 16,
            },
            "quantize": {"method": "awq+gptq", "group_size": 32, **quantize},
        }
    )


def test_a_job_holds_one_block_and_one_second_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block at work, one at the most read ahead, and one second moment."""
    recipe = make_job(tmp_path)
    blocks: list[list[weakref.ref[Tensor]]] = []
    moments: list[list[weakref.ref[Tensor]]] = []
    read_block, empty_moment = block_loop._read_block, stats.empty_moment

    def check(gone: list[list[weakref.ref[Tensor]]]) -> None:
        held = [tensor.shape for refs in gone for ref in refs if (tensor := ref()) is not None]
        assert not held

    def watch_blocks(checkpoint: Checkpoint, block: BlockPlan) -> Mapping[str, Tensor]:
        # The last one read is being worked on, or about to be; all before it are gone.
        check(blocks[:-1])
        tensors = read_block(checkpoint, block)
        blocks.append([weakref.ref(tensor) for tensor in tensors.values()])
        return tensors

    def watch_moments(features: int, device: torch.device, *, sampled: bool) -> stats.Moment:
        check(moments)
        # Reading ahead is by one block: what is at work is one of the last two.
        check(blocks[:-2])
        moment = empty_moment(features, device, sampled=sampled)
        moments.append([weakref.ref(moment.total)])
        return moment

    monkeypatch.setattr(block_loop, "_read_block", watch_blocks)
    monkeypatch.setattr(walk, "empty_moment", watch_moments)
    quantkit.quantize(recipe, gate=False, device="cpu")

    assert (len(blocks), len(moments)) == (3, 12)
    check(blocks)
    check(moments)


def test_an_artifact_does_not_depend_on_where_activations_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing of them in RAM, its weights are the same bytes."""
    recipe = make_job(tmp_path)
    monkeypatch.setattr(walk, "windows_at_once", lambda *_, **__: 3)
    quantkit.quantize(recipe, gate=False, device="cpu")
    expected = (tmp_path / "out/compressed-tensors/model.safetensors").read_bytes()
    rooms = []

    def choose(*given: Any) -> Room:
        rooms.append(choose_room(*given))
        return rooms[-1]

    def leave_nothing(*given: Any) -> Prediction:
        return replace(predict(*given), room_bytes=0)

    monkeypatch.setattr(block_loop, "choose_room", choose)
    monkeypatch.setattr(job, "predict", leave_nothing)
    quantkit.quantize(recipe, gate=False, device="cpu", overwrite=True)

    assert [room.host_bytes for room in rooms] == [0]
    assert (tmp_path / "out/compressed-tensors/model.safetensors").read_bytes() == expected


def test_an_interrupted_walk_leaves_torch_as_it_was_and_goes_on(tmp_path: Path) -> None:
    """In a notebook the interpreter lives on, and so does the traceback that holds the walk."""
    recipe = make_job(tmp_path)

    def stop(event: Event) -> None:
        if event.stage == "quantize":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        quantkit.quantize(recipe, gate=False, device="cpu", progress=stop)
    assert kept.traceback
    assert not torch.is_inference_mode_enabled()

    events: list[Event] = []
    quantkit.quantize(recipe, gate=False, device="cpu", progress=events.append)
    steps = [(event.done, event.total) for event in events if event.stage == "quantize"]
    assert steps == [(1, 3), (1, 3), (2, 3), (3, 3)]


def test_blocks_without_anything_to_quantize_do_not_count(tmp_path: Path) -> None:
    """The last step is the last of all steps."""
    recipe = make_job(tmp_path, ignore=["lm_head", "model.layers.2.*"])
    events: list[Event] = []

    result = quantkit.quantize(recipe, gate=False, device="cpu", progress=events.append)

    steps = [(event.done, event.total) for event in events if event.stage == "quantize"]
    assert steps == [(1, 2), (2, 2)]
    assert len(result.report.layers) == 14


def test_memory_that_torch_does_not_get_is_a_lack_of_resources(tmp_path: Path) -> None:
    """Its allocator for the CPU raises a plain RuntimeError."""
    recipe = make_job(tmp_path)

    def run_out(event: Event) -> None:
        if event.stage == "quantize":
            torch.empty(1 << 50)

    with pytest.raises(ResourceError, match="not enough memory"):
        quantkit.quantize(recipe, gate=False, device="cpu", progress=run_out)


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Two jobs with one output: the second finds the first one's."""
    recipe = make_job(tmp_path)

    def finish_first(event: Event) -> None:
        if event.stage == "prepare" and event.done:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "quantkit.json").write_text("{}")

    with pytest.raises(OutputError, match="exists"):
        quantkit.quantize(recipe, gate=False, device="cpu", progress=finish_first)

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["quantkit.json"]
    assert not (tmp_path / "out.partial").exists()


def test_a_recipe_made_in_python_is_refused_what_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one from a file is: nothing that it asks for is ignored."""
    recipe = make_job(tmp_path)
    monkeypatch.setattr("quantkit.recipe.refusals.FORMATS", {"compressed-tensors": False})

    with pytest.raises(NotYetError, match="not yet built"):
        quantkit.quantize(recipe, gate=False, device="cpu")
