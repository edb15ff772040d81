"""Log what quantkit found to MLflow: a run, its report, and a model version where all passed.

    from quantkit.integrations.mlflow import log_result

    result = quantkit.quantize("awq4", model="path/to/model", output="artifacts/model-awq4")
    log_result(result, experiment="quantization", registered_model="model-awq4")

MLflow's own client does all of it (https://mlflow.org/docs/latest/api_reference/python_api), so
MLFLOW_TRACKING_URI, MLFLOW_REGISTRY_URI and the variables with credentials mean what they mean to
it. Names of parameters, metrics and tags stand in docs/tracking.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.integrations.figures import Told, read_told
from quantkit.integrations.mlflow_registry import (
    ALIAS,
    ModelVersion,
    Registration,
    check_registration,
    register,
)
from quantkit.integrations.mlflow_runs import (
    OpenRun,
    end_run,
    fail_run,
    load_mlflow,
    log_files,
    log_told,
    open_child,
    open_run,
    plain_uri,
)
from quantkit.records import Report, Result
from quantkit.sweeping.records import SweepResult

__all__ = [
    "ALIAS",
    "LoggedRun",
    "ModelVersion",
    "OpenRun",
    "Registration",
    "Told",
    "check_registration",
    "fail_run",
    "finish_run",
    "load_mlflow",
    "log_result",
    "log_sweep",
    "name_run",
    "open_run",
    "read_told",
]


@dataclass(frozen=True)
class LoggedRun:
    """Where a result is to be found."""

    run_id: str
    experiment_id: str
    tracking_uri: str
    """Without a name or a password."""
    verdict: str | None = None
    """Of the report; None of a sweep."""
    versions: tuple[ModelVersion, ...] = ()

    @property
    def address(self) -> str | None:
        """The run's page, where a server shows it."""
        if not self.tracking_uri.startswith(("http://", "https://")):
            return None
        page = f"experiments/{self.experiment_id}/runs/{self.run_id}"
        return f"{self.tracking_uri.rstrip('/')}/#/{page}"


def log_result(
    result: Result | Report | str | os.PathLike[str],
    *,
    experiment: str | None = None,
    run_name: str | None = None,
    run_id: str | None = None,
    tracking_uri: str | None = None,
    registered_model: str | None = None,
    alias: str = ALIAS,
    upload: bool = False,
    source: str | None = None,
    nested: bool = False,
    step: int = 0,
) -> LoggedRun:
    """Log what `quantize`, `gate` or `compare` returned, or left in a folder.

    The run that the caller has open (`mlflow.start_run`, the Trainer's) is used and left open,
    unless an experiment, a server or a run is named. Else a new run is made and ended.

    Args:
        result: what was returned; or an output of `quantize`, or the reports of `gate` or
            `compare`, of any age.
        experiment: made where it does not exist; None: MLFLOW_EXPERIMENT_NAME, or `quantkit`.
        run_name: by default the model and the scheme.
        run_id: a run that exists and is gone on with.
        tracking_uri: by default as the client reads MLFLOW_TRACKING_URI.
        registered_model: name of a registered model, which is made where it does not exist. It gets
            a version for each artifact when the verdict is PASS, and none on any other verdict.
        alias: see `Registration`.
        upload: see `Registration`.
        source: see `Registration`.
        nested: make a run below the one that the caller has open: for several results in one run.
        step: of the metrics, for instance the step of a training.

    Raises:
        MissingPackageError: mlflow is not installed.
        InputError: there is no report; the run has other parameters already; or an artifact is not
            to be registered, since its files have changed or the server takes no folder of this
            machine.
        TrackingError: the server cannot be reached, or refuses what it is sent.
    """
    told = read_told(result)
    registration = None
    if registered_model is not None:
        registration = Registration(registered_model, alias, upload, source)
        check_registration(registration, tracking_uri)
    run = open_run(
        experiment,
        run_name=run_name or name_run(told.document),
        run_id=run_id,
        tracking_uri=tracking_uri,
        nested=nested,
    )
    return finish_run(run, told, registration, step=step)


def finish_run(
    run: OpenRun, told: Told, registration: Registration | None = None, *, step: int = 0
) -> LoggedRun:
    """Log a report to a run, end the run if it is quantkit's, and register the artifacts.

    Raises:
        InputError, TrackingError: as `log_result`.
    """
    log_told(run, told, step=step)
    end_run(run)
    versions = () if registration is None else register(run, told, registration)
    return _describe(run, str(told.document.get("verdict")), versions)


def log_sweep(
    swept: SweepResult,
    *,
    experiment: str | None = None,
    run_name: str | None = None,
    tracking_uri: str | None = None,
) -> LoggedRun:
    """Log what `sweep` returned: a run with its tables, and below it a run for each job.

    Args:
        experiment, tracking_uri: as of `log_result`.
        run_name: by default the name of the sweep's folder.

    Raises:
        MissingPackageError: mlflow is not installed.
        TrackingError: the server cannot be reached, or refuses what it is sent.
    """
    root = swept.output_root
    whole = open_run(
        experiment, run_name=run_name or root.resolve().name, tracking_uri=tracking_uri, nested=True
    )
    tags = {"quantkit.choice": "\n".join(swept.choices.values())} if swept.choices else {}
    tables = [root / name for name in ("sweep.md", "sweep.json")]
    log_files(whole, tags, [table for table in tables if table.is_file()])
    for outcome in swept.outcomes:
        if outcome.state == "waiting":
            continue
        run = open_child(whole, outcome.job.name)
        if outcome.evidence is None:
            fail_run(run, QuantkitError(outcome.error or f"exit code {outcome.exit_code}"))
            continue
        log_told(run, read_told(outcome.job.output))
        end_run(run)
    end_run(whole)
    return _describe(whole)


def _describe(
    run: OpenRun, verdict: str | None = None, versions: tuple[ModelVersion, ...] = ()
) -> LoggedRun:
    uri = plain_uri(run.tracking_uri)
    return LoggedRun(run.run_id, run.experiment_id, uri, verdict, versions)


def name_run(document: Mapping[str, Any]) -> str:
    """The last part of the model's name, and the schemes."""
    model = str(document.get("model")).rstrip("/").rpartition("/")[2]
    schemes = dict.fromkeys(str(row["scheme"]) for row in document.get("artifacts") or ())
    return " ".join([model, *schemes])[:250]
