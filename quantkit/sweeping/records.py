"""What a sweep is made of, and what became of each job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from quantkit.inputs import LoadedRecipe
from quantkit.records import ArtifactReport, Verdict

State = Literal["finished", "kept", "failed", "waiting"]
"""`kept`: an earlier run had finished it. `waiting`: it has not been started, or has not ended."""


@dataclass(frozen=True)
class SweepJob:
    """One recipe with one model."""

    name: str
    recipe: str
    """As the user named it."""
    loaded: LoadedRecipe
    """With the model, the output and the overrides of this job."""
    command: tuple[str, ...]
    """The arguments of `quantkit`."""
    log: Path

    @property
    def model(self) -> str:
        """As the user, or the recipe, named it."""
        return self.loaded.model

    @property
    def output(self) -> Path:
        """The folder that the job writes."""
        return self.loaded.output


@dataclass(frozen=True)
class Ended:
    """How a job's process ended."""

    exit_code: int
    """Negative: minus the number of the signal that killed it."""
    said: str
    """What it wrote to stdout."""
    seconds: float


class Running(Protocol):
    """A job that has been started."""

    def poll(self) -> Ended | None:
        """Return how it ended, or None while it has not."""

    def stop(self) -> None:
        """Ask it to end, so that it can go on later."""

    def kill(self) -> None:
        """End it at once."""


@dataclass(frozen=True)
class JobOutcome:
    """What became of one job."""

    job: SweepJob
    state: State
    exit_code: int | None = None
    """As of `quantkit quantize`; None while it waits."""
    error: str | None = None
    verdict: Verdict | None = None
    artifacts: tuple[ArtifactReport, ...] = ()
    seconds: float | None = None
    """Of the process that finished it; of kept ones, of the stages in its evidence."""
    peak_memory_bytes: int | None = None
    """The most that the job's own process has held, without its gate's workers."""
    resumed: bool = False
    """Whether blocks of an earlier run were there when it was started."""
    evidence: Mapping[str, object] | None = None
    """quantkit.json of a finished job."""
    baseline_bytes: int = 0

    @property
    def report(self) -> Path | None:
        """Its page, where it has one."""
        return self.job.output / "report" / "report.html" if self.evidence is not None else None


@dataclass(frozen=True)
class SweepResult:
    """What `quantkit.sweep` returns."""

    output_root: Path
    outcomes: tuple[JobOutcome, ...]
    """Of each model together: the smallest that passed first."""
    choices: Mapping[str, str]
    """Model -> a sentence on which artifact to take; models with a judged artifact alone."""
    reports: Mapping[str, Path]
    """Model -> the page that sets its artifacts side by side."""
    exit_code: int
