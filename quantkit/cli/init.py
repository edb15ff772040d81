"""`quantkit init`: a commented recipe to start from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from quantkit.checkpoint.headers import read_json
from quantkit.cli.console import Reply
from quantkit.cli.options import JsonOption, OverwriteOption, QuietOption
from quantkit.durable import write_text
from quantkit.encoders.architectures import is_encoder
from quantkit.errors import CheckpointError, OutputError
from quantkit.recipe import (
    AUTO,
    BEST,
    CalibrationSpec,
    ExportSpec,
    GateSpec,
    PublishSpec,
    QuantizeSpec,
    Recipe,
)
from quantkit.schemes import (
    EFFORTS,
    FORMATS,
    KV_CACHES,
    METHODS,
    ONNX,
    ONNX_GROUP_SIZES,
    RUNTIMES,
    SCHEMES,
)

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
    "publish.repo": "OWNER/NAME",
}
"""Keys without a default that a job needs; the values say what belongs there."""
_FOR_ENCODERS: dict[str, object] = {
    "output": "artifacts/my-encoder-onnx",
    "calibration.sequence_length": 128,
    "quantize.scheme": "w8a8",
    "quantize.ignore": [],
    "export.format": ONNX,
    "gate.samples": 1000,
    "gate.sequence_length": 128,
}
"""Values of a recipe for an encoder that differ from the defaults, which are for decoders."""
CHOICES: dict[str, list[str | int]] = {
    "quantize.scheme": [*(name for name, scheme in SCHEMES.items() if scheme.built), AUTO],
    "quantize.group_size": [*ONNX_GROUP_SIZES, "channel"],
    "quantize.method": [BEST, *(name for name, method in METHODS.items() if method.built)],
    "quantize.effort": list(EFFORTS),
    "quantize.kv_cache": [name for name, built in KV_CACHES.items() if built],
    "export.format": [name for name, built in FORMATS.items() if built],
    "gate.runtime": [name for name, built in RUNTIMES.items() if built],
}
"""Keys of a recipe with few values, and those that work."""
_COMMENTED_OUT = {"publish": PublishSpec}
"""Groups that a job does without, and what belongs in them."""
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
    write_text(path, render_recipe(model, encoder=_names_encoder(model)))
    return Reply(
        {"recipe": str(path)},
        [f"wrote {path}: name your data in it, then run `quantkit plan --recipe {path}`"],
    )


def render_recipe(model: str | None = None, *, encoder: bool = False) -> str:
    """Return YAML with every key that works today, its default, and what it means.

    Args:
        model: to name in the recipe.
        encoder: whether it is an encoder, for which other values fit.
    """
    values = dict(_FOR_ENCODERS) if encoder else {}
    if model is not None:
        values["model"] = model
    return "\n".join(_rows(values)) + "\n"


def _names_encoder(model: str | None) -> bool:
    """Whether a folder holds an encoder; what cannot be read is for the job to complain about."""
    path = Path(model or "") / "config.json"
    try:
        return model is not None and path.is_file() and is_encoder(read_json(path))
    except (CheckpointError, OSError):
        return False


def _rows(values: Mapping[str, object]) -> Iterator[str]:
    yield "# A recipe for `quantkit quantize`. Keys that show their default may be left out."
    for key, field in Recipe.model_fields.items():
        if key in _COMMENTED_OUT:
            continue
        if key not in _GROUPS:
            yield _row("", key, key, field, values)
            continue
        yield f"\n# {field.description}\n{key}:"
        names = list(_GROUPS[key].model_fields)
        for name in names:
            indent = "  "
            if key == "export":
                indent = "  - " if name == names[0] else "    "
            member = _GROUPS[key].model_fields[name]
            if not isinstance(member.default, BaseModel):
                yield _row(indent, name, f"{key}.{name}", member, values)
                continue
            yield _comment(f"{indent}{name}:", member)
            for inner, leaf in type(member.default).model_fields.items():
                yield _row(f"{indent}  ", inner, f"{key}.{name}.{inner}", leaf, values)
    yield from _commented_rows(values)


def _commented_rows(values: Mapping[str, object]) -> Iterator[str]:
    """Groups that a job does without, to be switched on by taking the signs away."""
    for key, group in _COMMENTED_OUT.items():
        yield f"\n# {Recipe.model_fields[key].description}\n# {key}:"
        for name, field in group.model_fields.items():
            yield _row("#   ", name, f"{key}.{name}", field, values)


def _row(indent: str, name: str, key: str, field: FieldInfo, values: Mapping[str, object]) -> str:
    """`key: value  # what it means`."""
    value = values.get(key, _PLACEHOLDERS.get(key, field.default))
    plain = list(value) if isinstance(value, tuple) else value
    flow = yaml.safe_dump(plain, default_flow_style=True, width=1000).split("\n")[0]
    choices = f": {' | '.join(map(str, CHOICES[key]))}" if key in CHOICES else ""
    return _comment(f"{indent}{name}: {flow}", field) + choices


def _comment(line: str, field: FieldInfo) -> str:
    return f"{f'{line} ':<{_COMMENT_COLUMN}}# {field.description}"
