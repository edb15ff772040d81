"""Two jobs at once: on one output, on one artifact, on one store of the baseline's answers."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import quantkit
from quantkit.candidates import open_candidate, unchanged
from quantkit.errors import ArtifactError, OutputError, WorkerError
from quantkit.locking import locked
from quantkit.records import Event
from quantkit.staging import partial_of
from tests.cli.running import run_here
from tests.helpers import make_pico_model
from tests.pico_jobs import make_pico_job

SCHEME = {"scheme": "w8a16", "group_size": 32, "method": "rtn"}
SECONDS = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_model(tmp_path_factory.mktemp("pico") / "model", layers=3)


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    (tmp_path / "model").symlink_to(model, target_is_directory=True)
    return tmp_path


def quantize(folder: Path, output: Path) -> None:
    quantkit.quantize(make_pico_job(folder, quantize=SCHEME), output=output, device="cpu")


def calibrate(folder: Path, output: Path) -> None:
    quantkit.calibrate(make_pico_job(folder, quantize=SCHEME), output=output, device="cpu")


def convert(folder: Path, output: Path) -> None:
    quantkit.convert(folder / "model", to="gguf:Q8_0", output=output)


def gate(folder: Path, output: Path) -> None:
    quantkit.gate(folder / "model", baseline=folder / "model", output=output)


def compare(folder: Path, output: Path) -> None:
    quantkit.compare(folder / "model", [folder / "model"], output=output)


def bisect(folder: Path, output: Path) -> None:
    quantkit.bisect(folder / "model", baseline=folder / "model", output=output)


@pytest.mark.parametrize("verb", [quantize, calibrate, convert, gate, compare, bisect])
def test_no_command_touches_an_output_that_another_job_works_on(
    folder: Path, verb: Callable[[Path, Path], None]
) -> None:
    """The error has one line, and names who it is."""
    output = folder / "out"
    with locked(partial_of(output)):
        with pytest.raises(OutputError, match=r"another job works on .*out\.partial \(") as caught:
            verb(folder, output)
        assert f"(process {os.getpid()} on " in str(caught.value)
        assert "\n" not in str(caught.value)
        assert [path.name for path in partial_of(output).iterdir()] == ["lock"]
    assert not output.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["quantize", "model", "--recipe", "rtn4", "--output", "out"],
        ["convert", "model", "--to", "gguf:Q8_0", "--output", "out"],
        ["gate", "model", "--baseline", "model", "--output", "out"],
    ],
    ids=lambda words: words[0],
)
def test_the_command_line_answers_before_it_loads_anything(folder: Path, words: list[str]) -> None:
    """As it does with an output that exists."""
    with locked(partial_of(folder / "out")):
        done = run_here(*words, folder=folder)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: another job works on out.partial (process {os.getpid()} on ")
    assert line.endswith("wait for it or stop it")


def test_a_job_keeps_others_out_from_its_first_look_at_the_model(folder: Path) -> None:
    """And not from the first block alone: the weights are hashed before that, for minutes."""
    output, prepared, go = folder / "out", threading.Event(), threading.Event()
    results = []

    def wait(event: Event) -> None:
        if event.stage == "prepare" and event.done == 1:
            prepared.set()
            go.wait(SECONDS)

    recipe = make_pico_job(folder, quantize=SCHEME)

    def work() -> None:
        try:
            results.append(quantkit.quantize(recipe, device="cpu", gate=False, progress=wait))
        finally:
            prepared.set()

    job = threading.Thread(target=work)
    job.start()
    assert prepared.wait(SECONDS)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="another job works on"):
            quantkit.quantize(recipe, device="cpu", gate=False, overwrite=overwrite)
    go.set()
    job.join(SECONDS)
    assert [result.output for result in results] == [output]
    assert sorted(path.name for path in output.iterdir()) == [
        "compressed-tensors",
        "quantkit.json",
        "report",
    ]
    assert not partial_of(output).exists()


def test_a_verdict_is_not_given_on_files_that_were_replaced(tmp_path: Path) -> None:
    """Also where a worker failed for that: it may have read half of each."""
    artifact = tmp_path / "artifact"
    make_pico_model(artifact, layers=1)
    new = shutil.copytree(artifact, tmp_path / "new")
    candidate = open_candidate(artifact, "artifact")
    with unchanged([candidate]):
        (artifact / "notes.md").write_text("of the user")
    with pytest.raises(WorkerError, match="died"), unchanged([candidate]):
        raise WorkerError("died")

    def replace() -> None:
        artifact.rename(tmp_path / "old")
        new.rename(artifact)
        os.utime(artifact / "model.safetensors")

    words = r"model\.safetensors was replaced or changed while it was judged: judge it again"
    with pytest.raises(ArtifactError, match=words), unchanged([candidate]):
        replace()
    with pytest.raises(ArtifactError, match=words), unchanged([candidate]):
        raise WorkerError("died")
