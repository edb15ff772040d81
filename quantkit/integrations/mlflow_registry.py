"""MLflow's model registry: versions of artifacts that have passed, under an alias."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.paths import join_inside
from quantkit.errors import CheckpointError, InputError
from quantkit.evidence import read_evidence
from quantkit.gating import check_recorded_files
from quantkit.integrations.figures import Told
from quantkit.integrations.mlflow_runs import OpenRun, answering, load_mlflow

ALIAS = "quantkit-pass"
"""Of the newest model version whose artifact has passed its gate."""


@dataclass(frozen=True)
class Registration:
    """What becomes a model version when the verdict is PASS.

    name: of the registered model. alias: moved to the new version; with several artifacts each has
    its own, `<alias>-<artifact>`. upload: copy the artifact's files to the server, so that whoever
    loads the version finds them there; without, its source is the folder or the file where it is.
    source: address where the artifact has been put, for instance by `quantkit publish`.
    """

    name: str
    alias: str = ALIAS
    upload: bool = False
    source: str | None = None


@dataclass(frozen=True)
class ModelVersion:
    """An artifact in the model registry."""

    name: str
    version: str
    alias: str
    source: str


def check_registration(registration: Registration, tracking_uri: str | None = None) -> None:
    """Refuse what a registry would refuse at the end of a job.

    Raises:
        MissingPackageError: mlflow is not installed.
        InputError: the alias cannot be one; or the server takes no folder of this machine.
    """
    alias = registration.alias
    if not re.fullmatch(r"[\w-]+", alias) or re.fullmatch(r"(?i)latest|v\d+", alias):
        raise InputError(
            f"{alias!r} cannot be an alias in MLflow: use letters, digits, _ and -, and neither "
            f"`latest` nor the number of a version"
        )
    mlflow = load_mlflow()
    registry = os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri or mlflow.get_registry_uri()
    elsewhere = registration.upload or registration.source is not None
    if registry.startswith(("http://", "https://")) and not elsewhere:
        raise InputError(
            "an MLflow server takes no model version that lies in a folder of this machine: upload "
            "it (upload=True, --mlflow-upload), or say where it was published (source=...)"
        )


def register(run: OpenRun, told: Told, wanted: Registration) -> tuple[ModelVersion, ...]:
    """Make a model version of each artifact of a report; of none unless its verdict is PASS.

    Raises:
        InputError: a file is not as its evidence says, or is gone; or the artifacts compete.
        TrackingError: the registry cannot be reached, or refuses.
    """
    if told.document.get("verdict") != "PASS":
        return ()
    _check_artifacts(told)
    with answering(run.tracking_uri):
        return tuple(_register(run, told, wanted))


def _check_artifacts(told: Told) -> None:
    """Refuse to register what has changed since it passed.

    Raises:
        InputError: a file is not as its evidence says, or is gone; or the artifacts compete.
    """
    if told.document.get("comparison"):
        raise InputError("a comparison is not registered: log the output of the artifact to take")
    for row in told.document["artifacts"]:
        location = _place(told, row)
        folder, name = (location, None) if location.is_dir() else (location.parent, location.name)
        changed = check_recorded_files(read_evidence(folder), folder, name)
        if changed or not location.exists():
            reason = changed[0] if changed else "it is gone"
            raise InputError(
                f"{location} is not registered, since it is no longer what has passed: {reason}"
            )


def _register(run: OpenRun, told: Told, wanted: Registration) -> Iterator[ModelVersion]:
    """Make a version of each artifact, and move the alias to it."""
    from mlflow.exceptions import MlflowException

    client, rows = run.client, told.document["artifacts"]
    try:
        client.create_registered_model(wanted.name)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise
    for row in rows:
        source = wanted.source or str(_place(told, row).resolve())
        if wanted.upload:
            source = _upload(run, _place(told, row), row, len(rows))
        tags = {
            "quantkit.verdict": row["verdict"],
            "quantkit.format": row["format"],
            "quantkit.scheme": row["scheme"],
            "quantkit.artifact": row["name"],
        }
        alias = wanted.alias
        if len(rows) > 1:
            alias += "-" + re.sub(r"[^\w-]+", "-", row["name"], flags=re.ASCII)
        made = client.create_model_version(wanted.name, source, run.run_id, tags=tags)
        client.set_registered_model_alias(wanted.name, alias, made.version)
        yield ModelVersion(wanted.name, str(made.version), alias, source)


def _place(told: Told, row: Mapping[str, Any]) -> Path:
    """Return where an artifact lies: within its output, or where a gate was told to look.

    Raises:
        InputError: the report of an output names another place.
    """
    if told.root == Path():
        return Path(row["path"])
    try:
        # A dot is an output that is an artifact itself.
        return told.root if row["path"] == "." else join_inside(told.root, row["path"])
    except CheckpointError as error:
        raise InputError(f"nothing is registered: {error}") from None


def _upload(run: OpenRun, location: Path, row: Mapping[str, Any], count: int) -> str:
    """Copy an artifact to the run's own store and return its address there."""
    name = "model" if count == 1 else "model/" + re.sub(r"[^\w.-]+", "-", row["name"])
    if location.is_dir():
        run.client.log_artifacts(run.run_id, str(location), name)
    else:
        run.client.log_artifact(run.run_id, str(location), name)
    return f"{run.artifact_uri.rstrip('/')}/{name}"
