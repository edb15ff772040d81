"""What the command line says about schemes that are to be chosen, and about those that were."""

from __future__ import annotations

import json

from tests.cli.conftest import Bench
from tests.cli.running import run_here

AUTO = ("--set", "quantize.scheme=auto", "--set", "quantize.method=rtn")


def test_plan_shows_what_there_is_to_choose(bench: Bench) -> None:
    """Candidates, units, range, and on what they will be measured."""
    done = run_here(
        "plan", "--recipe", bench.recipe, *AUTO, "--set", "quantize.target_bits=9",
        folder=bench.folder,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "28 x one of w4a16, w8a16, none, chosen on calibration data" in done.stdout
    assert "the least divergence within 9 bits per weight; 16 units of layers" in done.stdout
    assert "4 windows of 32 tokens, in 1 pass over the weights" in done.stdout
    assert "at most 9.00" in done.stdout


def test_plan_in_json_has_the_units_and_bytes(bench: Bench) -> None:
    """Layers that are still open have the scheme `auto`, others their own."""
    overrides = "quantize.overrides=[{match: '*.0.mlp.*', scheme: w8a16}]"
    done = run_here(
        "plan", "--recipe", bench.recipe, *AUTO, "--set", "quantize.max_kl=0.01",
        "--set", overrides, "--json",
        folder=bench.folder,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    choice = document["choice"]
    assert choice["max_kl"] == 0.01
    assert len(choice["units"]) == 14
    assert choice["units"][0]["layers"][0] == "model.layers.0.self_attn.q_proj"
    assert list(choice["units"][0]["candidates"]) == ["w4a16", "w8a16", "none"]
    schemes = {linear["name"]: linear["scheme"] for linear in document["linears"]}
    assert schemes["model.layers.0.mlp.down_proj"] == "w8a16"
    assert schemes["model.layers.1.mlp.down_proj"] == "auto"


def test_a_target_out_of_reach_is_one_clear_line(bench: Bench) -> None:
    """With the range, before any work."""
    done = run_here(
        "quantize", "--recipe", bench.recipe, *AUTO, "--set", "quantize.target_bits=3",
        folder=bench.folder,
    )  # fmt: skip

    assert done.returncode == 2
    assert "target_bits 3 cannot be reached: with these candidates" in done.stderr
    assert not bench.output.exists()


def test_quantize_ends_with_what_was_chosen(bench: Bench) -> None:
    """Counts, and the prediction beside the gate's measurement."""
    done = run_here(
        "quantize", "--recipe", bench.recipe, *AUTO, "--set", "quantize.target_bits=9",
        folder=bench.folder,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("schemes ")]
    assert "x w8a16" in line
    assert "predicted KL 0.0" in line
    assert ", measured 0.0" in line
    assert "allocate 4/4" in done.stderr


TYPES = (
    "--set", "export=[{format: gguf, type: auto, target_bits: 8, candidates: [Q4_0, Q8_0]}]",
    "--set", "quantize={method: rtn}",
)  # fmt: skip


def test_plan_shows_which_types_there_are_to_choose_from(bench: Bench) -> None:
    """Of a file's tensors it counts those whose type is known."""
    done = run_here("plan", "--recipe", bench.recipe, *TYPES, folder=bench.folder)

    assert done.returncode == 0, done.stderr
    assert "28 x one of Q4_0, Q8_0, chosen on calibration data" in done.stdout
    assert "the least divergence within 8 bits per weight; 28 units of layers" in done.stdout
    assert "8.00 bits per weight: 9 x F32, 1 x Q8_0, 28 to be chosen" in done.stdout

    done = run_here("plan", "--recipe", bench.recipe, *TYPES, "--json", folder=bench.folder)
    document = json.loads(done.stdout)
    assert document["gguf"][0]["types"] == {"F32": 9, "Q8_0": 1}
    assert {linear["scheme"] for linear in document["linears"]} == {"auto"}
    assert list(document["choice"]["units"][0]["candidates"]) == ["Q4_0", "Q8_0"]
