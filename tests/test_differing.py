"""An unfinished job of something else is refused, and the user is told what is different."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import quantkit
from quantkit.differing import list_differences
from quantkit.errors import InputError
from quantkit.recipe import Recipe
from quantkit.records import Event
from tests.helpers import make_pico_model, pico_text
from tests.pico_jobs import make_pico_job


def stop(event: Event) -> None:
    """Interrupt a job when its first block is solved."""
    if event.stage == "quantize" and event.done == 1:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that was stopped."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(make_job(folder), gate=False, device="cpu", progress=stop)
    return folder


def make_job(folder: Path, **quantize: object) -> Recipe:
    return make_pico_job(folder, quantize={"group_size": 32, "method": "gptq", **quantize})


def change(recipe: Recipe, key: str, **values: object) -> Recipe:
    """The recipe with other values of a section."""
    tree = recipe.model_dump(exclude_unset=True)
    tree[key] = {**tree[key], **values} if isinstance(tree[key], dict) else values[key]
    return Recipe.model_validate(tree)


def change_model(folder: Path) -> Recipe:
    other = folder / "other"
    if not other.exists():
        make_pico_model(other, layers=3, seed=7)
    return change(make_job(folder), "model", model=str(other))


def change_texts(folder: Path) -> Recipe:
    (folder / "other.txt").write_text(pico_text(900, seed=5))
    return change(make_job(folder), "calibration", data=str(folder / "other.txt"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda folder: make_job(folder, group_size=64),
            "plan (group_size 32 -> 64 in model.layers.0.mlp.down_proj and 20 more)",
        ),
        (
            lambda folder: make_job(folder, overrides=[{"match": "*.1.*down*", "scheme": "w8a16"}]),
            "plan (scheme w4a16 -> w8a16 in model.layers.1.mlp.down_proj)",
        ),
        (
            lambda folder: make_job(folder, scheme="w8a16", method="rtn"),
            "method gptq -> rtn in model.layers.0.mlp.down_proj and 20 more",
        ),
        (change_model, "model (model.safetensors changed)"),
        (change_texts, "calibration (data changed"),
        (lambda folder: change(make_job(folder), "calibration", samples=20), "windows 16 -> 20)"),
    ],
    ids=["group size", "override", "method", "model", "texts", "windows"],
)
def test_a_changed_job_is_refused_with_the_difference(
    begun: Path, make: Callable[[Path], Recipe], says: str
) -> None:
    """In one line, which also says what to do; the blocks stay."""
    recipe = make(begun)
    with pytest.raises(InputError) as refused:
        quantkit.quantize(recipe, gate=False, device="cpu")
    told = str(refused.value)
    assert says in told
    assert f"{begun / 'out.partial'} holds an unfinished job that differs in " in told
    assert told.endswith("start again with --overwrite")
    assert "\n" not in told
    assert len(told) < 600
    assert len(list((begun / "out.partial" / "workspace").glob("block-*"))) == 1


def test_another_version_or_dtype_is_refused_with_both(begun: Path) -> None:
    """As a job finds it that was begun by them."""
    file = begun / "out.partial" / "workspace" / "job.json"
    text = file.read_text()
    found = json.loads(text)
    dtype, torch = found["compute"]["dtype"], found["versions"]["torch"]
    found["compute"] |= {"device": "cuda", "dtype": "float8"}
    found["versions"] |= {"torch": "2.0.0", "numba": "0.1"}
    file.write_text(json.dumps(found))
    with pytest.raises(InputError) as refused:
        quantkit.quantize(make_job(begun), gate=False, device="cpu")
    file.write_text(text)
    told = str(refused.value)
    assert f"differs in compute (device cuda -> cpu, dtype float8 -> {dtype}); versions (" in told
    assert f"torch 2.0.0 -> {torch}" in told


def test_what_is_new_and_what_is_gone_is_told() -> None:
    """Of hashes and long values only that they changed."""
    old, new = "a" * 64, "b" * 64
    before = {"model": {"a": old, "b": old, "c": old}, "calibration": None}
    after = {"model": {"a": new, "c": old, "d": new}, "calibration": {"sha256": new, "windows": 4}}
    assert list_differences(before, after) == [
        "calibration (data is new, windows none -> 4)",
        "model (a changed, b is gone, d is new)",
    ]
    assert list_differences(before, before) == []


def test_of_many_differences_a_few_are_told() -> None:
    """And how many there are."""
    before = {"versions": {f"package{number}": "1" for number in range(9)}}
    after = {"versions": {f"package{number}": "2" for number in range(9)}}
    (told,) = list_differences(before, after)
    assert told.startswith("versions (package0 1 -> 2, package1 1 -> 2, ")
    assert told.endswith(", and 5 more)")
