"""Whole jobs whose codes a solver of the caller's own chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit import LayerStats, Result, SolvedWeight, Solver, WeightForm
from quantkit.errors import InputError, PlanError, RecipeError
from quantkit.numerics.affine import choose_absmax, quantize
from quantkit.schemes import SCHEMES
from tests.helpers import make_pico_model, pico_text


def my_rtn(weight: Tensor, statistics: LayerStats | None, form: WeightForm) -> SolvedWeight:
    """Plain rounding, as quantkit's own."""
    scheme = SCHEMES[form.scheme]
    scale, zero_point = choose_absmax(weight, scheme, form.group_size, form.scale_dtype)
    return SolvedWeight(quantize(weight, scale, zero_point, scheme), scale, zero_point)


def other_rtn(weight: Tensor, statistics: LayerStats | None, form: WeightForm) -> SolvedWeight:
    """The same by another name."""
    return my_rtn(weight, statistics, form)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its calibration text and a recipe that names `my_rtn`."""
    folder = tmp_path_factory.mktemp("custom")
    make_pico_model(folder / "model", hidden=32, intermediate=64)
    (folder / "calibration.txt").write_text(pico_text(900, seed=1))
    (folder / "recipe.yaml").write_text(
        f"version: 1\nmodel: {folder / 'model'}\n"
        f"calibration: {{data: {folder / 'calibration.txt'}, samples: 16, sequence_length: 32}}\n"
        "quantize: {group_size: 32, method: my_rtn}\n"
    )
    return folder


def run(folder: Path, output: Path, *changes: str, **options: Any) -> Result:
    return quantkit.quantize(
        folder / "recipe.yaml", output=output, overrides=changes, gate=False, **options
    )


@pytest.mark.parametrize(
    ("own", "built_in", "scheme"),
    [("my_rtn", "rtn", "w4a16_asym"), ("smoothquant+my_rtn", "smoothquant", "w8a8")],
)
def test_the_same_arithmetic_gives_the_same_bytes(
    own: str, built_in: str, scheme: str, folder: Path, tmp_path: Path
) -> None:
    """Alone and behind a transform; the evidence says whose solver it was."""
    common = f"quantize.scheme={scheme}"
    solvers = {"my_rtn": my_rtn}
    mine = run(folder, tmp_path / "mine", common, f"quantize.method={own}", solvers=solvers)
    theirs = run(folder, tmp_path / "theirs", common, f"quantize.method={built_in}")

    assert mine.artifacts[0].files == theirs.artifacts[0].files
    evidence = json.loads((tmp_path / "mine" / "quantkit.json").read_text())
    found = evidence["solvers"]["my_rtn"]
    assert found["name"] == f"{__name__}.my_rtn"
    assert len(found["sha256"]) == 64
    assert {layer.method for layer in mine.report.layers} == {own}
    assert f"w4a16_asym g32 {own}" in mine.report.artifacts[0].scheme or scheme == "w8a8"
    card = (mine.artifacts[0].folder / "README.md").read_text()
    assert f"`my_rtn` (`{__name__}.my_rtn`, sha256 of its source `{found['sha256']}`)" in card
    assert "solvers" not in json.loads((tmp_path / "theirs" / "quantkit.json").read_text())


def test_a_solver_sees_the_statistics_that_it_asks_for(folder: Path, tmp_path: Path) -> None:
    """By an attribute of the function, or by a record; for some layers only, where that is so."""
    seen: dict[str, int] = {}

    def looks(weight: Tensor, statistics: LayerStats | None, form: WeightForm) -> SolvedWeight:
        assert statistics is not None
        assert statistics.second_moment.shape == (weight.shape[1], weight.shape[1])
        seen[form.layer] = statistics.tokens
        return my_rtn(weight, None, form)

    looks.needs_statistics = True  # type: ignore[attr-defined]
    change = "quantize.overrides=[{match: '*.down_proj', method: looks}]"
    result = run(
        folder,
        tmp_path / "out",
        change,
        "quantize.method=rtn",
        solvers={"looks": looks},
    )
    assert seen == {f"model.layers.{index}.mlp.down_proj": 512 for index in range(2)}
    assert {layer.method for layer in result.report.layers} == {"rtn", "looks"}

    plan = quantkit.plan(
        folder / "recipe.yaml",
        output=tmp_path / "planned",
        overrides=[f"gate.data={folder / 'calibration.txt'}"],
        solvers={"my_rtn": Solver(my_rtn, needs_statistics=True)},
    )
    assert all(linear.needs_statistics for linear in plan.linears)  # type: ignore[union-attr]
    assert any("my_rtn is a solver of your own" in note for note in plan.notes)


def test_a_job_is_not_gone_on_with_by_another_solver(folder: Path, tmp_path: Path) -> None:
    """Its blocks would be of two makes; with the same solver it goes on."""
    calls: list[str] = []

    def stops(weight: Tensor, statistics: LayerStats | None, form: WeightForm) -> SolvedWeight:
        calls.append(form.layer)
        if len(calls) == 8:
            raise RuntimeError("stopped")
        return my_rtn(weight, statistics, form)

    with pytest.raises(
        InputError, match=r"solver 'my_rtn' at .*layers\.1\.self_attn\.q_proj failed"
    ):
        run(folder, tmp_path / "out", solvers={"my_rtn": stops})
    with pytest.raises(InputError, match=r"plan \(solvers my_rtn .*sha256"):
        run(folder, tmp_path / "out", solvers={"my_rtn": other_rtn})
    run(folder, tmp_path / "out", solvers={"my_rtn": stops})

    assert len(calls) == 8 + 7


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (["quantize.scheme=fp8_dynamic"], PlanError, "my_rtn chooses integer codes, and those of"),
        (["export=[{format: gguf, type: Q4_K_M}]"], RecipeError, "gguf files have types of their"),
        (["quantize.method=my_rt"], RecipeError, "'my_rt' is unknown; did you mean 'my_rtn'"),
        (["quantize.method=rtn"], InputError, "'my_rtn' is given, and the recipe does not name it"),
    ],
)
def test_what_a_solver_cannot_do_is_refused_before_the_work(
    changes: list[str], kind: type[Exception], message: str, folder: Path, tmp_path: Path
) -> None:
    """With the remedy."""
    with pytest.raises(kind, match=message):
        run(folder, tmp_path / "out", *changes, solvers={"my_rtn": my_rtn})
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_names_a_solver_needs_it(folder: Path, tmp_path: Path) -> None:
    """From the command line there is none; the message says how it is given."""
    with pytest.raises(RecipeError, match=r"'my_rtn' is unknown.*quantkit\.quantize\(solvers="):
        run(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("solvers", "message"),
    [
        ({"rtn": my_rtn}, "'rtn' is the name of a method of quantkit"),
        ({"my+rtn": my_rtn}, "'my.rtn' is no name"),
        ({"my_rtn": lambda weight: weight}, r"cannot be called with 3 arguments"),
        ({"my_rtn": 3}, r"solvers\['my_rtn'\] is a int and no function"),
        ([my_rtn], "solvers is a list, not a mapping"),
    ],
)
def test_what_is_no_solver_is_refused(
    solvers: Any, message: str, folder: Path, tmp_path: Path
) -> None:
    """Before anything is read but the recipe."""
    with pytest.raises(InputError, match=message):
        run(folder, tmp_path / "out", solvers=solvers)


def test_a_recipe_in_python_may_name_a_solver(folder: Path, tmp_path: Path) -> None:
    """As `load_recipe` reads it."""
    recipe = quantkit.load_recipe(folder / "recipe.yaml", solvers={"my_rtn": my_rtn})
    assert torch.is_tensor(my_rtn(torch.ones(1, 32), None, _form()).codes)
    quantkit.quantize(recipe, output=tmp_path / "out", gate=False, solvers={"my_rtn": my_rtn})
    assert (tmp_path / "out" / "quantkit.json").is_file()


def _form() -> WeightForm:
    return WeightForm("layer", "w4a16", 4, True, 32, torch.bfloat16)
