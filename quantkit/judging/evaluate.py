"""Run baseline and candidate over the same windows, each in a process of its own, and compare."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.errors import CheckpointError, blame_machine
from quantkit.judging.custom_checks import GateCheck, run_checks
from quantkit.judging.details import collect_details
from quantkit.judging.handles import Connection, Text, make_handle
from quantkit.judging.loading import Setup, check_ids, load_models
from quantkit.judging.partings import find_partings
from quantkit.judging.places import find_baseline_runtime
from quantkit.judging.probing.probes import LongWindows, ProbeFindings, long_windows, run_probes
from quantkit.judging.sampling import plan_looks
from quantkit.judging.scoring import (
    WindowScore,
    leaving_cores_to_workers,
    plan_batches,
    score_windows,
    select_scored,
)
from quantkit.judging.tasks.asking import run_tasks
from quantkit.judging.tasks.loading import LoadedTask
from quantkit.judging.tokens import READERS, TokenizerFindings, collect_texts, compare_tokens
from quantkit.judging.worker import (
    Pair,
    StartWorker,
    running_pair,
    worker_command,
)
from quantkit.recipe import ProbesSpec
from quantkit.records import CustomCheck, EvalResult, Event, Progress, TokenWindows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORKERS: Mapping[str, Path] = MappingProxyType(
    {
        runtime: Path(__file__).with_name("runtimes") / f"{name}_worker.py"
        for runtime, name in (
            ("transformers", "transformers"),
            ("vllm", "vllm"),
            ("llama.cpp", "llamacpp"),
            ("onnxruntime", "onnxruntime"),
        )
    }
)
"""Runtime -> the script of its worker."""


@dataclass(frozen=True)
class _Findings:
    """What was seen besides the logits of windows."""

    tokenizers: TokenizerFindings
    probes: ProbeFindings
    memory_bytes: int | None
    """The largest resident set of the candidate's worker on windows; None where it does not say."""


@dataclass(frozen=True)
class _Words:
    """The baseline's tokenizer, or why there is none."""

    tokenizer: PreTrainedTokenizerBase | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Plan:
    """Which probes to make."""

    spec: ProbesSpec
    long_ids: LongWindows


def evaluate(
    baseline: Path,
    candidate: Path,
    windows: TokenWindows,
    *,
    samples: int | None = None,
    is_undecided: Callable[[EvalResult], bool] | None = None,
    probes: ProbesSpec | None = None,
    tasks: Sequence[LoadedTask] = (),
    task_confidence: float = 0.95,
    checks: Sequence[GateCheck] = (),
    python: str | None = None,
    baseline_python: str | None = None,
    timeout_seconds: float = 3600.0,
    device: str = "auto",
    progress: Progress | None = None,
    runtime: str = "transformers",
    worker: Path | None = None,
    start_baseline: StartWorker | None = None,
) -> EvalResult:
    """Measure `candidate` against `baseline` on `windows` (docs/gate.md, "Metrics").

    Position t of a window is scored on the token at t+1, where that token's weight is not zero.
    Windows without any such token are left out. With `samples`, that many are measured at first,
    and more, by `plan_looks`, while `is_undecided`; the workers stay loaded.

    Args:
        baseline: folder of the 16-bit checkpoint.
        candidate: folder of the artifact; for llama.cpp a GGUF file and for onnxruntime an ONNX
            file, or a folder with one.
        windows: ids int64 [N, T] and weights [N, T]; domains and numbers where they have them.
        samples: windows of the first look; None: all of them.
        is_undecided: whether a result of some looks wants more windows; None: never.
        probes: limits of the probes, which are made once, after the first look; None: none.
        tasks: of lm-eval, which both models do after the last window, if all logits are finite.
        task_confidence: of the intervals of what they recover.
        checks: the user's own, which are run last, if all logits are finite.
        python: interpreter of the candidate's worker; None is this one.
        baseline_python: of the baseline's, where that is another runtime (`find_baseline_runtime`).
        timeout_seconds: how long a worker may be silent about one request.
        device: `auto`, `cpu` or `cuda`.
        progress: called after each batch of windows.
        runtime: what the candidate runs in, a key of `WORKERS`.
        worker: a script to use in place of the runtimes' own.
        start_baseline: what starts the baseline's worker; None: a process without a memory.

    Raises:
        WorkerError: a worker died, hung, answered nonsense or could not do its work.
        ResourceError: a worker ran out of memory or disk.
        ArtifactError: the two have different vocabularies.
        CheckpointError: the tokenizer of the baseline is needed, and cannot be loaded.
        CalibrationError: the windows do not fit the models, or none of their tokens counts; or
            the prompts of the probes cannot be read.
        InputError: the interpreter cannot be started or lacks a package.
    """
    started = time.perf_counter()
    commands = _worker_commands(runtime, python, baseline_python, worker)
    windows = select_scored(windows)
    count, length = windows.ids.shape
    looks = plan_looks(samples or count, count)
    tell = progress or (lambda event: None)
    tell(Event("gate", 0, looks[0], "loading the baseline and the artifact"))
    words = _find_words(baseline, required=runtime in READERS or bool(tasks))
    with (
        tempfile.TemporaryDirectory(prefix="quantkit-gate-", ignore_cleanup_errors=True) as folder,
        running_pair(*commands, timeout_seconds, start_baseline=start_baseline) as pair,
    ):
        setup = load_models(pair, baseline, candidate, device, runtime)
        vocabulary = setup.vocabulary
        check_ids(windows.ids, vocabulary)
        plan = _plan_probes(probes, windows, setup)
        scores: list[WindowScore] = []
        finite = True
        findings: _Findings | None = None
        for look in looks:
            todo = range(len(scores), look)
            batches = plan_batches(todo, length, vocabulary=vocabulary, device=setup.device)
            with leaving_cores_to_workers(setup.device):
                for scored, batch_finite in score_windows(
                    pair, windows, batches, vocabulary, Path(folder)
                ):
                    scores += scored
                    finite = finite and batch_finite
                    tell(Event("gate", len(scores), look, f"KL {_mean_kl(scores):.4g}"))
            findings = findings or _look_besides(
                pair, windows.ids[:look], words, setup, plan, Path(folder)
            )
            result = replace(
                _collect(scores, windows, findings, setup, words, finite=finite),
                looks=() if samples is None else looks,
            )
            if is_undecided is None or not is_undecided(result):
                break
        done = run_tasks(
            pair,
            baseline,
            words.tokenizer,
            vocabulary,
            tasks if finite else (),
            confidence=task_confidence,
            folder=Path(folder),
            positions=setup.positions,
            progress=tell,
        )
        own = _run_own(pair, checks if finite else (), candidate, words, setup, Path(folder), tell)
    unasked = [name for name, asked in (("tasks", tasks), ("checks of your own", checks)) if asked]
    if unasked and not finite:
        note = (
            f"the {' and the '.join(unasked)} were not asked: a model whose logits are not finite "
            "answers nothing"
        )
        result = replace(result, notes=(*result.notes, note))
    seconds = time.perf_counter() - started
    return replace(result, tasks=done, custom_checks=own, seconds=seconds)


def _run_own(
    pair: Pair,
    checks: Sequence[GateCheck],
    candidate: Path,
    words: _Words,
    setup: Setup,
    folder: Path,
    tell: Progress,
) -> tuple[CustomCheck, ...]:
    """Run the user's own checks."""
    if not checks:
        return ()
    connection = Connection(pair, folder)
    handle = make_handle(
        connection,
        Text(words.tokenizer, setup.vocabulary, setup.positions),
        artifact=candidate,
        original=setup.baseline,
        runtime=setup.runtime,
    )
    return run_checks(checks, handle, connection, tell)


def _find_words(baseline: Path, *, required: bool) -> _Words:
    """Return the baseline's tokenizer, or a note where it is only for showing text."""
    try:
        return _Words(load_tokenizer(baseline))
    except CheckpointError as error:
        if required:
            raise
        blame_machine(error)
        return _Words(None, (f"no text of windows and continuations is shown: {error}",))


def _plan_probes(probes: ProbesSpec | None, windows: TokenWindows, setup: Setup) -> _Plan | None:
    if probes is None:
        return None
    return _Plan(probes, long_windows(windows, probes, setup.baseline, setup.positions))


def _look_besides(
    pair: Pair, ids: np.ndarray, words: _Words, setup: Setup, plan: _Plan | None, folder: Path
) -> _Findings:
    """Look at what is no logit of the windows: memory, how text is read, how the models behave."""
    # Before the probes, whose long windows take more.
    memory = _ask_memory(pair)
    tokenizers = _compare_tokenizers(pair, words.tokenizer, setup)
    if plan is None:
        return _Findings(tokenizers, ProbeFindings((), (), ()), memory)
    probes = run_probes(
        pair,
        words.tokenizer,
        ids,
        plan.long_ids,
        setup.vocabulary,
        plan.spec,
        folder,
        baseline=setup.baseline,
        positions=setup.positions,
    )
    return _Findings(tokenizers, probes, memory)


def _collect(
    scores: Sequence[WindowScore],
    windows: TokenWindows,
    findings: _Findings,
    setup: Setup,
    words: _Words,
    *,
    finite: bool,
) -> EvalResult:
    """Put together what was measured so far."""
    kl_each = np.concatenate([score.kl_each for score in scores])
    return EvalResult(
        runtime=setup.runtime,
        tokens=int(kl_each.size),
        baseline_nll=tuple(score.whole.baseline_nll for score in scores),
        candidate_nll=tuple(score.whole.candidate_nll for score in scores),
        kl=tuple(score.whole.kl for score in scores),
        agreement=tuple(score.whole.agreement for score in scores),
        kl_p99=float(np.percentile(kl_each, 99)),
        kl_max=float(kl_each.max()),
        finite=finite,
        versions=setup.versions,
        suspicions=setup.suspicions,
        tokenizer_findings=findings.tokenizers.suspicions,
        notes=(
            *setup.notes,
            *findings.tokenizers.notes,
            *words.notes,
            *findings.probes.notes,
        ),
        details=collect_details(
            scores,
            windows,
            partings=(
                () if words.tokenizer is None else find_partings(scores, windows, words.tokenizer)
            ),
            generations=findings.probes.generations,
        ),
        probes=findings.probes.probes,
        load_seconds=setup.load_seconds,
        memory_bytes=findings.memory_bytes,
    )


def _worker_commands(
    runtime: str, python: str | None, baseline_python: str | None, worker: Path | None
) -> tuple[list[str], list[str]]:
    """The commands of the baseline's and the candidate's worker."""
    other = find_baseline_runtime(runtime)
    return (
        worker_command(python if other == runtime else baseline_python, worker or WORKERS[other]),
        worker_command(python, worker or WORKERS[runtime]),
    )


def _mean_kl(scores: Sequence[WindowScore]) -> float:
    return sum(score.whole.kl for score in scores) / len(scores)


def _ask_memory(pair: Pair) -> int | None:
    """Return the largest resident set of the candidate's worker; None where it does not say."""
    peak = pair.ask_candidate({"op": "usage"}).get("memory_bytes")
    return peak if type(peak) is int else None


def _compare_tokenizers(
    pair: Pair, tokenizer: PreTrainedTokenizerBase | None, setup: Setup
) -> TokenizerFindings:
    """Let the runtime's own tokenizer, where it has one, read a few texts."""
    reader = READERS.get(setup.runtime)
    if reader is None or tokenizer is None:
        return TokenizerFindings()
    texts = collect_texts(tokenizer, setup.vocabulary)
    answer = pair.ask_candidate({"op": "tokenize", "texts": texts})
    plain, special = answer.get("plain"), answer.get("special")
    try:
        return compare_tokens(reader, tokenizer, setup.vocabulary, plain, special)
    except ValueError as error:
        raise pair.workers[1].error(f"answered wrongly about its tokenizer: {error}") from None
