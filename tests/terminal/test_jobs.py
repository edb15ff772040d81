"""Whole jobs on a terminal of 60 columns: what is seen, and Ctrl-C in each of the long commands."""

from __future__ import annotations

import shlex
import time

import pytest

from tests.cli.conftest import Bench, make_bench
from tests.helpers import make_pico_model
from tests.terminal.screen import Shown, Typist

pytestmark = pytest.mark.soak

LONG = 15.0
"""Seconds to end in: two, and room for a machine that does much else."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A folder with a model of four blocks, texts and a recipe."""
    folder = tmp_path_factory.mktemp("jobs")
    return make_bench(folder, make_pico_model(folder / "made", layers=4))


@pytest.fixture(scope="module")
def finished(bench: Bench, heavy_typist: Typist) -> Shown:
    """A job that has run to its end, in the folder `out`."""
    return show(heavy_typist, bench, "quantize", "--recipe", "recipe.yaml")


def show(typist: Typist, bench: Bench, *arguments: str, width: int = 60) -> Shown:
    """Run a command to its end."""
    with typist.open(arguments=list(arguments), folder=bench.folder, width=width) as session:
        return session.end()


def test_the_last_lines_of_a_job_can_be_copied(finished: Shown, bench: Bench) -> None:
    """The report and the command that serves are in lines without an end within."""
    assert finished.code == 0
    assert finished.is_harmless
    assert "…" not in finished.text
    *_, report, serve = finished.text.rstrip("\n").split("\n")
    assert (bench.folder / report.removeprefix("report   ")).is_file()
    *command, folder = shlex.split(serve.removeprefix("serve    "))
    assert command == ["vllm", "serve"]
    assert (bench.folder / folder).is_dir()


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--recipe", "recipe.yaml", "--output", "other"],
        ["inspect", "out"],
        ["verify", "out", "--against", "model"],
        ["serve", "out", "--with", "vllm", "--gpu", "H100"],
        ["publish", "out", "--repo", "a/b", "--dry-run"],
        ["estimate", "7B"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_other_commands_show_is_whole(
    finished: Shown, bench: Bench, heavy_typist: Typist, arguments: list[str]
) -> None:
    """Nothing is cut, and sentences end between words."""
    shown = show(heavy_typist, bench, *arguments)

    assert shown.code == 0, shown.text
    assert shown.is_harmless
    assert "…" not in shown.text
    lines = [line.rpartition("\r")[2] for line in shown.text.split("\n")]
    # What is longer is one word, or options of a command that can be copied.
    long = [line.strip() for line in lines if len(line) > 60]
    assert [line for line in long if " " in line and not line.startswith("-")] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize", "--recipe", "recipe.yaml", "--output", "NEW"], "quantize /4"),
        (["calibrate", "--recipe", "recipe.yaml", "--output", "NEW"], "prepare 0/1"),
        (["gate", "out", "--baseline", "model", "--output", "NEW"], "gate"),
        (["compare", "model", "out", "--recipe", "recipe.yaml", "--output", "NEW"], "gate"),
        (["bisect", "out", "--baseline", "model", "--recipe", "recipe.yaml",
          "--set", "gate.max_kl=0.0001", "--output", "NEW"], "blocks"),
        (["convert", "model", "--to", "gguf:Q4_0", "--output", "NEW"], "write"),
        (["sweep", "recipe.yaml", "--output-root", "NEW"], "sweep 0/1"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_ctrl_c_ends_a_command_soon(
    finished: Shown, bench: Bench, heavy_typist: Typist, arguments: list[str], words: str
) -> None:
    """With exit code 130, the command that goes on, a tidy terminal and no output."""
    output = f"new-{arguments[0]}"
    arguments = [each.replace("NEW", output) for each in arguments]
    with heavy_typist.open(arguments=arguments, folder=bench.folder, width=60) as session:
        stage, _, step = words.partition(" ")
        session.wait(
            lambda: any(stage in row and step in row for row in session.sent.split("\r")), words
        )
        session.press("c")
        begun = time.monotonic()
        shown = session.end()
        took = time.monotonic() - begun

    assert shown.code == 130, shown.text
    assert took < LONG
    assert "Traceback" not in shown.sent
    last = shown.text.rstrip("\n").rpartition("\n")[2].rpartition("\r")[2]
    assert last.startswith("error: interrupted; ")
    assert last.endswith(shlex.join(["quantkit", *arguments]))
    assert shown.sent.rfind("\x1b[?25h") >= shown.sent.rfind("\x1b[?25l")
    left = [path for path in bench.folder.rglob("new*") if path.name == "NEW"]
    assert [path for path in left if arguments[0] != "sweep"] == []
