"""Run baseline and candidate over the same windows, each in a process of its own, and compare."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.errors import ArtifactError, CalibrationError
from quantkit.judging.sampling import plan_looks
from quantkit.judging.suspicions import compare_generations, compare_unexpected
from quantkit.judging.tokens import READERS, TokenizerFindings, collect_texts, compare_tokens
from quantkit.judging.worker import Pair, Worker, running_pair, worker_command, worker_threads
from quantkit.numerics.divergence import compare_logits
from quantkit.records import EvalResult, Event, Progress, TokenWindows

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

LLAMA_CPP = "llama.cpp"
ONNX_RUNTIME = "onnxruntime"

OTHER_BASELINES = frozenset({LLAMA_CPP, ONNX_RUNTIME})
"""Runtimes that load no checkpoints: their baselines run in transformers."""

BATCH_TOKENS = {"cpu": 1024, "cuda": 4096}
"""Tokens of one request, at the most (at least one window)."""
BATCH_FLOATS = 1 << 25
"""Logits of one request, at the most: 128 MiB on disk (at least one window)."""
COMPARE_FLOATS = 1 << 17
"""Logits that are compared at a time: what float64 copies of them take stays in the cache."""

PROMPTS = 4
PROMPT_TOKENS = 32
NEW_TOKENS = 64


@dataclass(frozen=True)
class _Setup:
    """What both workers said when they had loaded."""

    vocabulary: int
    device: str
    versions: dict[str, str]
    suspicions: tuple[str, ...]


@dataclass(frozen=True)
class _Findings:
    """What was seen besides logits."""

    doubts: tuple[str, ...]
    tokenizers: TokenizerFindings


@dataclass(frozen=True)
class _WindowScore:
    """Means over the counted positions of one window, and the divergence at each of them."""

    baseline_nll: float
    candidate_nll: float
    agreement: float
    kl: float
    kl_each: np.ndarray


def evaluate(
    baseline: Path,
    candidate: Path,
    windows: TokenWindows,
    *,
    samples: int | None = None,
    is_undecided: Callable[[EvalResult], bool] | None = None,
    python: str | None = None,
    baseline_python: str | None = None,
    timeout_seconds: float = 3600.0,
    device: str = "auto",
    progress: Progress | None = None,
    runtime: str = "transformers",
    worker: Path | None = None,
) -> EvalResult:
    """Measure `candidate` against `baseline` on `windows` (docs/gate.md, "Metrics").

    Position t of a window is scored on the token at t+1, where that token's weight is not zero.
    Windows without any such token are left out. With `samples`, that many are measured at first,
    and more, by `plan_looks`, while `is_undecided`; the workers stay loaded.

    Args:
        baseline: folder of the 16-bit checkpoint.
        candidate: folder of the artifact; for llama.cpp a GGUF file and for onnxruntime an ONNX
            file, or a folder with one.
        windows: ids int64 [N, T] and weights [N, T].
        samples: windows of the first look; None: all of them.
        is_undecided: whether a result of some looks wants more windows; None: never.
        python: interpreter of the candidate's worker; None is this one.
        baseline_python: of the baseline's, where that is another runtime (`find_baseline_runtime`).
        timeout_seconds: how long a worker may be silent about one request.
        device: `auto`, `cpu` or `cuda`.
        progress: called after each batch of windows.
        runtime: what the candidate runs in, a key of `WORKERS`.
        worker: a script to use in place of the runtimes' own.

    Raises:
        WorkerError: a worker died, hung, answered nonsense or could not do its work.
        ResourceError: a worker ran out of memory or disk.
        ArtifactError: the two have different vocabularies.
        CheckpointError: the tokenizer of the baseline is needed, and cannot be loaded.
        CalibrationError: the windows do not fit the models, or none of their tokens counts.
        InputError: the interpreter cannot be started or lacks a package.
    """
    started = time.perf_counter()
    commands = _worker_commands(runtime, python, baseline_python, worker)
    ids, counted = _scored_windows(windows)
    looks = plan_looks(samples or len(ids), len(ids))
    tell = progress or (lambda event: None)
    tell(Event("gate", 0, looks[0], "loading the baseline and the artifact"))
    with (
        tempfile.TemporaryDirectory(prefix="quantkit-gate-", ignore_cleanup_errors=True) as folder,
        running_pair(*commands, timeout_seconds) as pair,
    ):
        setup = _load(pair, baseline, candidate, device)
        _check_ids(ids, setup.vocabulary)
        scores: list[_WindowScore] = []
        finite = True
        findings: _Findings | None = None
        for look in looks:
            batches = _batches(range(len(scores), look), ids.shape[1], setup)
            with _leaving_cores_to_workers(setup.device):
                for scored, batch_finite in _score(
                    pair, ids, counted, batches, setup, Path(folder)
                ):
                    scores += scored
                    finite = finite and batch_finite
                    tell(Event("gate", len(scores), look, f"KL {_mean_kl(scores):.4g}"))
            findings = findings or _Findings(
                setup.suspicions + compare_generations(*_continue_prompts(pair, ids[:look])),
                _compare_tokenizers(pair, baseline, setup.vocabulary, runtime),
            )
            result = _collect(scores, findings, setup, runtime, finite=finite)
            result = replace(result, looks=() if samples is None else looks)
            if is_undecided is None or not is_undecided(result):
                break
    return replace(result, seconds=time.perf_counter() - started)


def _collect(
    scores: Sequence[_WindowScore],
    findings: _Findings,
    setup: _Setup,
    runtime: str,
    *,
    finite: bool,
) -> EvalResult:
    """Put together what was measured so far."""
    kl_each = np.concatenate([score.kl_each for score in scores])
    return EvalResult(
        runtime=runtime,
        tokens=int(kl_each.size),
        baseline_nll=tuple(score.baseline_nll for score in scores),
        candidate_nll=tuple(score.candidate_nll for score in scores),
        kl=tuple(score.kl for score in scores),
        agreement=tuple(score.agreement for score in scores),
        kl_p99=float(np.percentile(kl_each, 99)),
        kl_max=float(kl_each.max()),
        finite=finite,
        versions=setup.versions,
        suspicions=findings.doubts,
        tokenizer_findings=findings.tokenizers.suspicions,
        notes=findings.tokenizers.notes,
    )


def find_baseline_runtime(runtime: str) -> str:
    """Return what the baseline of a candidate in `runtime` runs in: the same, or transformers."""
    return "transformers" if runtime in OTHER_BASELINES else runtime


def _worker_commands(
    runtime: str, python: str | None, baseline_python: str | None, worker: Path | None
) -> tuple[list[str], list[str]]:
    """The commands of the baseline's and the candidate's worker."""
    other = find_baseline_runtime(runtime)
    return (
        worker_command(python if other == runtime else baseline_python, worker or WORKERS[other]),
        worker_command(python, worker or WORKERS[runtime]),
    )


@contextmanager
def _leaving_cores_to_workers(device: str) -> Iterator[None]:
    """Compare on one thread where the workers compute on this CPU: more would spin and wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _scored_windows(windows: TokenWindows) -> tuple[np.ndarray, np.ndarray]:
    """Return ids int64 [N, T] and counted bool [N, T-1] of the windows in which a token counts."""
    counted = windows.weights[:, 1:] != 0
    kept = counted.any(axis=1)
    if not kept.any():
        raise CalibrationError(f"{windows.source}: none of the evaluation tokens counts")
    return windows.ids[kept], counted[kept]


def _load(pair: Pair, baseline: Path, candidate: Path, device: str) -> _Setup:
    common = {"op": "load", "device": device, "threads": worker_threads()}
    pair.ask(
        common | {"path": str(baseline.resolve())}, common | {"path": str(candidate.resolve())}
    )
    first, second = pair.answers()
    for worker, answer in zip(pair.workers, (first, second), strict=True):
        if not (isinstance(answer.get("vocab"), int) and isinstance(answer.get("versions"), dict)):
            raise worker.error("answered without the size of its vocabulary or its versions")
    if first["vocab"] != second["vocab"]:
        raise ArtifactError(
            f"{candidate} has a vocabulary of {second['vocab']} tokens and its baseline {baseline}"
            f" one of {first['vocab']}: a different model or tokenizer"
        )
    # The baseline's runtime may be another one, with packages of its own.
    versions = {
        str(name): str(value) for name, value in (first["versions"] | second["versions"]).items()
    }
    for name in ("dtype", "device"):
        values = [str(answer.get(name)) for answer in (first, second)]
        versions[name] = values[1] if values[0] == values[1] else f"{values[1]} against {values[0]}"
    if isinstance(second.get("kv_cache"), str):
        versions["kv_cache"] = second["kv_cache"]
    return _Setup(
        vocabulary=first["vocab"],
        device=str(second.get("device")),
        versions=versions,
        suspicions=compare_unexpected(first.get("unexpected", []), second.get("unexpected", [])),
    )


def _check_ids(ids: np.ndarray, vocabulary: int) -> None:
    if int(ids.max()) >= vocabulary or int(ids.min()) < 0:
        raise CalibrationError(
            f"an evaluation window holds token {int(ids.max())}, but the models have {vocabulary}"
            " tokens: the windows were made with another tokenizer"
        )


def _batches(windows: range, length: int, setup: _Setup) -> list[range]:
    tokens = BATCH_TOKENS.get(setup.device, BATCH_TOKENS["cpu"])
    size = max(1, min(tokens // length, BATCH_FLOATS // (length * setup.vocabulary)))
    return [windows[start : start + size] for start in range(0, len(windows), size)]


def _score(
    pair: Pair,
    ids: np.ndarray,
    counted: np.ndarray,
    batches: Sequence[range],
    setup: _Setup,
    folder: Path,
) -> Iterator[tuple[list[_WindowScore], bool]]:
    """Yield each batch's scores and whether its logits were finite.

    While this process compares a batch, the workers compute the next one; files are deleted when
    they were compared, so that two batches lie on the disk at the most.
    """

    def request(number: int) -> list[Path]:
        files = [folder / f"{worker.role}-{number}.f32" for worker in pair.workers]
        rows = ids[batches[number].start : batches[number].stop].tolist()
        asked = [{"op": "logits", "ids": rows, "file": str(file)} for file in files]
        pair.ask(asked[0], asked[1])
        return files

    files = request(0)
    for number, batch in enumerate(batches):
        answers = pair.answers()
        shape = (len(batch), ids.shape[1], setup.vocabulary)
        for worker, answer, file in zip(pair.workers, answers, files, strict=True):
            _check_logits(worker, answer, file, shape)
        following = request(number + 1) if number + 1 < len(batches) else []
        scores = [
            _compare_window(files, row, ids[window], counted[window], setup.vocabulary)
            for row, window in enumerate(batch)
        ]
        for file in files:
            file.unlink()
        files = following
        yield scores, all(answer.get("finite") is True for answer in answers)


def _check_logits(
    worker: Worker, answer: dict[str, Any], file: Path, shape: tuple[int, ...]
) -> None:
    """Refuse an answer whose shape, or whose file's size, is not what was asked for."""
    size = file.stat().st_size if file.is_file() else 0
    if answer.get("shape") != list(shape) or size != 4 * int(np.prod(shape)):
        raise worker.error(
            f"answered logits of shape {answer.get('shape')} in {size} bytes for {list(shape)}"
        )


def _compare_window(
    files: Sequence[Path], row: int, ids: np.ndarray, counted: np.ndarray, vocabulary: int
) -> _WindowScore:
    """Compare row `row` of two logits files, a few positions at a time."""
    length = len(ids)
    targets = torch.from_numpy(ids[1:])
    step = max(1, COMPARE_FLOATS // vocabulary)
    parts = []
    for start in range(0, length - 1, step):
        stop = min(start + step, length - 1)
        first = (row * length + start) * vocabulary
        pair = [_read_floats(file, first, (stop - start) * vocabulary) for file in files]
        logits = [floats.reshape(-1, vocabulary) for floats in pair]
        parts.append(compare_logits(logits[0], logits[1], targets[start:stop]))
    keep = torch.from_numpy(counted)
    nll_b, nll_c, kl, agree = (
        torch.cat([getattr(part, name) for part in parts])[keep].double()
        for name in ("baseline_nll", "candidate_nll", "kl", "agree")
    )
    return _WindowScore(
        baseline_nll=float(nll_b.mean()),
        candidate_nll=float(nll_c.mean()),
        agreement=float(agree.mean()),
        kl=float(kl.mean()),
        kl_each=kl.float().numpy(),
    )


def _read_floats(file: Path, first: int, count: int) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(file, dtype=np.float32, count=count, offset=4 * first))


def _mean_kl(scores: Sequence[_WindowScore]) -> float:
    return sum(score.kl for score in scores) / len(scores)


def _continue_prompts(pair: Pair, ids: np.ndarray) -> tuple[list[list[int]], list[list[int]]]:
    """Let both models continue the beginnings of a few windows, spread evenly; greedily."""
    chosen = np.linspace(0, len(ids) - 1, num=min(PROMPTS, len(ids))).astype(int)
    length = min(PROMPT_TOKENS, ids.shape[1] // 2)
    baseline: list[list[int]] = []
    candidate: list[list[int]] = []
    for window in chosen:
        prompt = ids[window, :length].tolist()
        request = {"op": "generate", "prompt_ids": prompt, "max_new_tokens": NEW_TOKENS}
        pair.ask(request, request)
        for worker, answer, into in zip(
            pair.workers, pair.answers(), (baseline, candidate), strict=True
        ):
            tokens = answer.get("ids")
            if not isinstance(tokens, list) or not all(isinstance(t, int) for t in tokens):
                raise worker.error("answered a generation without token ids")
            into.append(tokens)
    return baseline, candidate


def _compare_tokenizers(
    pair: Pair, baseline: Path, vocabulary: int, runtime: str
) -> TokenizerFindings:
    """Let the runtime's own tokenizer, where it has one, read a few texts."""
    reader = READERS.get(runtime)
    if reader is None:
        return TokenizerFindings()
    tokenizer = load_tokenizer(baseline)
    texts = collect_texts(tokenizer, vocabulary)
    answer = pair.ask_candidate({"op": "tokenize", "texts": texts})
    plain, special = answer.get("plain"), answer.get("special")
    try:
        return compare_tokens(reader, tokenizer, vocabulary, plain, special)
    except ValueError as error:
        raise pair.workers[1].error(f"answered wrongly about its tokenizer: {error}") from None
