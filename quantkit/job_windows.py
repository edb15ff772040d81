"""The windows of tokens that a job calibrates on and is judged on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from quantkit.calibration.data import load_tokenizer, load_windows
from quantkit.calibration.doctor import check_overlap, check_vocabulary
from quantkit.calibration.given import collect_windows
from quantkit.calibration.tokenizer import has_tokenizer
from quantkit.checkpoint.reader import Checkpoint
from quantkit.recipe import MIN_WINDOWS, CalibrationSpec, GateSpec
from quantkit.records import Plan, TokenWindows


def find_calibration(
    spec: CalibrationSpec, checkpoint: Checkpoint, plan: Plan, examples: Iterable[object] | None
) -> TokenWindows:
    """Return the windows of the caller's examples, or else of the recipe's data.

    Raises:
        CalibrationError: as `load_calibration`, and `collect_windows`.
    """
    folder = checkpoint.source.folder
    if examples is None:
        return load_calibration(spec, load_tokenizer(folder), checkpoint, plan)
    vocabulary = checkpoint.config.get("vocab_size")
    return collect_windows(
        examples,
        tokenizer=load_tokenizer(folder) if has_tokenizer(folder) else None,
        text_column=spec.text_column,
        samples=spec.samples,
        sequence_length=spec.sequence_length,
        vocabulary=vocabulary if isinstance(vocabulary, int) else None,
        assistant_only=spec.assistant_only,
        in_features=_widest(plan),
    )


def load_calibration(
    spec: CalibrationSpec, tokenizer: Any, checkpoint: Checkpoint, plan: Plan
) -> TokenWindows:
    """Return the seeded windows of the calibration data.

    Raises:
        CalibrationError: the data does not suffice or does not fit the model.
    """
    windows = load_windows(
        spec.data,
        split=spec.split,
        text_column=spec.text_column,
        tokenizer=tokenizer,
        samples=spec.samples,
        sequence_length=spec.sequence_length,
        seed=spec.seed,
        assistant_only=spec.assistant_only,
        in_features=_widest(plan),
    )
    _check_vocabulary(windows, checkpoint)
    return windows


def load_evaluation(spec: GateSpec, tokenizer: Any, checkpoint: Checkpoint) -> TokenWindows:
    """Return the first windows of the gate's data: all that it may measure.

    Raises:
        CalibrationError: the data does not suffice or does not fit the model.
    """
    windows = load_windows(
        spec.data,
        split=spec.split,
        text_column=spec.text_column,
        tokenizer=tokenizer,
        samples=spec.samples,
        sequence_length=spec.sequence_length,
        seed=spec.seed,
        order="sequential",
        at_most=spec.most_windows,
        domain_column=spec.domain_column,
    )
    _check_vocabulary(windows, checkpoint)
    count = len(windows.ids)
    if count >= MIN_WINDOWS:
        return windows
    few = (
        f"{count} evaluation windows decide nothing, and at least {MIN_WINDOWS} of "
        f"{spec.sequence_length} tokens are needed: the verdict will be INCONCLUSIVE without more "
        "text, a shorter gate.sequence_length or more gate.samples"
    )
    return replace(windows, notes=(*windows.notes, few))


def _check_vocabulary(windows: TokenWindows, checkpoint: Checkpoint) -> None:
    vocabulary = checkpoint.config.get("vocab_size")
    if isinstance(vocabulary, int):
        check_vocabulary(windows, vocabulary)


def collect_notes(calibration: TokenWindows | None, evaluation: TokenWindows | None) -> list[str]:
    """Refuse an evaluation on calibration data; return what was noticed in data that is fit."""
    notes: list[str] = []
    for windows in (calibration, evaluation):
        if windows is not None:
            notes += windows.notes
    if calibration is not None and evaluation is not None:
        notes += check_overlap(calibration, evaluation)
    return notes


def _widest(plan: Plan) -> int:
    """Inputs of the widest layer that looks at data."""
    calibrated = (linear for linear in plan.linears if linear.needs_statistics)
    return max((linear.in_features for linear in calibrated), default=1)
