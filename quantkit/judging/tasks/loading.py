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

from quantkit.calibration.parquet import read_whole
from quantkit.errors import InputError, MissingPackageError, nearest
from quantkit.judging.tasks.files import (
    find_data_files,
    find_task_file,
    is_file_name,
    read_task_file,
)
from quantkit.judging.tasks.rehearsal import Allow, rehearse
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

_READ_SECONDS, _READ_BYTES, _FETCH_SECONDS = 10.0, 1_000_000, 600.0
"""Of processor time in which local data is read, a second more for so many bytes of it; and in
which data of the Hub is."""
_DOCUMENT_SECONDS = 0.05
"""Of processor time to write one document or example; lm-eval needs a few thousandths."""
_MOST_SHOTS = 100
"""Examples before a question that are allowed their time."""
_DATA_TIMES = 16
"""What documents may take in memory: so many times the bytes of their files."""


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
    config, data_bytes = (None, 0) if file is None else _prepare_config(file)
    name = spec.name if config is None else str(config["task"])
    if file is not None:

        def ask_all(allow: Allow) -> None:
            parts = _load_parts(manager, spec, config or name)
            allow(count_seconds(parts, spec))
            build_requests(spec.name, parts, spec.limit)

        local = _READ_SECONDS + data_bytes / _READ_BYTES
        rehearse(
            f"gate.tasks: {spec.name}",
            ask_all,
            local if data_bytes else _FETCH_SECONDS,
            _DATA_TIMES * data_bytes,
        )
    parts = _load_parts(manager, spec, config or name)
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


def _load_parts(manager: Any, spec: TaskSpec, task: dict[str, Any] | str) -> Mapping[str, Any]:
    """Return name -> lm-eval's task object, checked and set to what `spec` says."""
    with quietly(), blaming(f"gate.tasks: lm-eval cannot load {spec.name!r}"):
        parts: Mapping[str, Any] = manager.load([task])["tasks"]
    for part in parts.values():
        _check_task(spec, part)
        if spec.num_fewshot is not None or part.get_config("num_fewshot") is None:
            part.set_config("num_fewshot", spec.num_fewshot or 0)
    return parts


def build_requests(
    name: str, parts: Mapping[str, Any], limit: int | None
) -> list[tuple[str, Sequence[Any]]]:
    """Let lm-eval write what the models are asked: (kind, arguments).

    Raises:
        InputError: it fails at it.
    """
    requests: list[tuple[str, Sequence[Any]]] = []
    with quietly(), blaming(f"lm-eval fails at task {name}"):
        for part in parts.values():
            part.set_fewshot_seed(FEWSHOT_SEED)
            part.build_all_requests(limit=limit)
            requests += [(each.request_type, each.args) for each in part.instances]
    return requests


def count_seconds(parts: Mapping[str, Any], spec: TaskSpec) -> float:
    """Return the processor time that the documents of a task may take, examples among them."""
    documents = sum(len(part.eval_docs) for part in parts.values())
    asked = min(documents, spec.limit or documents)
    named = [part.get_config("num_fewshot") for part in parts.values()]
    shots = max((min(each, _MOST_SHOTS) for each in named if isinstance(each, int)), default=0)
    return _READ_SECONDS + asked * (1 + max(0, shots)) * _DOCUMENT_SECONDS


def _prepare_config(file: Path) -> tuple[dict[str, Any], int]:
    """Return the config of a task in a file, with its local data as lm-eval can take it.

    And the bytes of that data; 0: it is on the Hub.
    """
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
    files = [each for split in (data or {}).values() for each in split]
    return config, sum(each.stat().st_size for each in files)


def _read_splits(kind: str, data: Mapping[str, Sequence[Path]], config_source: str) -> Any:
    """Return the documents of local files, split by split, without a copy of them in any cache.

    Args:
        kind: `json`, `csv` or `parquet`.
        data: split -> its files.
        config_source: what lm-eval hands to every reader of its own; not needed.
    """
    import pyarrow
    from datasets import Dataset
    from pyarrow import csv, json

    read = {"json": json.read_json, "csv": csv.read_csv, "parquet": read_whole}[kind]
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
