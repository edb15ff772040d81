"""The options of commands that log what they found to MLflow, and what is said about it."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.console import Reply, write
from quantkit.errors import InputError, QuantkitError, TrackingError

if TYPE_CHECKING:
    from quantkit.integrations.mlflow import LoggedRun, OpenRun, Registration

MlflowOption = Annotated[
    str | None,
    typer.Option("--mlflow", metavar="EXPERIMENT", help="Log a run to MLflow."),
]
MlflowModelOption = Annotated[
    str | None,
    typer.Option(
        "--mlflow-model",
        metavar="NAME",
        help="On PASS, register a version of this model there.",
    ),
]
MlflowUploadOption = Annotated[
    bool | None,
    typer.Option("--mlflow-upload", help="Copy the registered artifacts to MLflow's own store."),
]


@dataclass(frozen=True)
class TrackingOptions:
    """What the command line asks MLflow for."""

    experiment: str | None
    model: str | None = None
    upload: bool = False
    source: str | None = None

    @property
    def words(self) -> list[str]:
        """The options that say the same."""
        words = ["--mlflow", self.experiment or ""]
        words += [] if self.model is None else ["--mlflow-model", self.model]
        words += ["--mlflow-upload"] * self.upload
        return words + ([] if self.source is None else ["--source", self.source])

    def registration(self) -> Registration | None:
        """What becomes a model version, if anything does."""
        from quantkit.integrations.mlflow import Registration

        if self.model is None:
            return None
        return Registration(self.model, upload=self.upload, source=self.source)


Tell = Callable[[Reply, str | os.PathLike[str]], Reply]
"""(what the command says, the folder it left) -> the same, with what became of the run."""


@contextmanager
def sending(wanted: bool) -> Iterator[None]:
    """Send spans and metrics of what is done inside to OpenTelemetry, where `--otel` wants it.

    Raises:
        MissingPackageError, InputError: before the work.
    """
    if not wanted:
        yield
        return
    from quantkit.integrations.telemetry import exported

    with exported():
        yield


def name_job(*named: str | None) -> str:
    """Name a run after what the user named: the last parts of a model and a recipe."""
    return " ".join(Path(name).name.removesuffix(".yaml") for name in named if name is not None)


@contextmanager
def tracked(options: TrackingOptions, name: str, *, leads: bool = True) -> Iterator[Tell]:
    """Begin a run before the work, and let it fail with it; what is yielded logs what came of it.

    Args:
        options: without an experiment nothing is done.
        name: of the run.
        leads: whether this process is the one that logs.

    Raises:
        MissingPackageError, InputError, TrackingError: before the work.
    """
    if options.experiment is None:
        if options.model is not None or options.upload:
            raise InputError("--mlflow-model and --mlflow-upload go with --mlflow EXPERIMENT")
        yield lambda reply, folder: reply
        return
    if not leads:
        yield lambda reply, folder: reply
        return
    run = begin_run(options, name)
    try:
        yield lambda reply, folder: tell_run(reply, run, options, folder)
    except BaseException as error:
        from quantkit.integrations.mlflow import fail_run

        # The job's own error is what the user has to see.
        try:
            fail_run(run, error)
        except QuantkitError as lost:
            write(f"note: the run in MLflow was not ended: {lost}\n", sys.stderr)
        raise


def begin_run(options: TrackingOptions, name: str, run_id: str | None = None) -> OpenRun:
    """Begin a run, or take one that exists.

    Raises:
        MissingPackageError, InputError, TrackingError: it cannot be.
    """
    from quantkit.integrations.mlflow import check_registration, load_mlflow, open_run

    # The reply says where the run is; MLflow would say so on stdout, in front of it.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    load_mlflow()
    # Its stores tell on stderr of each table that they make.
    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    registration = options.registration()
    if registration is not None:
        check_registration(registration)
    return open_run(options.experiment, run_name=name, run_id=run_id)


def tell_run(
    reply: Reply, run: OpenRun, options: TrackingOptions, folder: str | os.PathLike[str]
) -> Reply:
    """Log what a command left in `folder`, and add what became of it to its reply.

    A server that fails now does not undo what is finished: the reply says how to log it later.
    """
    from quantkit.integrations.mlflow import finish_run, read_told

    try:
        logged = finish_run(run, read_told(folder), options.registration())
    except QuantkitError as error:
        later = shlex.join(
            ["quantkit", "track", os.fspath(folder), *options.words, "--run", run.run_id]
        )
        lines = [f"mlflow   not logged: {error}", f"         log it later: {later}"]
        found: dict[str, Any] = {"run_id": run.run_id, "error": str(error), "later": later}
        return _add(reply, lines, found, reply.exit_code or TrackingError.exit_code)
    lines = describe_run(logged, options.model)
    return _add(reply, lines, document_run(logged), reply.exit_code)


def describe_run(logged: LoggedRun, model: str | None) -> list[str]:
    """Lines on a run and the versions of the model that was asked for."""
    lines = [f"mlflow   run {logged.run_id} at {logged.address or logged.tracking_uri}"]
    if model is not None and not logged.versions:
        lines.append(f"         no version of {model}: the verdict is {logged.verdict}")
    for made in logged.versions:
        lines.append(f"         {made.name} version {made.version} @{made.alias}: {made.source}")
    return lines


def document_run(logged: LoggedRun) -> dict[str, Any]:
    """The same for programs."""
    return {
        "run_id": logged.run_id,
        "experiment_id": logged.experiment_id,
        "tracking_uri": logged.tracking_uri,
        "address": logged.address,
        "versions": [
            {"name": v.name, "version": v.version, "alias": v.alias, "source": v.source}
            for v in logged.versions
        ],
    }


def _add(reply: Reply, lines: list[str], found: dict[str, Any], exit_code: int) -> Reply:
    assert isinstance(reply.document, dict)
    document = {**reply.document, "exit_code": exit_code, "mlflow": found}
    return replace(reply, document=document, lines=[*reply.lines, *lines], exit_code=exit_code)
