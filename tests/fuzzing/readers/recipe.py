"""Recipes: YAML that people write, and that a stranger may have written."""

from __future__ import annotations

import shutil
from pathlib import Path

import quantkit
from quantkit.recipe import shipped_folder
from tests.fuzzing.damage import BYTES
from tests.fuzzing.reader import Reader
from tests.fuzzing.trees import damage_yaml


def _build(folder: Path) -> None:
    for recipe in sorted(shipped_folder().glob("*.yaml")):
        (folder / recipe.stem).mkdir()
        shutil.copyfile(recipe, folder / recipe.stem / "recipe.yaml")


def _read(folder: Path) -> object:
    return quantkit.load_recipe(folder / "recipe.yaml")


READERS = (
    Reader(
        name="recipe",
        build=_build,
        damages={"recipe.yaml": (*[damage_yaml] * 20, *BYTES)},
        read=_read,
    ),
)
