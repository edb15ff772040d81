"""What the checkpoints' headers refuse before any job of a sweep, and what is finished already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantkit.checkpoint.reader import Checkpoint, hash_files, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.encoder_pipeline import plan_encoder
from quantkit.encoders.architectures import is_encoder
from quantkit.errors import OutputError, QuantkitError, ResourceError
from quantkit.job import plan_work
from quantkit.sweeping.finished import find_changes, is_there
from quantkit.sweeping.jobs import JobOptions, refuse, tell_problems
from quantkit.sweeping.records import SweepJob


def check_jobs(jobs: Sequence[SweepJob], options: JobOptions) -> frozenset[str]:
    """Plan each job that is to be done; return the names of those that are done already.

    Of a model on the Hub this brings the files, once for all jobs.

    Raises:
        PlanError, ResourceError: every problem, with the name of the job that has it.
    """
    problems: list[str] = []
    lacking: list[str] = []
    kept: set[str] = set()
    opened: dict[str, Checkpoint] = {}
    hashes: dict[str, Mapping[str, str]] = {}
    for job in jobs:
        try:
            if job.model not in opened:
                opened[job.model] = open_checkpoint(resolve_source(job.model))
            checkpoint = opened[job.model]
            if is_there(job):
                if job.model not in hashes:
                    hashes[job.model] = hash_files(checkpoint)
                if _is_same(job, hashes[job.model], options):
                    kept.add(job.name)
                    continue
            _plan(job, checkpoint, options)
        except ResourceError as error:
            lacking += tell_problems(job.name, error)
        except QuantkitError as error:
            problems += tell_problems(job.name, error)
    refuse([*problems, *lacking], resources=not problems)
    return frozenset(kept)


def _is_same(job: SweepJob, model_files: Mapping[str, str], options: JobOptions) -> bool:
    """Whether a finished output is what the job would make.

    Raises:
        OutputError: it is not, and must not be replaced.
    """
    changes = find_changes(job, model_files, gate=options.gate)
    if changes and not options.overwrite:
        raise OutputError(
            f"output {job.output} exists and differs in {', '.join(changes)}: pass --overwrite, "
            f"or choose another --output-root"
        )
    return not changes


def _plan(job: SweepJob, checkpoint: Checkpoint, options: JobOptions) -> None:
    """Refuse what `quantkit.plan` refuses, without measuring this machine for each job.

    Raises:
        InputError, ResourceError: as `quantkit.plan`.
    """
    if is_encoder(checkpoint.config):
        plan_encoder(job.loaded, checkpoint)
    else:
        plan_work(job.loaded.recipe, checkpoint, gate=options.gate)
