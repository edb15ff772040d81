"""`quantkit init`: a commented recipe to start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from quantkit.cli.console import Reply
from quantkit.cli.options import JsonOption, OverwriteOption, QuietOption
from quantkit.durable import write_text
from quantkit.errors import OutputError
from quantkit.recipe import AUTO, BEST, CalibrationSpec, ExportSpec, GateSpec, QuantizeSpec, Recipe
from quantkit.schemes import EFFORTS, FORMATS, GROUP_SIZES, KV_CACHES, METHODS, RUNTIMES, SCHEMES

EXAMPLE = "Example: quantkit init MODEL --output my-recipe.yaml"

_GROUPS: dict[str, type[BaseModel]] = {
    "calibration": CalibrationSpec,
    "quantize": QuantizeSpec,
    "export": ExportSpec,
    "gate": GateSpec,
}
_PLACEHOLDERS = {
    "version": 1,
    "model": "path/to/model",
    "output": "artifacts/my-model-4bit",
    "calibration.data": "calibration.txt",
    "gate.data": "evaluation.txt",
}
"""Keys without a default that a job needs; the values say what belongs there."""
_CHOICES: dict[str, list[str | int]] = {
    "quantize.scheme": [*(name for name, scheme in SCHEMES.items() if scheme.built), AUTO],
    "quantize.group_size": [*GROUP_SIZES, "channel"],
    "quantize.method": [BEST, *(name for name, method in METHODS.items() if method.built)],
    "quantize.effort": list(EFFORTS),
    "quantize.kv_cache": [name for name, built in KV_CACHES.items() if built],
    "export.format": [name for name, built in FORMATS.items() if built],
    "gate.runtime": [name for name, built in RUNTIMES.items() if built],
}
_NOT_YET = {"publish", "gate.tasks"}
_COMMENT_COLUMN = 42


def init(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="The model to name in the recipe."),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", metavar="FILE", help="The recipe to write.")
    ] = "recipe.yaml",
    overwrite: OverwriteOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> Reply:
    """Write a recipe with every key explained in a comment."""
    path = Path(output)
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists: choose another --output, or pass --overwrite")
    write_text(path, render_recipe(model))
    return Reply(
        {"recipe": str(path)},
        [f"wrote {path}: name your data in it, then run `quantkit plan --recipe {path}`"],
    )


def render_recipe(model: str | None = None) -> str:
    """Return YAML with every key that works today, its default, and what it means."""
    return "\n".join(_rows(model)) + "\n"


def _rows(model: str | None) -> Iterator[str]:
    yield "# A recipe for `quantkit quantize`. Keys that show their default may be left out."
    for key, field in Recipe.model_fields.items():
        if key in _NOT_YET:
            continue
        if key not in _GROUPS:
            yield _row("", key, key, field, model if key == "model" else None)
            continue
        yield f"\n# {field.description}\n{key}:"
        names = [name for name in _GROUPS[key].model_fields if f"{key}.{name}" not in _NOT_YET]
        for name in names:
            indent = "  "
            if key == "export":
                indent = "  - " if name == names[0] else "    "
            yield _row(indent, name, f"{key}.{name}", _GROUPS[key].model_fields[name])


def _row(indent: str, name: str, key: str, field: FieldInfo, value: object = None) -> str:
    """`key: value  # what it means`."""
    if value is None:
        value = _PLACEHOLDERS.get(key, field.default)
    plain = list(value) if isinstance(value, tuple) else value
    flow = yaml.safe_dump(plain, default_flow_style=True, width=1000).split("\n")[0]
    choices = f": {' | '.join(map(str, _CHOICES[key]))}" if key in _CHOICES else ""
    return f"{f'{indent}{name}: {flow} ':<{_COMMENT_COLUMN}}# {field.description}{choices}"
