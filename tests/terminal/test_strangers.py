"""What strangers wrote into files does not reach the terminal as a command."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from quantkit.cli import main as program
from quantkit.cli.console import Reply, print_error
from quantkit.errors import HubError, QuantkitError
from tests.terminal.screen import show_here

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e[red]r[/red][link=http://x]l[/link]\r"


def make_recipe(folder: Path) -> Path:
    """A recipe with such a key and such values."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "version: 1\nmodel: " + json.dumps(f"m{EVIL}") + "\n" + json.dumps(f"k{EVIL}") + ": 1\n"
    )
    return recipe


def make_checkpoint(folder: Path) -> Path:
    """A folder with such names in its config, its tensors and its own name."""
    made = folder / "m\x1b[2J\u202e[red]"
    made.mkdir()
    config = {
        "architectures": [f"Llama{EVIL}"],
        "model_type": f"llama{EVIL}",
        "quantization_config": {"quant_method": f"q{EVIL}", "format": EVIL},
    }
    (made / "config.json").write_text(json.dumps(config))
    header = json.dumps(
        {f"t{EVIL}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {}}
    ).encode()
    (made / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return made


def test_names_in_files_are_shown_and_do_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whether the command takes them or refuses them; on a terminal, where it would count."""
    recipe, checkpoint = make_recipe(tmp_path), make_checkpoint(tmp_path)
    quoting = 0
    for arguments in (
        ["recipes", "check", recipe],
        ["recipes", "show", recipe],
        ["recipes", "check", EVIL],
        ["inspect", checkpoint],
        ["inspect", checkpoint, "--json"],
        ["inspect", EVIL],
        ["estimate", checkpoint],
        ["init", EVIL, "--output", tmp_path / f"{EVIL.replace('/', '')}.yaml"],
        [EVIL],
        ["plan", f"--{EVIL}"],
        ["completion", EVIL],
    ):
        shown = show_here(monkeypatch, *arguments, width=60)
        assert shown.is_harmless, (arguments, shown.sent)
        assert "Traceback" not in shown.sent, (arguments, shown.text)
        quoting += "[red]" in shown.text.replace("\n", "")
    assert quoting > 5


def say_all() -> None:
    """What libraries do: print, log, and colour what they say."""
    print(f"printed {EVIL}")
    print(f"\x1b[33mtold {EVIL}\x1b[0m", file=sys.stderr)
    logger = logging.getLogger("a library")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    logger.warning("logged %s", EVIL)
    logger.removeHandler(handler)


@pytest.mark.parametrize("error", [HubError(EVIL), QuantkitError(EVIL), ValueError(EVIL)])
def test_what_libraries_and_the_hub_say_does_nothing(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Also in the traceback of a defect."""

    def run(arguments: Any) -> Reply:
        say_all()
        raise error

    monkeypatch.setattr(program, "_run", run)
    shown = show_here(monkeypatch, "quantize")

    for word in ("printed", "told", "logged"):
        assert f"{word} \\x1b]0;owned" in shown.text
    assert "\r" not in shown.text.replace("\\r", "").rpartition("logged")[2]
    assert "\x1b]" not in shown.sent
    assert "\x9b" not in shown.sent
    assert "\u202e" not in shown.sent
    assert "\x1b[2J" not in shown.sent
    assert "\x07" not in shown.sent


def test_json_on_a_terminal_is_escaped_and_says_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """JSON lets through what a terminal acts upon."""
    monkeypatch.setattr(program, "_run", lambda _: Reply({"name": EVIL}, []))
    shown = show_here(monkeypatch, "plan", "--json")

    assert shown.is_harmless
    assert json.loads(shown.text) == {"name": EVIL}


def test_an_error_is_the_same_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """Only the form for people is escaped."""
    print_error("a\x1b[2J", 2, as_json=True, stdout=sys.stdout)
    shown = capsys.readouterr()

    assert shown.err == "error: a\\x1b[2J\n"
    assert json.loads(shown.out)["error"] == "a\x1b[2J"
