"""A callback for transformers' Trainer: quantize and judge checkpoints while a model is trained."""

from __future__ import annotations

import inspect
import logging
import os
import random
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from quantkit.errors import InputError, QuantkitError
from quantkit.inputs import RecipeLike
from quantkit.integrations.meeting import Meeting
from quantkit.integrations.milestone_jobs import MilestoneJobs, make_jobs
from quantkit.integrations.milestones import BEST, RECORD, Milestone, Standard, find_best
from quantkit.live import take_live
from quantkit.recipe import Overrides

logger = logging.getLogger(__name__)


class QuantizeCallback(TrainerCallback):
    """Quantizes checkpoints of a training by a recipe, judges them, and logs what came of it.

        trainer = Trainer(..., callbacks=[QuantizeCallback("awq4", output="out/awq4")])

    At the chosen steps the model is written beside the output, quantized by a process of its own,
    and compared by the recipe's gate with what was written. The figures go where the Trainer's own
    go. The training waits meanwhile and goes on as if nothing had been: weights, optimizer,
    schedule, data order and random numbers are untouched. Of several processes the first does it,
    and the others wait.

    A job that fails (no room on the disk, a worker that died) is a warning and a figure. What
    cannot work at all is refused before the first step: the job is rehearsed on the model as it is
    then, up to where its work would begin.

    Args:
        recipe: a file, the name of a shipped one, or a `Recipe`; it has a gate.
        output: folder for all that is written: `step-20/` as `quantize` writes it, `step-20.log`,
            `best` (a link to the best step that passed) and `training.json`.
        every_steps: quantize after each so many steps of the optimizer.
        steps: quantize after these steps.
        on_save: quantize whenever the Trainer saves a checkpoint.
        at_end: quantize what the training ends with, or the best checkpoint where the Trainer loads
            that at the end.
        keep: how many of the outputs stay, the best ones; `best` is 1.
        best_by: what is better among those with the same verdict: `kl` (closer to its own
            checkpoint) or `perplexity` (of the quantized model on the gate's text); less is better.
        overrides: `KEY=VALUE` pairs as of `--set`; only for recipes from files.
        device: of the jobs: `auto`, `cpu` or `cuda`.
        gpu: CUDA_VISIBLE_DEVICES of the jobs; None: as the training has it, so that the jobs share
            the first GPU with it.
        overwrite: remove what another training has left in `output`.
        raise_on_error: let a job that fails end the training. A FAIL of the gate is no error.
        log_prefix: what the names of the figures begin with.

    Raises:
        InputError: something that was given cannot be used; the rest when the training begins.
    """

    def __init__(
        self,
        recipe: RecipeLike,
        *,
        output: str | os.PathLike[str],
        every_steps: int | None = None,
        steps: Sequence[int] = (),
        on_save: bool = False,
        at_end: bool = True,
        keep: int | Literal["best", "all"] = "best",
        best_by: Standard = "kl",
        overrides: Overrides = (),
        device: str = "auto",
        gpu: str | None = None,
        overwrite: bool = False,
        raise_on_error: bool = False,
        log_prefix: str = "quantkit/",
    ) -> None:
        _check_schedule(every_steps, steps, on_save or at_end)
        self._every, self._steps = every_steps, frozenset(steps)
        self._on_save, self._at_end = on_save, at_end
        self._jobs: MilestoneJobs = make_jobs(
            recipe,
            Path(output),
            count=_read_keep(keep),
            best_by=best_by,
            overrides=overrides,
            device=device,
            gpu=gpu,
            overwrite=overwrite,
        )
        self._raises, self._prefix = raise_on_error, log_prefix
        self._milestones: tuple[Milestone, ...] = ()
        self._meeting: Meeting | None = None
        # Weak: the Trainer holds this callback, and is large.
        self._trainer: weakref.ref[Any] | None = None

    @property
    def milestones(self) -> tuple[Milestone, ...]:
        """What was quantized so far, in the order of the steps; the same in every process."""
        return self._milestones

    @property
    def best(self) -> Path | None:
        """The folder of the best step that passed; None where none did."""
        best = find_best(self._milestones, self._jobs.best_by)
        return None if best is None else self._jobs.root / best.name

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Refuse what cannot work, before the first step.

        Raises:
            InputError, ResourceError: every process has the first one's.
        """
        trainer = _find_trainer()
        _refuse_training(trainer, state)
        self._trainer, self._meeting = weakref.ref(trainer), Meeting()
        error, found = None, None
        if self._meeting.leads:
            try:
                with _same_random_numbers():
                    model, tokenizer = trainer.model, _find_tokenizer(trainer)
                    found = self._jobs.begin(model, tokenizer, state.global_step)
            # Also a defect, of which the others would not hear otherwise.
            except Exception as caught:
                error = caught
        told, found = self._meeting.share((None if error is None else str(error), found))
        if told is not None:
            self._leave()
            raise error or InputError(told)
        self._milestones = found or ()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Quantize where the step is one of those that were asked for."""
        step = state.global_step
        if step in self._steps or (self._every is not None and step % self._every == 0):
            self._quantize(step)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Quantize what the Trainer has saved."""
        if self._on_save:
            self._quantize(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Quantize at the end, which the Trainer's last figures tell of.

        Loggers close what they write to at `on_train_end`, before this callback hears of it.
        """
        last = state.log_history[-1] if state.log_history else {}
        if self._at_end and {"train_loss", "total_flos"} <= last.keys():
            self._finish(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Quantize what the training ended with, if that is still to be done, and part."""
        if self._at_end:
            self._finish(args, state)
        self._leave()

    def _leave(self) -> None:
        if self._meeting is not None:
            self._meeting.leave()
        self._meeting = self._trainer = None

    def _finish(self, args: Any, state: Any) -> None:
        """Quantize what the training leaves."""
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is None:
            self._quantize(state.global_step)
        else:
            # The Trainer loads it after its last figures.
            self._quantize(state.best_global_step or state.global_step, Path(best))

    def _quantize(self, step: int, checkpoint: Path | None = None) -> None:
        """Do the job of one step, unless it is done.

        Args:
            checkpoint: where the model is already; None: it is the one in memory.

        Raises:
            QuantkitError: the job failed, and that was to be an error.
        """
        trainer = None if self._trainer is None else self._trainer()
        if self._meeting is None or trainer is None:
            return
        if any(milestone.step == step for milestone in self._milestones):
            return
        with _same_random_numbers():
            self._do(trainer, self._meeting, step, checkpoint)

    def _do(self, trainer: Any, meeting: Meeting, step: int, checkpoint: Path | None) -> None:
        """As `_quantize`, for a step that is not done."""
        found = self._milestones
        if meeting.leads:
            _free_memory(self._jobs)
            model, tokenizer = trainer.model, _find_tokenizer(trainer)
            found = self._jobs.attempt(model, tokenizer, step, checkpoint, self._milestones)
        # The others wait here.
        self._milestones = found = meeting.share(found)
        (milestone,) = (each for each in found if each.step == step)
        if meeting.leads:
            _tell(milestone, self._jobs.root)
        figures = {f"{self._prefix}{name}": value for name, value in milestone.figures.items()}
        _write_log(trainer, figures)
        if milestone.error is not None and self._raises:
            raise QuantkitError(f"step {step} could not be quantized: {milestone.error}")


def _check_schedule(every: int | None, steps: Sequence[int], otherwise: bool) -> None:
    given: object = steps
    if not isinstance(given, list | tuple | set | frozenset | range):
        raise InputError(f"steps is {steps!r}: write a list, steps=[100, 1000]")
    for name, value in [("every_steps", every), *(("steps", step) for step in steps)]:
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name} is {value!r}: steps are whole numbers from 1")
    if every is None and not steps and not otherwise:
        raise InputError(
            "there is nothing to do: pass every_steps, steps, on_save=True or at_end=True"
        )


def _read_keep(keep: int | str) -> int | None:
    """Return how many outputs stay; None: all of them."""
    known = {"best": 1, "all": None}
    if isinstance(keep, str) and keep in known:
        return known[keep]
    if not isinstance(keep, int) or keep < 1:
        raise InputError(f"keep is {keep!r}: pass best, all, or how many of the best")
    return keep


def _find_trainer() -> Any:
    """Return the Trainer whose event this is.

    It gives its callbacks the model, the optimizer and much else, and not itself; its own reporting
    callbacks are reached through it alone. So it is looked for among the callers.

    Raises:
        InputError: something else has called.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    raise InputError("QuantizeCallback belongs to a Trainer of transformers: none has called it")


def _find_tokenizer(trainer: Any) -> Any:
    """Return what the Trainer would save as the tokenizer; None where it has none."""
    if trainer.processing_class is not None:
        return trainer.processing_class
    return getattr(trainer.data_collator, "tokenizer", None)


def _refuse_training(trainer: Any, state: Any) -> None:
    """Refuse a training whose model is not one that can be written; alike in every process.

    Raises:
        InputError: it is not.
    """
    if state.is_hyper_param_search:
        raise InputError(
            "a search for hyperparameters trains many models, and the callback's output is for "
            "one: quantize the best of them afterwards"
        )
    model = trainer.model
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            "the model has adapters (PEFT), and quantizing it while it is trained would merge "
            "them: train without the callback, call model.merge_and_unload(), and pass the result "
            "to quantkit.quantize(model=..., tokenizer=...)"
        )
    if trainer.is_fsdp_enabled:
        raise InputError(
            "the model is in parts (FSDP): train without the callback, and quantize the "
            "checkpoints that the Trainer saves with FULL_STATE_DICT"
        )
    if _find_tokenizer(trainer) is None:
        raise InputError(
            "the Trainer has no tokenizer, by which the gate reads its text: pass "
            "processing_class=tokenizer to it"
        )
    take_live(trainer.model, _find_tokenizer(trainer))


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Let what is drawn in between, by loggers for instance, not be missing afterwards."""
    ours, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(of_numpy)


def _free_memory(jobs: MilestoneJobs) -> None:
    """Hand back what the GPU's allocator keeps and nobody uses, where a job needs the same GPU.

    Tensors stay where they are.
    """
    if jobs.device != "cpu" and jobs.gpu is None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _write_log(trainer: Any, figures: dict[str, float]) -> None:
    """Log figures as the Trainer does, to its history and to whatever it reports to.

    Not by the `log` of a subclass: those of TRL add the means of what they have gathered, and begin
    to gather anew. After a step, what the Trainer was about to log comes later as well.
    """
    wanted = trainer.control.should_log
    try:
        Trainer.log(trainer, figures)
    except Exception as error:
        logger.warning("quantkit: the figures could not be logged: %s", error)
    finally:
        trainer.control.should_log = wanted


def _tell(milestone: Milestone, root: Path) -> None:
    if milestone.error is not None:
        logger.warning(
            "quantkit: step %d could not be quantized, and the training goes on: %s",
            milestone.step,
            milestone.error,
        )
    elif milestone.verdict != "PASS":
        logger.warning(
            "quantkit: step %d is %s (%s)", milestone.step, milestone.verdict, root / RECORD
        )
    else:
        logger.info("quantkit: step %d is PASS (%s)", milestone.step, root / BEST)
