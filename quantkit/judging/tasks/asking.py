"""Tasks of lm-eval, asked of both models in the runtime that judges (docs/gate.md, "Tasks").

lm-eval makes the questions and counts the answers; the models are asked by quantkit's own workers,
so that the artifact answers as its own runtime computes it, and both from the same token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.judging.tasks.answering import Answers, answer_requests, key_of
from quantkit.judging.tasks.files import is_file_name
from quantkit.judging.tasks.loading import (
    FEWSHOT_SEED,
    LoadedTask,
    blaming,
    build_requests,
    count_seconds,
    quietly,
)
from quantkit.judging.tasks.rehearsal import rehearse
from quantkit.judging.tasks.requests import make_reader
from quantkit.judging.tasks.scores import score_task
from quantkit.judging.worker import Pair
from quantkit.records import Event, Progress, TaskResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnsweredModel:
    """What lm-eval takes for a model: it knows the answers already."""

    answers: Answers
    rank: int = 0
    world_size: int = 1

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Answer how probable a text is behind another one."""
        return self._find("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[Any]:
        """Answer how probable a whole text is."""
        return self._find("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer how the model goes on."""
        return self._find("generate_until", requests)

    def _find(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        return [self.answers[key_of(kind, request.args)] for request in requests]


def run_tasks(
    pair: Pair,
    baseline: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
    tasks: Sequence[LoadedTask],
    *,
    confidence: float,
    folder: Path,
    positions: int | None = None,
    progress: Progress,
) -> tuple[TaskResult, ...]:
    """Ask both models the documents of each task, and compare what they score.

    Args:
        pair: both workers, loaded and idle.
        baseline: folder of the baseline, whose config files name the ends and the positions.
        tokenizer: the baseline's.
        vocabulary: tokens that both models have.
        tasks: as `load_tasks` returns them.
        confidence: of the intervals of recovery.
        folder: for files of logits, which are deleted after use.
        positions: tokens of a sequence that both runtimes take; None: they do not say.
        progress: called after each request.

    Raises:
        InputError: there is no tokenizer, a request does not fit the models or asks for sampling,
            or lm-eval fails at a task.
        WorkerError, ResourceError: as `Pair.answers`.
    """
    if not tasks:
        return ()
    reader = make_reader(baseline, tokenizer, vocabulary, positions)
    results = []
    for task in tasks:
        message = f"task {task.name}"

        def tell(done: int, total: int, message: str = message) -> None:
            progress(Event("gate", done, total, message))

        requests = build_requests(task.name, task.parts, task.spec.limit)
        answers = answer_requests(pair, reader, requests, folder, tell)
        values = [_count_bounded(task, each) for each in answers]
        documents = sorted(values[0])
        result = score_task(
            task.name,
            task.shown_metric,
            task.kind,
            ([values[0][each] for each in documents], [values[1][each] for each in documents]),
            higher_is_better=task.higher_is_better,
            limit=task.spec.min_recovery,
            confidence=confidence,
        )
        results.append(result)
    return tuple(results)


def _count_bounded(task: LoadedTask, answers: Answers) -> dict[tuple[str, int], Any]:
    """Look at the answers, at first where a filter of a task's own file can be stopped."""
    if is_file_name(task.spec.name):
        rehearse(
            f"gate.tasks: {task.spec.name}",
            lambda _: _count(task, answers),
            count_seconds(task.parts, task.spec),
        )
    return _count(task, answers)


def _count(task: LoadedTask, answers: Answers) -> dict[tuple[str, int], Any]:
    """Let lm-eval look at the answers of one model: (part, document) -> value of the metric."""
    from lm_eval.evaluator import evaluate

    with quietly(), blaming(f"lm-eval fails at task {task.name}"):
        for part in task.parts.values():
            part.set_fewshot_seed(FEWSHOT_SEED)
        found = evaluate(
            AnsweredModel(answers),
            {"tasks": dict(task.parts)},
            limit=task.spec.limit,
            bootstrap_iters=0,
            log_samples=True,
        )
        return {
            (name, sample["doc_id"]): sample[task.metric]
            for name, samples in found["samples"].items()
            for sample in samples
            if sample["filter"] == task.filter
        }
