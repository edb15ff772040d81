"""`quantkit.sweep`: the whole of it as one readable function."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantkit import tracing
from quantkit.calibration.compute import choose_device
from quantkit.errors import InputError
from quantkit.ranks import read_ranks
from quantkit.recipe import Overrides, read_overrides
from quantkit.records import Event, Progress
from quantkit.report.rounding import format_bytes, format_seconds, format_significant
from quantkit.running import alone_in, silent
from quantkit.sweeping.checking import check_jobs
from quantkit.sweeping.finished import is_unfinished
from quantkit.sweeping.jobs import JobOptions, make_jobs
from quantkit.sweeping.loop import SWEEP, Start, run_jobs
from quantkit.sweeping.on_ray import RayJob, check_nodes, joined, load_ray
from quantkit.sweeping.outcomes import read_outcome
from quantkit.sweeping.processes import LocalJob, job_environment, list_gpus
from quantkit.sweeping.records import Ended, JobOutcome, Running, SweepJob, SweepResult
from quantkit.sweeping.summary import summarize


@tracing.job("sweep")
def sweep(
    recipes: Sequence[str | os.PathLike[str]],
    *,
    models: Sequence[str | os.PathLike[str]] = (),
    output_root: str | os.PathLike[str] = "sweep",
    overrides: Overrides = (),
    processes: int | None = None,
    ray: str | None = None,
    cpus: int | None = None,
    gpus: float | None = None,
    device: str = "auto",
    overwrite: bool = False,
    gate: bool = True,
    fail_fast: bool = False,
    progress: Progress | None = None,
) -> SweepResult:
    """Do the job of `quantize` for each recipe with each model, and set the results side by side.

    Each job is a process of its own, so that one that dies takes no other with it. Outputs are
    `<output_root>/<model>-<recipe>`. A sweep that is run again keeps the outputs that are finished
    and the same, and goes on with the others.

    Args:
        recipes: files, or names of shipped recipes.
        models: replace the recipes' models; each recipe is run with each of them.
        output_root: folder of the outputs, the logs and the tables.
        overrides: `KEY=VALUE` pairs for all recipes.
        processes: how many jobs run at once, by default one; with Ray as many as it has room for.
        ray: address of a cluster as `ray.init` takes it, or `local`; None: processes of this
            machine.
        cpus: cores that each job asks Ray for.
        gpus: GPUs that each job asks Ray for.
        device: `auto`, `cpu` or `cuda`.
        overwrite: replace outputs, and unfinished jobs, that differ from what would be made.
        gate: judge the artifacts.
        fail_fast: start no further job after one that did not pass.
        progress: called at the start and the end of each job, in stage `sweep`, and while it runs,
            in a stage by its name.

    Raises:
        PlanError: something that was given cannot be used; every problem of every recipe.
        InputError: numbers, the device or the cluster cannot be used, or torchrun started this.
        ResourceError: the disk is too small.
        MissingPackageError: Ray was asked for and is not installed.
    """
    place = _Place(processes, ray, cpus, gpus, device)
    _check_place(place)
    root, tell = Path(output_root), progress or silent
    options = JobOptions(read_overrides(overrides), device, overwrite, gate)
    jobs = make_jobs(recipes, models, root, options)
    with alone_in(root, tell):
        return _run(jobs, root, place, options, tell, fail_fast=fail_fast)


def _run(
    jobs: Sequence[SweepJob],
    root: Path,
    place: _Place,
    options: JobOptions,
    tell: Progress,
    *,
    fail_fast: bool,
) -> SweepResult:
    """Do what is to be done of the jobs, while no other sweep writes in the root."""
    kept = check_jobs(jobs, options)
    outcomes = {
        job.name: read_outcome(job, None) if job.name in kept else JobOutcome(job, "waiting")
        for job in jobs
    }

    def say(job: SweepJob, words: str) -> None:
        done = sum(outcome.state != "waiting" for outcome in outcomes.values())
        tell(Event(SWEEP, done, len(jobs), f"{job.name}: {words}"))

    for name in sorted(kept):
        say(outcomes[name].job, _describe(outcomes[name]))
    todo = [job for job in jobs if job.name not in kept]
    resumed = {job.name for job in todo if is_unfinished(job)}

    def take(job: SweepJob, found: Ended) -> bool:
        outcome = read_outcome(job, found, resumed=job.name in resumed)
        outcomes[job.name] = outcome
        # Now and not at the end alone, so that a sweep that is killed has told what it knew.
        summarize(list(outcomes.values()), root, finished=False)
        say(job, _describe(outcome))
        return not (fail_fast and outcome.exit_code)

    if todo:
        with _starting(todo, root, place) as (start, slots):

            def begin(job: SweepJob, slot: int) -> Running:
                new = "started" if place.ray is None else "handed to Ray"
                say(job, "goes on from an earlier run" if job.name in resumed else new)
                return start(job, slot)

            run_jobs(todo, begin, slots, take, tell)
    return summarize(list(outcomes.values()), root)


@dataclass(frozen=True)
class _Place:
    """Where the jobs run; the fields are parameters of `sweep`."""

    processes: int | None
    ray: str | None
    cpus: int | None
    gpus: float | None
    device: str


def _check_place(place: _Place) -> None:
    """Refuse what makes no sense, or goes with something else, or is not there.

    Raises:
        InputError, MissingPackageError: one of them.
    """
    if read_ranks().size > 1:
        raise InputError("a sweep starts its jobs itself: start it without torchrun")
    if place.processes is not None and place.processes < 1:
        raise InputError(f"--processes {place.processes}: at least one job has to run at once")
    if place.ray is None and (place.cpus is not None or place.gpus is not None):
        raise InputError("--cpus and --gpus are what each job asks Ray for: they go with --ray")
    if (place.cpus is not None and place.cpus < 1) or (place.gpus is not None and place.gpus < 0):
        raise InputError("--cpus is at least 1, and --gpus at least 0")
    if place.ray is not None:
        load_ray(place.ray)
    else:
        choose_device(place.device)


@contextmanager
def _starting(jobs: Sequence[SweepJob], root: Path, place: _Place) -> Iterator[tuple[Start, int]]:
    """Yield what starts a job, and how many may run at once.

    Raises:
        InputError: as `joined` and `check_nodes`.
    """
    if place.ray is not None:
        with joined(place.ray, place.cpus, place.gpus, place.device) as cluster:
            check_nodes(cluster, jobs, root)
            yield lambda job, _: RayJob(cluster, job), place.processes or len(jobs)
        return
    slots = min(place.processes or 1, len(jobs))
    visible = list_gpus(os.environ) if slots > 1 and place.device != "cpu" else ()

    def start(job: SweepJob, slot: int) -> Running:
        environment = {**os.environ, **tracing.child_environment()}
        return LocalJob(job, job_environment(environment, slot, slots, visible))

    yield start, slots


def _describe(outcome: JobOutcome) -> str:
    """What became of a job, in one line."""
    if outcome.verdict is None:
        return f"failed with exit code {outcome.exit_code}, see {outcome.job.log}: {outcome.error}"
    words: list[str] = [outcome.verdict]
    for artifact in outcome.artifacts:
        words.append(format_bytes(artifact.size_bytes))
        if artifact.judgement.kl is not None:
            words.append(f"KL {format_significant(artifact.judgement.kl.value)}")
    if outcome.state == "kept":
        words.append("finished before and kept")
    elif outcome.seconds is not None:
        words.append(f"in {format_seconds(outcome.seconds)}")
    return ", ".join(words)
