"""The chat templates beside a tokenizer."""

from __future__ import annotations

from pathlib import Path

from quantkit.calibration.tokenizer import read_json_object
from quantkit.errors import CheckpointError


def read_templates(folder: Path) -> dict[str, str]:
    """Return name -> chat template, from the place that transformers takes them from.

    Raises:
        CheckpointError: a file is damaged.
    """
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        return {
            "default": _read_text(alone),
            **{path.stem: _read_text(path) for path in others},
        }
    config = read_json_object(folder / "tokenizer_config.json")
    named = config.get("chat_template") or read_json_object(folder / "chat_template.json").get(
        "chat_template"
    )
    if isinstance(named, str):
        return {"default": named}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in named or ()}
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor a list of "
            "records with `name` and `template`"
        ) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path} as UTF-8 text") from error
