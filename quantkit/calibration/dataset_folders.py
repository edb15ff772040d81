"""What a folder of data says about itself, before `datasets` goes by it.

`datasets` reads what such a folder names wherever that lies, on this disk or not: the patterns
of `configs` in its README.md or .huggingface.yaml, and the files of `save_to_disk` in state.json
(datasets 5.2, load.py and arrow_dataset.py). Here all of it lies in the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from quantkit.checkpoint.headers import read_json
from quantkit.checkpoint.paths import join_inside
from quantkit.errors import CalibrationError, CheckpointError, unreadable
from quantkit.plain_yaml import MAX_YAML_BYTES, parse_yaml

_HEADER = re.compile(r"^\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")
"""YAML above a text, letter for letter as huggingface_hub finds it (repocard.py)."""
_MOST_SPLITS = 1000
_REMEDY = "name one of its files as the data"


def check_dataset_folder(folder: Path) -> None:
    """Refuse a folder whose description names data that lie elsewhere.

    Raises:
        CalibrationError: it does, or cannot be read.
    """
    try:
        for name in _find_saved(folder):
            join_inside(folder, name)
        for place, text in _find_headers(folder):
            for pattern in _list_patterns(_parse(place, text).get("configs")):
                join_inside(folder, pattern)
    except CheckpointError as error:
        raise CalibrationError(f"{error}; {_REMEDY}") from None


def _find_saved(folder: Path) -> Iterator[str]:
    """Yield the files and folders that a folder of `save_to_disk` names, relative to it."""
    splits: object = []
    described = folder / "dataset_dict.json"
    if described.is_file():
        splits = read_json(join_inside(folder, described.name)).get("splits")
    # `datasets` goes through whatever is there: the keys of a mapping, the letters of a text.
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise CheckpointError(f"{described} has no list of names as its splits")
    if len(splits) > _MOST_SPLITS:
        raise CheckpointError(
            f"{described} names {len(splits)} splits, and at most {_MOST_SPLITS} are looked at"
        )
    places = [""]
    for split in splits:
        yield split
        places.append(f"{split}/")
    for place in places:
        state = join_inside(folder, f"{place}state.json")
        entries = read_json(state).get("_data_files") if state.is_file() else []
        for entry in entries if isinstance(entries, list) else []:
            yield f"{place}{entry.get('filename') if isinstance(entry, dict) else ''}"


def _find_headers(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield (file, YAML) of what describes the folder."""
    for name in ("README.md", ".huggingface.yaml"):
        path = join_inside(folder, name)
        if not path.is_file():
            continue
        try:
            with path.open("rb") as file:
                # One byte more tells that there are more, which `datasets` would read as well.
                content = file.read(MAX_YAML_BYTES + 1)
        except OSError as error:
            raise unreadable(path, error) from None
        text, is_cut = content.decode("utf-8", "replace"), len(content) > MAX_YAML_BYTES
        if name != "README.md":
            if is_cut:
                raise CheckpointError(f"{path} is longer than {MAX_YAML_BYTES} bytes")
            yield path, text
            continue
        header = _HEADER.match(text)
        # An end at the cut may be none in the whole text.
        ends = header is not None and header.end() < len(text)
        if is_cut and not ends and "---".startswith(text.lstrip()[:3]):
            raise CheckpointError(f"the header of {path} is longer than {MAX_YAML_BYTES} bytes")
        yield path, "" if header is None else header[1]


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        tree, _ = parse_yaml(text)
    except yaml.YAMLError as error:
        words = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} describes the data by what is no YAML: {words}") from None
    return tree if isinstance(tree, dict) else {}


def _list_patterns(configs: Any, key: str = "") -> Iterator[str]:
    """Yield each text below `data_files` and `data_dir`."""
    if isinstance(configs, dict):
        for name, value in configs.items():
            inner = key or (str(name) if name in ("data_files", "data_dir") else "")
            # A split is a name as well, and no file.
            if not (key and name == "split"):
                yield from _list_patterns(value, inner)
    elif isinstance(configs, list):
        for value in configs:
            yield from _list_patterns(value, key)
    elif isinstance(configs, str) and key:
        yield configs
