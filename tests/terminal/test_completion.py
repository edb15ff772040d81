"""Completion: what is offered, and that real shells take it."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from quantkit.cli.completing import find_candidates, split_line
from quantkit.cli.completion import _SCRIPTS
from quantkit.cli.main import app
from quantkit.recipe import shipped_recipes
from quantkit.schemes import SCHEMES
from tests.cli.running import COMMAND, environment, run, run_here

PROGRAM = get_command(app)


def offer(line: str) -> list[str]:
    """The words that are offered at the end of a line."""
    return [word for word, _ in find_candidates(PROGRAM, split_line(line)).words]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("quantkit conv", ["convert"]),
        ("quantkit recipes ", ["list", "show", "check", "schema"]),
        ("quantkit recipes li", ["list"]),
        ("quantkit quantize --ou", ["--output"]),
        ("quantkit quantize MODEL --no", ["--no-gate"]),
        ("quantkit quantize --recipe awq4-", ["awq4-gguf"]),
        ("quantkit quantize --recipe=rtn", ["--recipe=rtn4"]),
        ("quantkit quantize -- --re", []),
        ("quantkit recipes check awq4 fp8-", ["fp8-kv"]),
        ("quantkit plan --device ", ["auto", "cpu", "cuda"]),
        ("quantkit quantize --set quantize.sch", ["quantize.scheme="]),
        ("quantkit quantize --set quantize.scheme=w8a8_", ["quantize.scheme=w8a8_static"]),
        ("quantkit quantize --set export.0.format=co", ["export.0.format=compressed-tensors"]),
        ("quantkit convert x --to gguf:Q4_K", ["gguf:Q4_K_M", "gguf:Q4_K_S"]),
        ("quantkit serve x --with onnx", ["onnxruntime"]),
        ("quantkit estimate x --gpu A1", ["A10G", "A100-40GB", "A100-80GB"]),
        ("quantkit estimate x --price H200", ["H200="]),
        ("quantkit serve x --gpu a", ["auto"]),
        ("quantkit runtimes install vl", ["vllm"]),
        ("quantkit completion ", ["bash", "zsh", "fish"]),
        ("quantkit nothing ", []),
        ("quantkit __comp", []),
        ("quantkit quantize 'a b", []),
    ],
)
def test_what_is_offered(line: str, expected: list[str]) -> None:
    """Commands, options, recipes, keys and values, formats, runtimes."""
    assert offer(line) == expected


def test_every_shipped_recipe_and_built_scheme_is_offered() -> None:
    """From the tables that the program itself has."""
    assert offer("quantkit plan --recipe ") == [path.stem for path in shipped_recipes()]
    built = [f"quantize.scheme={name}" for name, scheme in SCHEMES.items() if scheme.built]
    assert set(built) <= set(offer("quantkit plan --set quantize.scheme="))


def test_files_are_offered_where_they_fit() -> None:
    """Behind a recipe's option as well as its names; not behind a fixed choice."""
    for line, takes in (("plan --recipe ", True), ("inspect ", True), ("plan --device ", False)):
        assert find_candidates(PROGRAM, split_line(f"quantkit {line}")).takes_files is takes


def test_completing_loads_nothing_heavy() -> None:
    """It is done at every press of a key."""
    code = (
        "import sys; from quantkit.cli.main import main;"
        "main(['__complete', 'bash', 'quantkit serve x --with ', '']);"
        "print(sorted({'torch', 'numpy', 'transformers', 'rich.console'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_script_is_printed_and_written_nowhere(tmp_path: Path) -> None:
    """For each shell; another is refused with the nearest name."""
    for shell in _SCRIPTS:
        done = run_here("completion", shell)
        assert done.stdout == _SCRIPTS[shell]
        document = json.loads(run_here("completion", shell, "--json").stdout)
        assert document["script"] == done.stdout
    done = run("completion", "zhs", HOME=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.endswith("did you mean 'zsh'?\n")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH on which the program is found by its name."""
    program = tmp_path / "bin" / "quantkit"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n')
    program.chmod(0o755)
    return f"{program.parent}:{environment()['PATH']}"


BASH = """
set -u
source <(quantkit completion bash)
complete_line() {
    COMP_LINE=$1 COMP_POINT=${#1}
    # As readline breaks words: at spaces, and at the signs in COMP_WORDBREAKS.
    local word=${1##*[ =:]}
    _quantkit quantkit "$word" x
    printf '%s|' "${COMPREPLY[@]}"; echo
}
complete -p quantkit
complete_line 'quantkit convert --to gguf:Q6'
complete_line 'quantkit plan --set quantize.method=awq+'
complete_line 'quantkit plan --recipe awq'
complete_line 'quantkit gate --ba'
complete_line 'quantkit gate --json'
complete_line 'quantkit estimate x --gpu H'
complete_line 'quantkit gate --'
"""


def test_bash_completes(path: str, tmp_path: Path) -> None:
    """Words that bash breaks at colons and equals signs too; files beside recipes."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "awq-mine.yaml").touch()
    done = subprocess.run(
        ["bash", "--norc", "-c", BASH],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(PATH=path),
    )

    assert done.stderr == ""
    *lines, names = done.stdout.splitlines()
    assert lines == [
        "complete -F _quantkit quantkit",
        "Q6_K|",
        "awq+gptq|",
        "awq4-gguf|awq4|awq-mine.yaml|",
        "--baseline|",
        "--json|",
        "H100|H200|",
    ]
    assert {"--baseline", "--recipe", "--help"} <= set(names.split("|"))


@pytest.mark.parametrize(
    ("shell", "check"),
    [("bash", ["bash", "-n"]), ("zsh", ["zsh", "-n"]), ("fish", ["fish", "--no-execute"])],
)
def test_the_shell_can_read_its_script(shell: str, check: list[str], tmp_path: Path) -> None:
    """Where that shell is installed."""
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    script = tmp_path / "script"
    script.write_text(_SCRIPTS[shell])
    done = subprocess.run([*check, script], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


def test_fish_completes(path: str) -> None:
    """With what each word means."""
    if shutil.which("fish") is None:
        pytest.skip("there is no fish")
    line = "quantkit completion fish | source; complete --do-complete 'quantkit conv'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", line],
        capture_output=True,
        text=True,
        env=environment(PATH=path),
    )

    assert done.stdout.startswith("convert\tWrite a model in another format")
