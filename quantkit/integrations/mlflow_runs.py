"""Runs of MLflow: begun, logged to, ended; and what becomes of its errors."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.errors import InputError, Interrupted, MissingPackageError, TrackingError
from quantkit.integrations.figures import PAGE, Told, list_metrics, list_params, list_tags
from quantkit.masking import hide_tokens, plain_address

INSTALL = 'pip install "quantkit[mlflow]"'

_ERROR = "quantkit.error"
_PARAMS_AT_ONCE = 100
_METRICS_AT_ONCE = 1000
_LONGEST_NAME = 250
_LONGEST_PARAM = 6000
_LONGEST_TAG = 5000
"""Limits of MLflow's servers; the longest tag is that of versions before 2.15."""
_SECONDS_TO_ANSWER = 10


@dataclass(frozen=True)
class OpenRun:
    """A run that can be logged to."""

    client: Any
    """`mlflow.MlflowClient`."""
    tracking_uri: str
    run_id: str
    experiment_id: str
    artifact_uri: str
    ours: bool
    """Whether quantkit ends it; a run that the caller has open stays open."""


def open_run(
    experiment: str | None,
    *,
    run_name: str | None = None,
    run_id: str | None = None,
    tracking_uri: str | None = None,
    nested: bool = False,
) -> OpenRun:
    """Begin a run, or take one that exists; what can be refused is refused here.

    Raises:
        MissingPackageError, InputError, TrackingError: as `log_result`.
    """
    mlflow = load_mlflow()
    uri = tracking_uri or mlflow.get_tracking_uri()
    check_answers(uri)
    active = mlflow.active_run()
    if experiment is not None or run_id is not None or tracking_uri is not None:
        active = None
    with answering(uri):
        client = mlflow.MlflowClient(tracking_uri=uri)
        if run_id is not None:
            run = client.get_run(run_id)
        elif active is not None and not nested:
            run = active
        else:
            tags = {} if active is None else {"mlflow.parentRunId": active.info.run_id}
            place = _find_experiment(client, experiment) if active is None else None
            number = place if active is None else active.info.experiment_id
            run = client.create_run(number, run_name=run_name, tags=tags)
    info = run.info
    return OpenRun(
        client,
        uri,
        info.run_id,
        info.experiment_id,
        info.artifact_uri,
        ours=run is not active,
    )


def open_child(parent: OpenRun, name: str) -> OpenRun:
    """Begin a run below another.

    Raises:
        TrackingError: the server cannot be reached.
    """
    tags = {"mlflow.parentRunId": parent.run_id}
    with answering(parent.tracking_uri):
        info = parent.client.create_run(parent.experiment_id, run_name=name, tags=tags).info
    return replace(parent, run_id=info.run_id, artifact_uri=info.artifact_uri, ours=True)


def log_told(run: OpenRun, told: Told, *, step: int = 0) -> None:
    """Log a report to a run: parameters, metrics, tags, pages.

    Raises:
        InputError: the run has other parameters already.
        TrackingError: the server cannot be reached, or refuses what it is sent.
    """
    check_answers(run.tracking_uri)
    with answering(run.tracking_uri):
        _log_params(run, list_params(told.document))
        _log_rest(run, list_metrics(told.document), list_tags(told.document), step)
        _log_pages(run, told)


def end_run(run: OpenRun, status: str = "FINISHED") -> None:
    """End a run, unless the caller has opened it.

    Raises:
        TrackingError: the server cannot be reached.
    """
    if run.ours:
        with answering(run.tracking_uri):
            run.client.set_terminated(run.run_id, status)


def fail_run(run: OpenRun, error: BaseException) -> None:
    """End a run whose job has failed or was stopped, with the first line of the error as a tag.

    Raises:
        TrackingError: the server cannot be reached.
    """
    stopped = isinstance(error, KeyboardInterrupt | Interrupted)
    lines = str(error).splitlines() or [type(error).__name__]
    words = "stopped by the user" if stopped else hide_tokens(lines[0])[:_LONGEST_TAG]
    check_answers(run.tracking_uri)
    with answering(run.tracking_uri):
        run.client.set_tag(run.run_id, _ERROR, words)
    end_run(run, "KILLED" if stopped else "FAILED")


def plain_uri(uri: str) -> str:
    """Return the address of a server without a name, a password or a token."""
    return hide_tokens(plain_address(uri))


def load_mlflow() -> Any:
    """Return the package.

    Raises:
        MissingPackageError: it is not installed.
    """
    # Else its client reports how it is used to its makers.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        import mlflow
    except ImportError:
        raise MissingPackageError("mlflow", "logging to MLflow", INSTALL) from None
    return mlflow


def check_answers(uri: str) -> None:
    """Refuse a server that nobody answers at: MLflow's client would try for minutes.

    Raises:
        TrackingError: nobody answers.
    """
    if not uri.startswith(("http://", "https://")):
        return
    import requests

    try:
        # Whatever the answer is, and whether or not the server knows this address.
        requests.get(
            f"{uri.rstrip('/')}/health",
            timeout=_SECONDS_TO_ANSWER,
            verify=_find_certificates(),
            cert=os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"),
        )
    except requests.RequestException as error:
        raise TrackingError(
            f"MLflow at {plain_uri(uri)} does not answer ({type(error).__name__}): start it, or "
            f"set MLFLOW_TRACKING_URI"
        ) from None


def _find_certificates() -> bool | str:
    """Which certificates of a server suffice, as MLflow's client reads its variables."""
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        return False
    return os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True


def _find_experiment(client: Any, name: str | None) -> str:
    """Return the id of an experiment, which is made where it does not exist."""
    name = name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "quantkit"
    found = client.get_experiment_by_name(name)
    return str(client.create_experiment(name) if found is None else found.experiment_id)


def log_files(run: OpenRun, tags: Mapping[str, str], files: Sequence[Path]) -> None:
    """Log files as they are, and tags.

    Raises:
        TrackingError: the server cannot be reached, or refuses what it is sent.
    """
    with answering(run.tracking_uri):
        _log_rest(run, {}, tags, 0)
        for file in files:
            run.client.log_artifact(run.run_id, str(file))


def _log_params(run: OpenRun, params: Mapping[str, str]) -> None:
    """Log parameters, as many at once as a server takes.

    Raises:
        InputError: the run has one of them with another value, which MLflow does not replace.
    """
    from mlflow.entities import Param

    limited = {name[:_LONGEST_NAME]: value[:_LONGEST_PARAM] for name, value in params.items()}
    there = run.client.get_run(run.run_id).data.params
    other = [name for name, value in limited.items() if there.get(name, value) != value]
    if other:
        raise InputError(
            f"the run {run.run_id} has another {other[0]} already ({there[other[0]][:80]!r}): log "
            f"each result to a run of its own, with nested=True below the one that is open"
        )
    entities = [Param(name, value) for name, value in limited.items() if name not in there]
    for start in range(0, len(entities), _PARAMS_AT_ONCE):
        run.client.log_batch(run.run_id, params=entities[start : start + _PARAMS_AT_ONCE])


def _log_rest(
    run: OpenRun, metrics: Mapping[str, float], tags: Mapping[str, str], step: int
) -> None:
    from mlflow.entities import Metric, RunTag

    now = int(time.time() * 1000)
    entities = [Metric(name[:_LONGEST_NAME], value, now, step) for name, value in metrics.items()]
    labels = [RunTag(name, value[:_LONGEST_TAG]) for name, value in tags.items()]
    for start in range(0, len(entities), _METRICS_AT_ONCE):
        run.client.log_batch(run.run_id, metrics=entities[start : start + _METRICS_AT_ONCE])
    run.client.log_batch(run.run_id, tags=labels[:_PARAMS_AT_ONCE])


def _log_pages(run: OpenRun, told: Told) -> None:
    """Log the folder of the report, and quantkit.json where it lies beside."""
    if told.reports is None:
        run.client.log_dict(run.run_id, dict(told.document), f"report/{PAGE}")
        return
    run.client.log_artifacts(run.run_id, str(told.reports), "report")
    evidence = told.root / "quantkit.json"
    if told.root != Path() and evidence.is_file():
        run.client.log_artifact(run.run_id, str(evidence))


@contextmanager
def answering(uri: str) -> Iterator[None]:
    """Turn whatever MLflow's client and its stores raise into one error that says where.

    Raises:
        TrackingError: instead of it.
    """
    try:
        yield
    except (InputError, KeyboardInterrupt):
        raise
    except Exception as error:
        lines: Sequence[str] = str(error).splitlines() or [type(error).__name__]
        # Its own error may name an address with a password, as that of a database.
        raise TrackingError(f"MLflow at {plain_uri(uri)}: {hide_tokens(lines[0])}") from None
