"""`quantkit bisect` through the real parser: what it prints, and what it returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bisection.artifacts import DOWN, copy_changed, randomize, round_plainly
from tests.cli.running import run_here
from tests.helpers import make_pico_model, pico_text

QUICK = (
    *("--set", "gate.samples=16", "--set", "gate.sequence_length=32", "--windows", "8"),
    *("--set", "gate.max_perplexity_increase=null", "--set", "gate.min_top1_agreement=null"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and an artifact with a broken layer."""
    place = tmp_path_factory.mktemp("bisect")
    model = make_pico_model(place / "model", layers=2)
    (place / "text.txt").write_text(pico_text(900, seed=5))
    sound = round_plainly(model, place / "out", {"scheme": "w4a16", "group_size": 32})
    copy_changed(sound, place / "broken", randomize)
    return place


def test_a_broken_layer_is_named(folder: Path) -> None:
    """For people and for programs."""
    words = ("broken", "--baseline", "model", "--data", "text.txt", "--set", "gate.max_kl=0.1")
    done = run_here("bisect", *words, *QUICK, folder=folder)
    assert done.returncode == 0, done.stderr
    assert f"{DOWN} (broken)" in done.stdout
    assert "defect  layer model.layers.1.mlp.down_proj" in done.stdout
    document = json.loads(run_here("bisect", *words, *QUICK, "--json", folder=folder).stdout)
    assert (document["exit_code"], document["guilty"]) == (0, [DOWN])
    assert document["proposal"]["judgement"]["verdict"] == "PASS"


def test_no_answer_has_an_exit_code(folder: Path) -> None:
    """4, as what is not decided."""
    words = ("broken", "--baseline", "model", "--data", "text.txt", "--set", "gate.max_kl=1e-12")
    assert run_here("bisect", *words, *QUICK, "--quiet", folder=folder).returncode == 4


def test_what_is_missing_is_one_line(folder: Path) -> None:
    """Before any work."""
    for words in (
        ("nothing", "--baseline", "model", "--data", "text.txt"),
        ("broken", "--baseline", "nowhere", "--data", "text.txt"),
        ("broken", "--baseline", "model", "--data", "no.txt"),
        ("broken", "--baseline", "model"),
    ):
        done = run_here("bisect", *words, folder=folder)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1
