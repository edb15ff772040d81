"""What became of the checkpoints of a training that were quantized, and which of them are kept."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from quantkit.checkpoint.headers import read_json
from quantkit.durable import write_words
from quantkit.errors import CheckpointError, OutputError, writing
from quantkit.live import place_of
from quantkit.records import ArtifactReport, Judgement, Verdict
from quantkit.staging import PARTS_OF_SAVED, discard, partial_of

Standard = Literal["kl", "perplexity"]
"""By what one artifact is better than another of the same verdict: less is better."""

RECORD = "training.json"
BEST = "best"

_VERDICTS: tuple[Verdict, ...] = ("PASS", "INCONCLUSIVE", "UNJUDGED", "FAIL")


@dataclass(frozen=True)
class Milestone:
    """One checkpoint that was quantized and judged, or could not be."""

    step: int
    """Steps of the optimizer that the training had taken."""
    verdict: Verdict | None
    """None: there is no artifact."""
    figures: Mapping[str, float]
    """What was logged, without the prefix."""
    error: str | None = None
    kept: bool = True
    """Whether its folder is there."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return name_step(self.step)


def name_step(step: int) -> str:
    """What the folder of a step is called."""
    return f"step-{step}"


def describe_artifacts(
    artifacts: Sequence[ArtifactReport], verdict: Verdict, seconds: float
) -> dict[str, float]:
    """Return the figures of a job; several artifacts have theirs behind what they are.

    That is `gguf`, or `gguf-Q4_K_M` where there are several of a format: names of files may change
    from step to step, and a logger is to draw one line.

    What is not finite, as the perplexity of a model that went to pieces, is left out: loggers write
    JSON, and the verdict tells of it.
    """
    figures = {"passed": float(verdict == "PASS"), "failed": 0.0, "seconds": seconds}
    formats = [artifact.format for artifact in artifacts]
    for artifact in artifacts:
        several = formats.count(artifact.format) > 1
        kind = f"{artifact.format}-{artifact.scheme}" if several else artifact.format
        place = f"{kind}/" if len(artifacts) > 1 else ""
        for name, value in _figures_of(artifact, artifact.judgement):
            if value is not None and math.isfinite(value):
                figures[place + name] = float(value)
    return figures


def _figures_of(
    artifact: ArtifactReport, judgement: Judgement
) -> Iterator[tuple[str, float | None]]:
    yield "size_bytes", artifact.size_bytes
    yield "bits_per_weight", artifact.bits_per_weight
    if judgement.kl is not None:
        yield "kl", judgement.kl.value
    if judgement.perplexity is not None:
        yield "perplexity", judgement.perplexity.value
        yield "perplexity_baseline", judgement.perplexity.baseline
        yield "perplexity_increase", judgement.perplexity.increase
    if judgement.top1_agreement is not None:
        yield "top1_agreement", judgement.top1_agreement.value
    for measure in judgement.measures:
        yield measure.name, measure.metric.value


def sort_milestones(milestones: Sequence[Milestone], by: Standard) -> list[Milestone]:
    """Put those whose artifact is there in order, the best first: by verdict, then by `by`.

    Of several artifacts of a step the worst counts. Among equals the later step comes first.
    """

    def place(milestone: Milestone) -> tuple[int, float, int]:
        values = [
            value for name, value in milestone.figures.items() if name.rpartition("/")[2] == by
        ]
        verdict = _VERDICTS.index(milestone.verdict) if milestone.verdict else len(_VERDICTS)
        return verdict, max(values, default=math.inf), -milestone.step

    return sorted((each for each in milestones if each.verdict and each.kept), key=place)


def find_best(milestones: Sequence[Milestone], by: Standard) -> Milestone | None:
    """Return the best of those that passed; None where none did."""
    first = next(iter(sort_milestones(milestones, by)), None)
    return first if first is not None and first.verdict == "PASS" else None


def keep_best(
    root: Path, milestones: Sequence[Milestone], by: Standard, count: int | None
) -> list[Milestone]:
    """Remove all folders but those of the `count` best, name the best, and write what is known.

    Args:
        root: folder of all outputs.
        milestones: in the order of their steps.
        by: what is better.
        count: how many folders stay; None: all.

    Returns:
        The milestones, with what has become of their folders.

    Raises:
        ResourceError, OutputError: a file cannot be written.
    """
    order = sort_milestones(milestones, by)
    dropped = set() if count is None else {each.step for each in order[count:]}
    now = [replace(each, kept=each.kept and each.step not in dropped) for each in milestones]
    record(root, now, by)
    # Last: whatever `best` names is there at every moment.
    with writing(root):
        for milestone in now:
            if milestone.step in dropped:
                shutil.rmtree(root / milestone.name, ignore_errors=True)
    return now


def record(root: Path, milestones: Sequence[Milestone], by: Standard) -> None:
    """Write training.json, and let `best` name the best step that passed.

    Raises:
        ResourceError, OutputError: a file cannot be written.
    """
    best = find_best(milestones, by)
    document = {
        "schema": 1,
        "best": None if best is None else best.name,
        "steps": [{"folder": each.name, **asdict(each)} for each in milestones],
    }
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        _point(root / BEST, best)
        write_words(root / RECORD, json.dumps(document, indent=2, allow_nan=False) + "\n")


def _point(link: Path, best: Milestone | None) -> None:
    """Let `best` name the folder of the best step, or nothing."""
    if best is None:
        with suppress(FileNotFoundError):
            link.unlink()
        return
    new = link.with_name(f".{link.name}.new")
    with suppress(FileNotFoundError):
        new.unlink()
    new.symlink_to(best.name, target_is_directory=True)
    os.replace(new, link)


def remove_unfinished(root: Path, step: int) -> None:
    """Remove what a job that failed has left of its work; its log stays."""
    partial = partial_of(root / name_step(step))
    if partial.is_dir() and not partial.is_symlink():
        discard(partial)


def remove_stale(root: Path) -> None:
    """Remove what the jobs of a training that was killed have left of their work."""
    for place in root.glob(place_of(root / "*").name):
        is_folder = place.is_dir() and not place.is_symlink()
        if is_folder and {path.name for path in place.iterdir()} <= PARTS_OF_SAVED:
            shutil.rmtree(place, ignore_errors=True)
    for partial in root.glob(partial_of(root / "step-*").name):
        step = partial.name.removeprefix("step-").removesuffix(".partial")
        if step.isdecimal():
            remove_unfinished(root, int(step))


def read_milestones(root: Path, begun: int, *, overwrite: bool) -> list[Milestone]:
    """Return what earlier runs of a training have left in `root`, as far as it goes on from there.

    Args:
        root: folder of all outputs.
        begun: steps that the training has behind it; 0 where it begins.
        overwrite: replace what another training has left.

    Raises:
        OutputError: another training has left steps there, or the record cannot be read.
    """
    there = sorted(path.name for path in root.glob("step-*") if path.is_dir())
    there = [name for name in there if name.removeprefix("step-").isdecimal()]
    if not begun and not overwrite and (there or (root / RECORD).exists()):
        raise OutputError(
            f"output {root} holds the steps of another training"
            f"{' (' + ', '.join(there) + ')' if there else ''}: choose another output, or pass "
            f"overwrite=True"
        )
    if (root / BEST).exists() and not (root / BEST).is_symlink():
        raise OutputError(f"{root / BEST} is in the way, and quantkit did not write it: move it")
    if not begun or not (root / RECORD).exists():
        return []
    try:
        rows = read_json(root / RECORD)["steps"]
        found = [_read(row) for row in rows]
    except (CheckpointError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{root / RECORD} cannot be read ({error}): move it") from None
    # A folder may be gone: dropped for a later step that is not gone on from, or by the user.
    return [
        replace(each, kept=each.kept and (root / each.name).is_dir())
        for each in found
        if each.step <= begun
    ]


def _read(row: Mapping[str, Any]) -> Milestone:
    keys = ("step", "verdict", "figures", "error", "kept")
    return Milestone(**{key: row[key] for key in keys})
