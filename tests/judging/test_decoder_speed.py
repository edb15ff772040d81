"""How fast an ONNX decoder is beside its float graph: measured in the real runtime."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import ResourceError, WorkerError
from quantkit.gating import add_decoder_speed
from quantkit.judging import decoder_speed
from quantkit.judging.decoder_speed import measure_decoder_speed, time_decoders
from quantkit.recipe import GateSpec
from quantkit.records import Event, Judgement, Metric
from tests.helpers import make_pico_model
from tests.judging.onnx_files import write_table

JUDGED = Judgement("PASS", (), (), None, Metric(0.0, 0.0, 0.0), None, 0.95, 8)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph that computes nothing but a look-up."""
    folder = tmp_path_factory.mktemp("table")
    return write_table(folder / "model.onnx", np.zeros((50, 50), np.float32))


def test_the_float_graph_and_the_artifact_are_timed_in_one_run(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding first; a look-up is faster than a model, and nothing is left behind."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    folder = make_pico_model(tmp_path / "model", vocab=300, max_positions=64)
    checkpoint = open_checkpoint(resolve_source(str(folder)))
    seen: list[Event] = []

    decoding, prefill = measure_decoder_speed(
        checkpoint, table, threads=1, repetitions=2, timeout_seconds=60, progress=seen.append
    )

    assert (decoding.what, prefill.what) == (
        "decoding of 30 tokens after 32",
        "prefill of 1 x 32 tokens",
    )
    assert decoding.artifact > decoding.baseline > 0
    assert prefill.artifact > prefill.baseline > 0
    for row in (decoding, prefill):
        assert (row.unit, row.threads, row.repetitions) == ("tokens", 1, 2)
        assert row.runtime.startswith("onnxruntime 1.")
    assert [(event.stage, event.done, event.total) for event in seen] == [
        ("speed", number, 2) for number in range(3)
    ]
    assert list(tmp_path.glob("quantkit-*")) == []


def test_a_graph_is_as_fast_as_itself(table: Path) -> None:
    """The two workers do the same, so what is left is the machine's noise."""
    for row in time_decoders(table, table, threads=1, timeout_seconds=60):
        assert abs(math.log(row.artifact / row.baseline)) < math.log(5)


def test_speed_that_cannot_be_measured_is_a_note(table: Path, tmp_path: Path) -> None:
    """The verdict stays; what was not judged at all is not timed."""
    other = make_pico_model(tmp_path / "gpt", family="gpt_neox", tokenizer=False)
    checkpoint = open_checkpoint(resolve_source(str(other)))
    spec = GateSpec(data="test", timeout_seconds=60)

    def ignore(event: Event) -> None:
        del event

    got = add_decoder_speed(JUDGED, checkpoint, table, spec, ignore)
    unjudged = Judgement("FAIL", (), ("it died",), None, None, None, 0.95, 0)

    assert (got.verdict, got.speed) == ("PASS", ())
    assert got.notes[0].startswith("its speed was not measured: ")
    assert "\n" not in got.notes[0]
    assert add_decoder_speed(unjudged, checkpoint, table, spec, ignore) == unjudged


def test_too_little_room_is_told_before_anything_is_written(table: Path, tmp_path: Path) -> None:
    """The header of a checkpoint says how large its graph will be."""
    folder = make_pico_model(tmp_path / "model")
    checkpoint = open_checkpoint(resolve_source(str(folder)))
    huge = {
        name: type(info)(**{**vars(info), "size": 1 << 50})
        for name, info in checkpoint.tensors.items()
    }
    large = type(checkpoint)(**{**vars(checkpoint), "tensors": huge})

    with pytest.raises(ResourceError, match=r"the graph in float takes .* GB and .* free"):
        measure_decoder_speed(large, table)


def test_a_worker_that_fails_is_named(table: Path, tmp_path: Path) -> None:
    """As everywhere in the gate."""
    (tmp_path / "config.json").write_text(json.dumps({}))

    with pytest.raises(WorkerError, match="candidate's worker failed at 'load'"):
        time_decoders(table, tmp_path, threads=1, timeout_seconds=60)


def test_the_room_for_an_artifact_is_that_of_its_own_files(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets in its name are no pattern."""
    checkpoint = open_checkpoint(resolve_source(str(make_pico_model(tmp_path / "model"))))
    artifact = tmp_path / "table[1].onnx"
    artifact.write_bytes(table.read_bytes())
    artifact.with_name("table1.onnx").write_bytes(b"another one")

    def refuse(folder: Path, *, disk: int, memory: int) -> None:
        assert memory == 3 * disk + 2 * artifact.stat().st_size
        raise ResourceError(str(folder))

    monkeypatch.setattr(decoder_speed, "_check_room", refuse)
    with pytest.raises(ResourceError):
        measure_decoder_speed(checkpoint, artifact)
