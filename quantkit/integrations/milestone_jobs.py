"""The jobs of a training: rehearsed before it, and done one after the other while it waits."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from quantkit.errors import InputError, QuantkitError, RecipeError, nearest, writing
from quantkit.inputs import LoadedRecipe, RecipeLike, load
from quantkit.integrations.alone import job_environment, read_refusal, run_alone
from quantkit.integrations.milestones import (
    Milestone,
    Standard,
    describe_artifacts,
    keep_best,
    name_step,
    read_milestones,
    record,
    remove_stale,
    remove_unfinished,
)
from quantkit.live import saved
from quantkit.masking import masked_logs
from quantkit.recipe import Overrides, Recipe, find_recipe, read_overrides
from quantkit.running import alone_in
from quantkit.staging import check_output
from quantkit.sweeping.outcomes import read_outcome
from quantkit.sweeping.records import JobOutcome, SweepJob

logger = logging.getLogger(__name__)

_DEVICES = ("auto", "cpu", "cuda")
_STANDARDS: tuple[Standard, ...] = ("kl", "perplexity")


@dataclass(frozen=True)
class MilestoneJobs:
    """What all jobs of a training have in common."""

    recipe: RecipeLike
    root: Path
    """Absolute: a training may change the working folder."""
    count: int | None
    """How many outputs stay; None: all."""
    best_by: Standard
    overrides: tuple[str, ...]
    device: str
    gpu: str | None
    overwrite: bool

    def begin(self, model: object, tokenizer: object, begun: int) -> tuple[Milestone, ...]:
        """Rehearse the job on the model as it is; return what earlier runs have left.

        Args:
            begun: steps that the training has behind it.

        Raises:
            InputError, ResourceError: something would stop the job.
        """
        with alone_in(self.root):
            return self._rehearse(model, tokenizer, begun)

    def _rehearse(self, model: object, tokenizer: object, begun: int) -> tuple[Milestone, ...]:
        """As `begin`, while no other training writes in the root."""
        found = read_milestones(self.root, begun, overwrite=self.overwrite)
        there = [path for path in self.root.glob("step-*") if path.is_dir() and begun == 0]
        for path in there:
            check_output(path, overwrite=True)
        remove_stale(self.root)
        output, log = self.root / "rehearsal", self.root / "rehearsal.log"
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            log.unlink(missing_ok=True)
        with saved(model, tokenizer, output) as folder:
            words = [self._recipe(), str(folder), str(output), self.overrides, self.device]
            ended = run_alone(
                "quantkit.integrations.rehearsal",
                [json.dumps(words)],
                log,
                job_environment(os.environ, self.gpu),
            )
        refusal = read_refusal(ended, log)
        if refusal is not None:
            raise refusal
        log.unlink(missing_ok=True)
        for path in there:
            shutil.rmtree(path, ignore_errors=True)
        return tuple(found)

    def attempt(
        self,
        model: object,
        tokenizer: object,
        step: int,
        checkpoint: Path | None,
        before: Sequence[Milestone],
    ) -> tuple[Milestone, ...]:
        """Do the job of one step; return all milestones, with what is kept of them.

        It raises nothing that has to do with the job: what went wrong is in the milestone.

        Args:
            checkpoint: where the model is already; None: it is written.
        """
        started = time.monotonic()
        try:
            with alone_in(self.root):
                return self._attempt(model, tokenizer, step, checkpoint, before)
        except QuantkitError as error:
            # Another training writes there: nothing there is touched.
            return (*before, _failed(step, str(error), time.monotonic() - started))

    def _attempt(
        self,
        model: object,
        tokenizer: object,
        step: int,
        checkpoint: Path | None,
        before: Sequence[Milestone],
    ) -> tuple[Milestone, ...]:
        """As `attempt`, while no other training writes in the root."""
        started = time.monotonic()
        try:
            with self._checkpoint(model, tokenizer, step, checkpoint) as folder:
                outcome = self._run(step, folder)
            if outcome.verdict is None:
                raise QuantkitError(f"{outcome.error} (see {outcome.job.log})")
            seconds = time.monotonic() - started
            figures = describe_artifacts(outcome.artifacts, outcome.verdict, seconds)
            done = Milestone(step, outcome.verdict, figures)
            return tuple(keep_best(self.root, [*before, done], self.best_by, self.count))
        # Nothing of a job ends a training, be it a defect of quantkit or of a library.
        except Exception as error:
            seconds = time.monotonic() - started
            return self._give_up(step, error, seconds, before)

    def _give_up(
        self, step: int, error: Exception, seconds: float, before: Sequence[Milestone]
    ) -> tuple[Milestone, ...]:
        """Clear away what a job that failed has left, and note why it did."""
        remove_unfinished(self.root, step)
        words = str(error)
        if not isinstance(error, QuantkitError):
            words = f"{type(error).__name__}: {error}"
            with masked_logs():
                logger.warning("quantkit: at step %d:", step, exc_info=error)
        found = (*before, _failed(step, words, seconds))
        # Where the disk is full, the log of the training alone has it.
        with suppress(Exception):
            record(self.root, found, self.best_by)
        return found

    @contextmanager
    def _checkpoint(
        self, model: object, tokenizer: object, step: int, there: Path | None
    ) -> Iterator[Path]:
        """Yield the folder of the checkpoint; one that is written here is removed afterwards."""
        if there is not None:
            yield there.absolute()
            return
        with saved(model, tokenizer, self.root / name_step(step)) as folder:
            yield folder

    def _run(self, step: int, folder: Path) -> JobOutcome:
        """Quantize and judge the checkpoint in `folder`."""
        recipe, output = self._recipe(), self.root / name_step(step)
        words = ["quantize", "--recipe", recipe, "--model", str(folder), "--output", str(output)]
        words += ["--device", self.device, "--overwrite", "--json"]
        words += [word for pair in self.overrides for word in ("--set", pair)]
        log = self.root / f"{output.name}.log"
        ended = run_alone("quantkit", words, log, job_environment(os.environ, self.gpu))
        loaded = load(recipe, folder, output, self.overrides)
        return read_outcome(SweepJob(output.name, recipe, loaded, tuple(words), log), ended)

    def _recipe(self) -> str:
        """Return the path of the recipe; a `Recipe` is written down first."""
        if not isinstance(self.recipe, Recipe):
            return str(find_recipe(self.recipe).absolute())
        path = self.root / "recipe.yaml"
        with writing(path):
            self.root.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False))
        return str(path)


def _failed(step: int, words: str, seconds: float) -> Milestone:
    """The milestone of a job that came to nothing."""
    figures = {"passed": 0.0, "failed": 1.0, "seconds": seconds}
    return Milestone(step, None, figures, words, kept=False)


def make_jobs(
    recipe: RecipeLike,
    output: Path,
    *,
    count: int | None,
    best_by: Standard,
    overrides: Overrides,
    device: str,
    gpu: str | None,
    overwrite: bool,
) -> MilestoneJobs:
    """Check what can be checked without a model.

    Raises:
        RecipeError: the recipe cannot be used, or has no gate.
        InputError: another setting cannot be used.
    """
    pairs = read_overrides(overrides)
    for pair in pairs:
        if pair.partition("=")[0].strip() in ("output", "model"):
            raise InputError(f"overrides {pair!r}: model and output are those of the training")
    loaded: LoadedRecipe = load(recipe, "model", output, pairs)
    if loaded.recipe.gate is None:
        raise RecipeError("the recipe has no gate, which measures what is logged: write `gate:`")
    if loaded.recipe.publish is not None:
        raise RecipeError(
            "publish: a training does not publish its milestones; leave it out (in a recipe from a "
            "file: overrides=['publish=null']), and `quantkit publish` the one of your choice"
        )
    for name, value, known in (("device", device, _DEVICES), ("best_by", best_by, _STANDARDS)):
        if value not in known:
            raise InputError(
                f"{name} {value!r} is unknown{nearest(value, known)} (known: {', '.join(known)})"
            )
    return MilestoneJobs(recipe, output.absolute(), count, best_by, pairs, device, gpu, overwrite)
