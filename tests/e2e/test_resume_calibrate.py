"""A walk for statistics that is killed leaves nothing that could be taken for them, and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.calibration.stored import open_statistics
from quantkit.errors import CalibrationError
from tests.cli.running import environment, run_here
from tests.pico_jobs import make_pico_job

pytestmark = pytest.mark.resume

SCRIPT = """
import os, signal, sys
import quantkit
from quantkit import workspace
from quantkit.calibrating import taking

write, count = workspace._write, [0]

def die(*arguments):
    if count[0] == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    count[0] += 1
    write(*arguments)

workspace._write = die
if int(sys.argv[4]) < 0:
    import quantkit.calibrating
    quantkit.calibrating.write_words = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
quantkit.calibrate(sys.argv[1], model=sys.argv[2], output=sys.argv[3])
"""
"""Dies in front of the file with a number, of blocks and then of Fisher matrices; below zero in
front of the manifest."""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[str | Path, ...]:
    """A command but for its output: a recipe that needs Fisher matrices."""
    folder = tmp_path_factory.mktemp("calibrate")
    make_pico_job(folder, quantize={})
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "version: 1\n"
        f"calibration: {{data: {folder / 'calibration.txt'}, samples: 16, sequence_length: 32}}\n"
        "quantize: {group_size: 32, effort: best}\n"
    )
    return "calibrate", folder / "model", "--recipe", recipe


@pytest.fixture(scope="module")
def whole(command: tuple[str | Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The statistics of a walk in one go."""
    output = tmp_path_factory.mktemp("whole") / "statistics"
    assert run_here(*command, "--output", output).returncode == 0
    return output


@pytest.mark.parametrize("number", [0, 1, 2, 4, -1])
def test_a_killed_walk_goes_on_to_the_same_bytes(
    number: int, command: tuple[str | Path, ...], whole: Path, tmp_path: Path
) -> None:
    """kill -9 at the moments between the files."""
    output = tmp_path / "out"
    _, model, _, recipe = command
    words = [sys.executable, "-c", SCRIPT, *map(str, (recipe, model, output, number))]
    died = subprocess.run(words, env=environment(), capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not output.exists()
    with pytest.raises(CalibrationError, match="holds no statistics"):
        open_statistics(tmp_path / "out.partial")
    done = run_here(*command, "--output", output)
    assert done.returncode == 0, done.stderr
    if number > 0:
        assert f"resumed after {min(number, 3)} block" in done.stderr
    assert sorted(os.listdir(output)) == sorted(os.listdir(whole))
    for path in output.iterdir():
        assert path.read_bytes() == (whole / path.name).read_bytes(), path.name
    assert sorted(os.listdir(tmp_path)) == ["out"]
