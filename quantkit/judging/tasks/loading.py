"""Tasks of lm-eval before any model is loaded: what `gate.tasks` names, read and checked."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from quantkit.errors import InputError, MissingPackageError, nearest
from quantkit.judging.tasks.files import (
    find_data_files,
    find_task_file,
    is_file_name,
    read_task_file,
)
from quantkit.judging.tasks.scores import Kind
from quantkit.recipe.judging import TaskSpec

INSTALL = 'pip install "quantkit[tasks]"'

FEWSHOT_SEED = 1234
"""Of the examples before a question; lm-eval's own."""

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "mean": "mean",
        "perplexity": "perplexity",
        "weighted_perplexity": "weighted_perplexity",
        "bits_per_byte": "bits_per_byte",
    }
)
"""Name of an aggregation of lm-eval -> how its values are paired."""

_NAMES_SHOWN = 6


@dataclass(frozen=True)
class LoadedTask:
    """A task that is ready to be asked: its documents are there, and its metric can be paired."""

    name: str
    spec: TaskSpec
    metric: str
    filter: str
    """lm-eval's name of the way from an answer to what is counted; `none` where there is one."""
    kind: Kind
    higher_is_better: bool
    parts: Mapping[str, Any]
    """Name -> lm-eval's task object; several for a group or a tag."""

    @property
    def shown_metric(self) -> str:
        """The metric as lm-eval's tables name it."""
        return self.metric if self.filter == "none" else f"{self.metric},{self.filter}"


def load_tasks(specs: Sequence[TaskSpec | str]) -> tuple[LoadedTask, ...]:
    """Read what `gate.tasks` names, before any model is loaded.

    Raises:
        MissingPackageError: lm-eval is not installed.
        InputError: a task is unknown, runs code of its own, has data that is not there, or a metric
            that cannot be paired.
    """
    if not specs:
        return ()
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingPackageError("lm-eval", "gate.tasks", INSTALL) from error
    wanted = [TaskSpec(name=spec) if isinstance(spec, str) else spec for spec in specs]
    files = {spec.name: find_task_file(spec.name) for spec in wanted if is_file_name(spec.name)}
    with quietly():
        manager = TaskManager(include_defaults=len(files) < len({spec.name for spec in wanted}))
    for spec in wanted:
        if spec.name not in files and spec.name not in manager.all_tasks:
            raise InputError(
                f"gate.tasks: lm-eval has no task {spec.name!r}"
                f"{nearest(spec.name, manager.all_tasks)} (your own is named by its YAML file)"
            )
    return tuple(_load_task(manager, spec, files.get(spec.name)) for spec in wanted)


def _load_task(manager: Any, spec: TaskSpec, file: Path | None) -> LoadedTask:
    """Let lm-eval make the task, read its documents and choose what is counted."""
    config = None if file is None else _prepare_config(file)
    name = spec.name if config is None else str(config["task"])
    with quietly(), blaming(f"gate.tasks: lm-eval cannot load {spec.name!r}"):
        parts = manager.load([config or name])["tasks"]
    for task in parts.values():
        _check_task(spec, task)
        if spec.num_fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", spec.num_fewshot or 0)
    metric, chosen, kind = _choose_metric(spec, parts)
    first = next(iter(parts.values()))
    return LoadedTask(
        name=name,
        spec=spec,
        metric=metric,
        filter=chosen,
        kind=kind,
        higher_is_better=first.higher_is_better().get(metric) is not False,
        parts=parts,
    )


def _prepare_config(file: Path) -> dict[str, Any]:
    """Return the config of a task in a file, with its local data as lm-eval can take it."""
    from lm_eval.api.registry import metric_registry

    config = read_task_file(file)
    for entry in config.get("metric_list") or ():
        known = isinstance(entry, dict) and entry.get("metric") in metric_registry
        if not known:
            shown = entry.get("metric") if isinstance(entry, dict) else entry
            near = nearest(str(shown), metric_registry)
            raise InputError(
                f"{file}: metric {shown!r} is none of lm-eval's own{near} "
                f"(known: {', '.join(sorted(metric_registry))})"
            )
    data = find_data_files(file, config)
    if data is not None:
        del config["dataset_kwargs"]
        config["custom_dataset"] = partial(_read_splits, config["dataset_path"], data)
    return config


def _read_splits(kind: str, data: Mapping[str, Sequence[Path]], config_source: str) -> Any:
    """Return the documents of local files, split by split, without a copy of them in any cache.

    Args:
        kind: `json`, `csv` or `parquet`.
        data: split -> its files.
        config_source: what lm-eval hands to every reader of its own; not needed.
    """
    import pyarrow
    from datasets import Dataset
    from pyarrow import csv, json, parquet

    read = {"json": json.read_json, "csv": csv.read_csv, "parquet": parquet.read_table}[kind]
    return {
        split: Dataset(pyarrow.concat_tables([read(str(file)) for file in files]))
        for split, files in data.items()
    }


def _check_task(spec: TaskSpec, task: Any) -> None:
    """Refuse what a gate does not do: run what a model writes, show pictures."""
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(
            f"gate.tasks: {spec.name} runs code that the model writes: it is not run here"
        )
    if getattr(task, "MULTIMODAL", False):
        raise InputError(
            f"gate.tasks: {spec.name} asks about pictures or sound: only text is judged"
        )
    if spec.num_fewshot and task.get_config("num_fewshot") == 0:
        raise InputError(
            f"gate.tasks: {spec.name} is made to be asked without examples: leave num_fewshot out"
        )


def _choose_metric(spec: TaskSpec, parts: Mapping[str, Any]) -> tuple[str, str, Kind]:
    """Return the metric, the filter and how values are paired; the same for all parts."""
    task = next(iter(parts.values()))
    found = {metric: _find_kind(function) for metric, function in task.aggregation().items()}
    filters = [ensemble.name for ensemble in task._filters]
    metric, _, chosen = (spec.metric or next(iter(found))).partition(",")
    usable = [name for name, kind in found.items() if kind is not None]
    kind = found.get(metric)
    if metric not in found or (chosen and chosen not in filters):
        raise InputError(
            f"gate.tasks: {spec.name} has no metric {spec.metric!r} (it has: {', '.join(found)}"
            + (f"; each behind one of: {', '.join(filters)})" if filters != ["none"] else ")")
        )
    if kind is None:
        raise InputError(
            f"gate.tasks: {spec.name}: {metric} is no mean over documents, so two models cannot be "
            f"paired on it; choose with `metric:` (possible: {', '.join(usable) or 'none'})"
        )
    others = [
        name
        for name, part in parts.items()
        if _find_kind(part.aggregation().get(metric)) != kind
        or (chosen or filters[0]) not in [ensemble.name for ensemble in part._filters]
    ]
    if others:
        raise InputError(
            f"gate.tasks: {spec.name} is a group, and not all of it has {metric}: "
            f"{', '.join(others[:_NAMES_SHOWN])}; name its tasks one by one"
        )
    return metric, chosen or filters[0], kind


def _find_kind(function: Any) -> Kind | None:
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    return next(
        (kind for name, kind in KINDS.items() if AGGREGATION_REGISTRY[name] is function), None
    )


@contextmanager
def quietly() -> Iterator[None]:
    """Keep lm-eval's bars and notes from the terminal, and its draws the same each time."""
    states = random.getstate(), np.random.get_state()
    random.seed(FEWSHOT_SEED)
    np.random.seed(FEWSHOT_SEED)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Say in one line where lm-eval, or what it calls, failed: it raises whatever comes."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        hint = "; its data comes from the Hub" if isinstance(error, OSError) else ""
        if isinstance(error, PermissionError):
            hint = "; it keeps the data that it reads: set HF_HOME to a folder that can be written"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(f"{what}: {reason}{hint}") from error
