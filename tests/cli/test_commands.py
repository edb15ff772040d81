"""The smaller commands, through the real program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantkit.cli.init import render_recipe
from quantkit.cli.main import _interrupted
from quantkit.recipe import PublishSpec, Recipe, json_schema, load_recipe, shipped_recipes
from quantkit.records import Artifact, Result
from tests.cli.conftest import Bench
from tests.cli.running import run, run_here


def test_recipes_list_names_every_shipped_recipe() -> None:
    """With what it is for."""
    names = [path.stem for path in shipped_recipes()]
    document = json.loads(run("recipes", "list", "--json").stdout)
    assert [row["name"] for row in document] == names
    assert all(row["summary"] and row["recipe"]["version"] == 1 for row in document)
    shown = run("recipes", "list").stdout
    assert all(name in shown for name in names)


def test_recipes_show_prints_the_file_as_it_is() -> None:
    """So that its output is a recipe again."""
    path = shipped_recipes()[0]
    assert run("recipes", "show", path.stem).stdout == path.read_text()
    assert (
        json.loads(run("recipes", "show", path.stem, "--json").stdout)["text"] == path.read_text()
    )


def test_recipes_check_tells_every_problem_of_every_recipe(tmp_path: Path) -> None:
    """Right ones are named, wrong ones explained."""
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("version: 1\nmodle: x\nquantize: {methd: rtn}\n")
    done = run("recipes", "check", "awq4", "--set", "quantize.group_size=64")
    assert (done.returncode, done.stdout) == (0, "awq4: ok\n")
    done = run("recipes", "check", "awq4", wrong)
    assert done.returncode == 2
    assert f"{wrong}:2: modle: unknown key" in done.stderr
    assert f"{wrong}:3: quantize.methd: unknown key" in done.stderr


def test_recipes_schema_is_json_either_way() -> None:
    """An editor reads it from a file."""
    for arguments in ([], ["--json"]):
        assert json.loads(run("recipes", "schema", *arguments).stdout) == json_schema()


def test_init_writes_a_recipe_that_loads_and_has_every_default(tmp_path: Path) -> None:
    """What its comments call a default is the default."""
    path = tmp_path / "recipe.yaml"
    done = run("init", "my/model", "--output", path)
    assert done.returncode == 0
    recipe = load_recipe(path)
    assert recipe.model == "my/model"
    assert recipe.calibration is not None
    assert recipe.gate is not None
    data = {"calibration": {"data": "calibration.txt"}, "gate": {"data": "evaluation.txt"}}
    assert recipe.quantize == Recipe(version=1).quantize
    assert recipe.export == Recipe(version=1).export
    assert recipe.calibration == Recipe(version=1, **data).calibration
    assert recipe.gate == Recipe(version=1, **data).gate


def test_init_names_every_key_that_works() -> None:
    """And none that does not yet."""
    tree = yaml.safe_load(render_recipe())
    keys = {
        f"{group}.{key}"
        for group, spec in (("calibration", 0), ("quantize", 0), ("export", 0), ("gate", 0))
        for key in (tree[group][0] if group == "export" else tree[group])
    }
    assert {"quantize.overrides", "gate.max_kl", "calibration.assistant_only"} <= keys
    assert {"quantize.kv_cache", "quantize.effort", "quantize.target_bits", "export.type"} <= keys
    assert {"gate.tasks", "gate.probes"} <= keys
    assert "max_new_loops" in tree["gate"]["probes"]
    assert "publish" not in tree
    commented = render_recipe().partition("# publish:\n")[2].replace("#   ", "")
    assert PublishSpec.model_validate(yaml.safe_load(commented)) == PublishSpec(repo="OWNER/NAME")


def test_init_leaves_an_existing_file_alone(tmp_path: Path) -> None:
    """Until it is told to overwrite it."""
    path = tmp_path / "recipe.yaml"
    path.write_text("mine")
    done = run("init", "--output", path)
    assert done.returncode == 2
    assert path.read_text() == "mine"
    assert run("init", "--output", path, "--overwrite").returncode == 0
    assert load_recipe(path).version == 1


def test_plan_shows_what_a_job_would_do(bench: Bench) -> None:
    """Sizes, layers, memory, disk; and it writes nothing."""
    before = set(bench.folder.rglob("*"))
    done = run("plan", "--recipe", bench.recipe, "--json", folder=bench.folder)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["blocks"] == 4
    assert len(document["linears"]) == 28
    assert {row["scheme"] for row in document["linears"]} == {"w4a16"}
    assert 4 < document["bits_per_weight"] < 16
    assert document["artifact_bytes"] < document["baseline_bytes"]
    done = run_here("plan", bench.model, "--recipe", bench.recipe, folder=bench.folder)
    assert "28 x w4a16, group size 32, awq+gptq" in done.stdout
    assert set(bench.folder.rglob("*")) == before


def test_plan_sees_what_the_job_would_find_missing(bench: Bench) -> None:
    """An empty text, and a model without a tokenizer; neither is read for that."""
    words = bench.evaluation.read_text()
    bench.evaluation.write_text("")
    done = run_here("plan", "--recipe", bench.recipe, folder=bench.folder)
    assert (done.returncode, "evaluation.txt is empty" in done.stderr) == (2, True)
    bench.evaluation.write_text(words)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bench.model / name).unlink()
    done = run_here("plan", "--recipe", bench.recipe, folder=bench.folder)
    assert (done.returncode, "no tokenizer in " in done.stderr) == (2, True)


def test_inspect_shows_a_checkpoint_that_is_not_quantized(bench: Bench) -> None:
    """Anybody's folder can be looked into."""
    done = run("inspect", bench.model, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["scheme"] == "none"
    assert document["bits_per_weight"] == pytest.approx(16)
    assert "16-bit floating point" in run_here("inspect", bench.model).stdout


def test_inspect_of_nothing_is_one_line(tmp_path: Path) -> None:
    """Exit code 2."""
    done = run("inspect", tmp_path / "nothing")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            "quantise",
            "no such command 'quantise'; did you mean 'quantize'? (see `quantkit --help`)",
        ),
        (
            "recipes lst",
            "no such command 'lst'; did you mean 'list'? (see `quantkit recipes --help`",
        ),
        ("frobnicate", "no such command 'frobnicate' (see `quantkit --help`)"),
        ("plan m --recipe", "option '--recipe' requires an argument (see `quantkit plan --help`)"),
    ],
)
def test_a_wrong_command_line_names_what_was_meant(arguments: str, says: str) -> None:
    """Only what is near, and the help of the command that it was."""
    done = run_here(*arguments.split())
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {says}")


@pytest.mark.parametrize("command", ["inspect", "verify", "gate", "compare", "bisect"])
def test_an_artifact_that_is_not_there_is_looked_for_beside(command: str, tmp_path: Path) -> None:
    """Before anything is loaded; what only lies in the same folder is not named."""
    for name in ("mine/demo-awq4", "mine/other", "base"):
        (tmp_path / name).mkdir(parents=True)
    base = {"gate": ["--baseline", "base"], "bisect": ["--baseline", "base"], "compare": ["base"]}
    for name, near in (("demo-awq", "; did you mean 'mine/demo-awq4'?"), ("zzzz", "")):
        done = run_here(command, *base.get(command, ()), f"mine/{name}", folder=tmp_path)
        assert done.stderr == f"error: there is no artifact at mine/{name}{near}\n"
        assert done.returncode == 2


def test_init_lists_every_group_size_that_its_comment_explains() -> None:
    """16 too, which is for one format alone."""
    row = next(row for row in render_recipe().splitlines() if "group_size: " in row)
    assert row.endswith("16: for onnx alone: 16 | 32 | 64 | 128 | channel")


@pytest.mark.parametrize("command", ["quantize", "calibrate", "gate"])
def test_an_interrupted_command_says_in_one_line_how_it_goes_on(command: str) -> None:
    """The command to copy is at the end."""
    told = _interrupted(KeyboardInterrupt(), [command, "--recipe", "my recipe"])
    assert told.startswith("interrupted; ")
    assert told.endswith(f": quantkit {command} --recipe 'my recipe'")
    assert len(told) < 140


def test_a_result_is_shown_in_one_line() -> None:
    """Its plan has a line for each layer."""
    fields: dict[str, Any] = dict.fromkeys(("plan", "report"))
    artifact = Artifact("compressed-tensors", "compressed-tensors", Path("out"), {}, 1, 4.0)
    result = Result(Path("out"), "PASS", artifacts=(artifact,), **fields)
    assert repr(result) == (
        "Result(verdict='PASS', output='out', artifacts=['compressed-tensors'])"
    )
