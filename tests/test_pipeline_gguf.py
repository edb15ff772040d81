"""Jobs that write GGUF files: one pass over the data for every format, and the same bytes again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import quantkit
import quantkit.pipeline
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import ArtifactError, InputError, PlanError, RecipeError
from quantkit.formats.gguf.container import GgufFile, open_gguf, read_tensor_rows
from quantkit.job import plan_job
from quantkit.recipe import Recipe
from quantkit.records import Event, GgufPlan
from tests.helpers import make_pico_model
from tests.pico_jobs import count_walks, make_pico_job

EXPORTS = (
    {"format": "compressed-tensors"},
    {"format": "gguf", "type": "Q4_0"},
    {"format": "gguf", "type": "Q5_1"},
)

SUFFIXES = (".gguf", ".safetensors")
"""Of files that hold weights or statistics."""


def make_job(
    folder: Path, *exports: dict[str, object], output: str = "out", **quantize: object
) -> Recipe:
    """An ungated job on the model in `folder`, which is made if it is not there."""
    schemes = any(export["format"] != "gguf" for export in exports)
    settings = {"group_size": 32, **quantize} if schemes else quantize
    return make_pico_job(folder, exports, output=output, quantize=settings)


def run(recipe: Recipe) -> None:
    quantkit.quantize(recipe, gate=False, device="cpu")


def plan_files(recipe: Recipe) -> tuple[GgufPlan, ...]:
    """What the GGUF files of a job will hold."""
    checkpoint = open_checkpoint(resolve_source(str(recipe.model)))
    return plan_job(recipe, checkpoint, gate=False).gguf


def rows_of(file: GgufFile) -> dict[str, Tensor]:
    return {name: read_tensor_rows(file, name) for name in file.tensors}


def assert_same_tensors(first: Path, second: Path) -> None:
    """Types and bytes of every tensor agree."""
    one, two = open_gguf(first), open_gguf(second)
    assert {name: each.kind for name, each in one.tensors.items()} == {
        name: each.kind for name, each in two.tensors.items()
    }
    for name, rows in rows_of(one).items():
        assert torch.equal(rows, read_tensor_rows(two, name)), name


def test_one_walk_feeds_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calibration data goes through the model once; what vLLM reads is as it was without."""
    walks = count_walks(monkeypatch)
    run(make_job(tmp_path, *EXPORTS))
    assert len(walks) == 1

    run(make_job(tmp_path, EXPORTS[0], output="alone"))
    weights = "compressed-tensors/model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()
    for file_type in ("Q4_0", "Q5_1"):
        folder = tmp_path / "out" / "gguf" / file_type
        assert {path.name for path in folder.iterdir()} == {
            f"model-{file_type}.gguf",
            "Modelfile",
            "README.md",
            "imatrix.gguf",
        }
        file = open_gguf(folder / f"model-{file_type}.gguf")
        assert file.tensors["blk.1.ffn_up.weight"].kind.name == file_type


def test_the_fast_effort_is_what_a_conversion_makes_with_the_jobs_importance_matrix(
    tmp_path: Path,
) -> None:
    """llama.cpp's own algorithm, from the same statistics."""
    run(make_job(tmp_path, EXPORTS[1], effort="fast"))
    made = tmp_path / "out" / "gguf"

    quantkit.convert(
        tmp_path / "model",
        to="gguf:Q4_0",
        output=tmp_path / "converted",
        imatrix=made / "imatrix.gguf",
    )

    assert_same_tensors(made / "model-Q4_0.gguf", tmp_path / "converted" / "model-Q4_0.gguf")


def test_without_calibration_a_job_makes_what_a_conversion_makes(tmp_path: Path) -> None:
    """Plain rounding; there is no importance matrix to write."""
    run(make_job(tmp_path, EXPORTS[2], method="rtn", effort="fast"))
    quantkit.convert(tmp_path / "model", to="gguf:q5_1", output=tmp_path / "converted")

    made = tmp_path / "out" / "gguf"
    assert not (made / "imatrix.gguf").exists()
    assert_same_tensors(made / "model-Q5_1.gguf", tmp_path / "converted" / "model-Q5_1.gguf")


@pytest.mark.parametrize("effort", ["normal", "best"])
@pytest.mark.parametrize("exports", [EXPORTS[1:], EXPORTS], ids=["gguf leads", "gguf follows"])
def test_a_resumed_job_ends_in_the_same_bytes(
    tmp_path: Path, effort: str, exports: tuple[dict[str, object], ...]
) -> None:
    """Encoded layers that were stored take their place in the walk."""
    whole = make_job(tmp_path, *exports, effort=effort)
    run(whole)

    def stop(event: Event) -> None:
        if event.stage == "quantize" and event.done == 2:
            raise KeyboardInterrupt

    broken = make_job(tmp_path, *exports, output="resumed", effort=effort)
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(broken, gate=False, device="cpu", progress=stop)
    run(broken)

    files = (tmp_path / "out").rglob("*")
    made = [path.relative_to(tmp_path / "out") for path in files if path.suffix in SUFFIXES]
    assert len(made) == 4 + (exports == EXPORTS)
    for path in made:
        assert (tmp_path / "out" / path).read_bytes() == (tmp_path / "resumed" / path).read_bytes()


@pytest.mark.parametrize(("method", "down"), [("rtn", "Q4_0"), ("gptq", "Q4_1")])
def test_mixes_know_whether_errors_are_weighed(tmp_path: Path, method: str, down: str) -> None:
    """llama.cpp spends bits on the first layers of Q4_0 only with an importance matrix."""
    make_pico_model(tmp_path / "model", layers=8)
    (file,) = plan_files(make_job(tmp_path, EXPORTS[1], method=method))
    assert file.types["blk.0.ffn_down.weight"] == down


def test_a_mix_that_needs_calibration_is_refused_without(tmp_path: Path) -> None:
    """Before any work; a method that calibrates may make it."""
    make_pico_model(tmp_path / "model", hidden=256, intermediate=256, layers=1)
    export = {"format": "gguf", "type": "Q2_K_S"}
    with pytest.raises(InputError, match=r"Q2_K_S is of use only where .* other than rtn"):
        plan_files(make_job(tmp_path, export, method="rtn"))
    (file,) = plan_files(make_job(tmp_path, export))
    assert file.types["blk.0.ffn_up.weight"] == "Q2_K"


def test_an_output_with_gguf_files_alone_is_an_artifact(tmp_path: Path) -> None:
    """One file is found beside its importance matrix; of several, one has to be named."""
    run(make_job(tmp_path, EXPORTS[1]))
    out = tmp_path / "out"

    found = quantkit.inspect(out)
    assert (found.file, found.verdict) == (out / "gguf" / "model-Q4_0.gguf", "UNJUDGED")
    assert quantkit.verify(out).problems == ()

    run(make_job(tmp_path, *EXPORTS[1:], output="two"))
    two = tmp_path / "two"
    names = "gguf/Q5_1/model-Q5_1.gguf, gguf/Q4_0/model-Q4_0.gguf"
    for look in (quantkit.inspect, quantkit.verify):
        with pytest.raises(ArtifactError, match=f"holds 2 GGUF files: name one of {names}"):
            look(two)
    assert quantkit.inspect(two / "gguf" / "Q4_0").verdict == "UNJUDGED"
    file = two / "gguf" / "Q5_1" / "model-Q5_1.gguf"
    assert quantkit.verify(file).problems == ()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert any("sha256 differs" in problem for problem in quantkit.verify(file).problems)


def test_an_output_with_both_formats_is_the_folder_of_compressed_tensors(tmp_path: Path) -> None:
    """The GGUF file beside it is named by its own path."""
    run(make_job(tmp_path, *EXPORTS[:2]))
    out = tmp_path / "out"
    assert quantkit.inspect(out).folder == out / "compressed-tensors"
    assert quantkit.verify(out).problems == ()
    assert quantkit.inspect(out / "gguf").scheme == "Q4_0"


def test_tensors_get_the_types_that_overrides_give_them(tmp_path: Path) -> None:
    """The first match wins, on names of the checkpoint."""
    overrides = [
        {"match": "*.1.*.down_proj.weight", "type": "F16"},
        {"match": "*.down_proj.weight", "type": "q8_0"},
    ]
    run(make_job(tmp_path, {**EXPORTS[1], "overrides": overrides}))

    tensors = open_gguf(tmp_path / "out" / "gguf" / "model-Q4_0.gguf").tensors
    found = [tensors[f"blk.{block}.ffn_down.weight"].kind.name for block in range(3)]
    assert found == ["Q8_0", "F16", "Q8_0"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ({"match": "*.down_prj.weight", "type": "Q8_0"}, "'*.down_prj.weight' matches no tensor"),
        ({"match": "*norm.weight", "type": "Q8_0"}, "which llama.cpp wants in F32"),
        ({"match": "*.q_proj.weight", "type": "Q4_K"}, "has 64 columns, which are not whole"),
    ],
)
def test_overrides_that_do_not_fit_are_refused_before_any_work(
    tmp_path: Path, override: dict[str, str], says: str
) -> None:
    """One line says which tensor and why."""
    with pytest.raises(RecipeError, match=re.escape(says)):
        run(make_job(tmp_path, {**EXPORTS[1], "overrides": [override]}))
    assert not (tmp_path / "out").exists()


def test_a_gguf_job_without_data_is_a_problem_of_the_plan(tmp_path: Path) -> None:
    """As for every method that looks at data."""
    recipe = make_job(tmp_path, EXPORTS[1]).model_copy(update={"calibration": None})
    with pytest.raises(PlanError, match="method gptq needs calibration data"):
        quantkit.plan(recipe)


def test_a_plan_says_what_a_file_will_take(tmp_path: Path) -> None:
    """The bytes of the tensors, and types that do not fit the columns."""
    recipe = make_job(tmp_path, {"format": "gguf", "type": "Q4_K_M"})

    planned = quantkit.quantize(recipe, gate=False, device="cpu").plan

    (file,) = planned.gguf
    tensors = open_gguf(tmp_path / "out" / "gguf" / "model-Q4_K_M.gguf").tensors
    assert sum(each.size for each in tensors.values()) == file.tensor_bytes
    assert {name: each.kind.name for name, each in tensors.items()} == dict(file.types)
    assert any("Q5_0" in note for note in planned.notes)
