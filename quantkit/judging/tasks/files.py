"""A task of lm-eval in a YAML file of the user's own: read as data, and no code of it is run.

lm-eval itself would import functions that such a file names (`!function`), load metrics and
prompts from other places, and render templates without a sandbox. An artifact's own recipe may
name a file, so none of that is done. How long a template runs is seen to in `rehearsal`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, TemplateSyntaxError, nodes, sandbox

from quantkit.errors import InputError, nearest, unreadable
from quantkit.plain_yaml import MAX_YAML_BYTES, parse_yaml
from quantkit.recipe import shipped_folder

ENDINGS = (".yaml", ".yml")

_MOST_FILES = 50
"""That make up a task."""

READERS = {"json": ".jsonl", "csv": ".csv", "parquet": ".parquet"}
"""`dataset_path` of local data -> the ending of its files."""

_RUNS_CODE = {
    "class": "names a Python class",
    "custom_dataset": "names a function",
    "process_docs": "names a function",
    "process_results": "names a function",
    "use_prompt": "takes prompts from another place",
    "unsafe_code": "runs what the model writes",
    "doc_to_image": "asks for pictures",
    "doc_to_audio": "asks for sound",
}
_FILTERS = frozenset(
    {"abs", "capitalize", "count", "default", "first", "float", "int", "join", "last", "length"}
    | {"list", "lower", "regex_replace", "replace", "reverse", "round", "string", "title", "tojson"}
    | {"trim", "upper"}
)
"""Without more than their first two arguments, none of these looks up an attribute by its name."""
_UNSAFE = frozenset(
    sandbox.UNSAFE_FUNCTION_ATTRIBUTES
    | sandbox.UNSAFE_METHOD_ATTRIBUTES
    | sandbox.UNSAFE_GENERATOR_ATTRIBUTES
    | sandbox.UNSAFE_COROUTINE_ATTRIBUTES
    | sandbox.UNSAFE_ASYNC_GENERATOR_ATTRIBUTES
    | {"format", "format_map", "mro"}
)


def is_file_name(name: str) -> bool:
    """Whether `name` is that of a file and not one of lm-eval's tasks."""
    return name.endswith(ENDINGS) or os.sep in name


def find_task_file(name: str) -> Path:
    """Return the file that `name` means: from the working folder, else beside shipped recipes.

    Raises:
        InputError: there is none.
    """
    candidates = (Path(name), shipped_folder().parent / name)
    try:
        found = next((path for path in candidates if path.is_file()), None)
    except (OSError, ValueError) as error:
        raise InputError(f"gate.tasks: {name!r:.100} cannot be looked up: {error}") from None
    if found is not None:
        return found
    beside = [str(path) for path in Path(name).parent.glob("*") if path.name.endswith(ENDINGS)]
    raise InputError(f"gate.tasks: there is no file {name!r}{nearest(name, beside)}")


def read_task_file(path: Path) -> dict[str, Any]:
    """Return what a task's YAML file says, with the files that it includes and its data's paths.

    Raises:
        InputError: it cannot be read, describes no task, runs code, or its data is not there.
    """
    config = _read_tree(path, (), [])
    name = config.get("task")
    if not isinstance(name, str) or "group" in config:
        raise InputError(f"{path}: describes no task of lm-eval: `task:` with a name is missing")
    for key, why in _RUNS_CODE.items():
        if config.get(key):
            raise InputError(f"{path}: {key} {why}, which a task of your own may not")
    for text in _texts(config):
        _check_template(path, text)
    metrics = config.get("metric_list") or []
    if not isinstance(metrics, list):
        raise InputError(f"{path}: metric_list is no list of metrics")
    for metric in metrics:
        if isinstance(metric, dict) and metric.get("hf_evaluate"):
            raise InputError(f"{path}: hf_evaluate runs code, which a task of your own may not")
    config.pop("metadata", None)
    return config


def find_data_files(path: Path, config: Mapping[str, Any]) -> dict[str, list[Path]] | None:
    """Return split -> files of a task's data, where that is in files; None: it is on the Hub.

    Args:
        path: the YAML file; what it names is looked for beside it.
        config: as `read_task_file` returns it.

    Raises:
        InputError: a file is missing, or of another kind.
    """
    ending = READERS.get(str(config.get("dataset_path")))
    if ending is None:
        return None
    options = config.get("dataset_kwargs")
    options = options if isinstance(options, dict) else {}
    named = options.get("data_files")
    if not named or len(options) > 1:
        raise InputError(f"{path}: dataset_kwargs of local data names data_files, and nothing else")
    splits = named if isinstance(named, dict) else {"train": named}
    found: dict[str, list[Path]] = {}
    for split, names in splits.items():
        files = [
            path.parent / str(each) for each in (names if isinstance(names, list) else [names])
        ]
        for file in files:
            if file.suffix != ending:
                raise InputError(f"{path}: {file.name}: data files of this task end in {ending}")
            if not file.is_file():
                raise InputError(f"{path}: there is no data file {file}")
        found[str(split)] = files
    return found


def _read_tree(path: Path, trail: tuple[Path, ...], read: list[Path]) -> dict[str, Any]:
    """Return the keys of a file on top of those that it includes."""
    try:
        path = path.resolve()
        waits = path.exists() and not path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} cannot be looked up: {error}") from None
    if path in trail:
        raise InputError(f"{path}: includes itself")
    # Files that include two others each would be read for ever.
    read.append(path)
    if len(read) > _MOST_FILES:
        raise InputError(f"{path}: {_MOST_FILES} files were included before it: no task needs more")
    if waits:
        raise InputError(f"cannot read {path}: it is no file")
    try:
        # One byte more tells that there are too many.
        with path.open("rb") as file:
            content = file.read(MAX_YAML_BYTES + 1)
        if len(content) > MAX_YAML_BYTES:
            raise InputError(f"{path} is larger than a task can be ({MAX_YAML_BYTES >> 10} KiB)")
        tree, _ = parse_yaml(content.decode("utf-8"))
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(
            f"{path}:{line}: a tag such as !function runs code, which a task of your own may not"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is no YAML: {' '.join(str(error).split())[:200]}") from error
    except OSError as error:
        raise unreadable(path, error, InputError) from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: describes no task: keys and values are expected")
    included = tree.pop("include", None) or []
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        merged |= _read_tree(path.parent / str(name), (*trail, path), read)
    return merged | tree


def _texts(tree: Any) -> Iterator[str]:
    """Yield every text in a tree of YAML."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _texts(value)
    elif isinstance(tree, Iterable):
        for value in tree:
            yield from _texts(value)


def _check_template(path: Path, text: str) -> None:
    """Refuse a template that could reach more than the fields of a document."""
    if "{{" not in text and "{%" not in text:
        return
    try:
        tree = Environment().parse(text)
    except (TemplateSyntaxError, RecursionError) as error:
        raise InputError(f"{path}: template {text[:60]!r}: {error}") from error
    for node in tree.find_all(nodes.Node):
        wrong = _find_fault(node)
        if wrong:
            raise InputError(
                f"{path}: template {text[:60]!r}: {wrong}: templates of your own have a document's "
                f"fields, methods of texts, and the filters {', '.join(sorted(_FILTERS))}"
            )


def _find_fault(node: nodes.Node) -> str:
    """Say what in a node of a template could look up or run anything; empty: nothing."""
    if isinstance(node, nodes.Getattr) and (node.attr.startswith("_") or node.attr in _UNSAFE):
        return f"attribute {node.attr}"
    if isinstance(node, nodes.Name) and node.name.startswith("_"):
        return f"name {node.name}"
    if isinstance(node, nodes.Filter):
        most = 1 if node.name == "join" else 2
        named = node.kwargs or node.dyn_args or node.dyn_kwargs
        is_plain = node.name in _FILTERS and not named and len(node.args) <= most
        return "" if is_plain else f"filter {node.name}"
    if isinstance(node, nodes.Import | nodes.FromImport | nodes.Include | nodes.Extends):
        return "another template"
    if isinstance(node, nodes.Macro | nodes.CallBlock | nodes.Block):
        return "a part that calls itself"
    if isinstance(node, nodes.Pow):
        return "a power"
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name):
        return "" if node.node.name == "range" else f"a call of {node.node.name}"
    if not isinstance(node, nodes.Getitem):
        return ""
    index = node.arg
    if isinstance(index, nodes.Const):
        is_name = isinstance(index.value, str)
        return f"field {index.value}" if is_name and index.value.startswith("_") else ""
    is_number = isinstance(index, nodes.Filter) and index.name in ("int", "length", "count")
    return (
        "" if is_number or isinstance(index, nodes.Slice | nodes.Neg) else "an index without |int"
    )
