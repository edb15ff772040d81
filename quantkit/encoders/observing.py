"""What the linear layers of an encoder read on calibration texts.

Tokens of padding do not count. Shapes: B texts, T tokens of the longest one, I input features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from quantkit.calibration.stats import Moment, accumulate, empty_moment, finish
from quantkit.encoders.data import make_batches
from quantkit.encoders.model import run_encoder
from quantkit.errors import CalibrationError
from quantkit.records.encoders import EncoderInfo, EncoderPlan, InputStats, TextRows

BATCH_TOKENS = 2048
"""Tokens of a calibration batch, padding included."""

BINS = 2048

_FINE_BINS = 1 << 15
"""Bins of the growing histogram on either side of zero, at the most."""


@dataclass
class _Histogram:
    """Counts of bins of a width that is a power of two: it doubles where values leave the bins.

    counts: int64 [2 * _FINE_BINS], the first bin behind zero in the middle.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros(2 * _FINE_BINS, np.int64))
    exponent: int | None = None
    """Of the width; None before the first value that is not zero: zeros are in the middle bin
    whatever its width."""


@dataclass
class _Observed:
    """Running statistics of one input. lowest, highest: float32 [I]."""

    moment: Moment
    histogram: _Histogram
    lowest: Tensor
    highest: Tensor


def observe(model: nn.Module, plan: EncoderPlan, rows: TextRows) -> Mapping[str, InputStats]:
    """Run the texts through the encoder and return what its quantized layers read.

    Args:
        model: in float32, of `load_encoder`.
        plan: its groups are observed where a layer of them is quantized.
        rows: the calibration texts.

    Returns:
        Name of a group's first layer -> statistics of the group's input.

    Raises:
        CalibrationError: an input is not finite.
    """
    names = [group.linears[0].name for group in plan.groups if group.quantized]
    return observe_inputs(model, plan.info, rows, names)


def observe_inputs(
    model: nn.Module, info: EncoderInfo, rows: TextRows, names: Sequence[str]
) -> Mapping[str, InputStats]:
    """Return what the linear layers `names` read; see `observe`."""
    observed: dict[str, _Observed] = {}

    def watch(name: str, mask: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            state = observed.setdefault(name, _begin(inputs[0].shape[-1]))
            _add(state, name, inputs[0], mask)

        return note

    for _, arrays in make_batches(rows, info, BATCH_TOKENS):
        batch = {key: torch.from_numpy(array) for key, array in arrays.items()}
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(
                watch(name, batch["attention_mask"])
            )
            for name in names
        ]
        try:
            with torch.no_grad():
                run_encoder(model, info, batch)
        finally:
            for hook in hooks:
                hook.remove()
    missing = [name for name in names if name not in observed]
    if missing:
        raise CalibrationError(f"no calibration text reached {missing[0]}: use other texts")
    return {name: _finish(observed[name]) for name in names}


def _begin(features: int) -> _Observed:
    none = torch.full((features,), torch.inf)
    return _Observed(empty_moment(features, none.device), _Histogram(), none, -none)


def _add(state: _Observed, name: str, inputs: Tensor, mask: Tensor) -> None:
    """Add the tokens of a batch [B, T, I] or [B * T, I]; mask: [B, T], 0 for padding."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    counted = mask.reshape(-1) > 0
    if len(rows) != len(counted):
        raise CalibrationError(
            f"{name} reads {len(rows)} vectors where the texts have {len(counted)} tokens: it is "
            f"no layer of an encoder that is built; leave it in float with an override"
        )
    if not bool(rows.isfinite().all()):
        raise CalibrationError(
            f"the input of {name} is not finite on the calibration texts: the model overflows on "
            f"them, so check the checkpoint"
        )
    rows = rows[counted]
    state.lowest = torch.minimum(state.lowest, rows.amin(0))
    state.highest = torch.maximum(state.highest, rows.amax(0))
    accumulate(state.moment, rows, None)
    _count(state.histogram, rows)


def _count(histogram: _Histogram, rows: Tensor) -> None:
    """Add values to the histogram, widening its bins until they hold them."""
    values = rows.double().reshape(-1).numpy()
    largest = float(np.abs(values).max())
    if largest > 0:
        # Twice the largest lies within: the next batches seldom ask for wider bins.
        needed = int(np.frexp(2 * largest / _FINE_BINS)[1])
        if histogram.exponent is None:
            histogram.exponent = needed
        while largest >= np.ldexp(_FINE_BINS, histogram.exponent):
            histogram.counts = _halve(histogram.counts)
            histogram.exponent += 1
    exponent = histogram.exponent or 0
    bins = np.floor(np.ldexp(values, -exponent)).astype(np.int64) + _FINE_BINS
    histogram.counts += np.bincount(bins, minlength=2 * _FINE_BINS)


def _halve(counts: np.ndarray) -> np.ndarray:
    """Join pairs of bins; those of the middle stay in the middle."""
    joined = counts.reshape(-1, 2).sum(axis=1)
    return np.pad(joined, _FINE_BINS // 2)


def _finish(state: _Observed) -> InputStats:
    stats = finish(state.moment)
    if stats.mean is None or stats.absmax is None or stats.sample is None:
        raise ValueError("statistics without a mean")
    minimum, maximum = float(state.lowest.min()), float(state.highest.max())
    return InputStats(
        second_moment=stats.second_moment,
        mean=stats.mean,
        absmax=stats.absmax,
        minimum=minimum,
        maximum=maximum,
        counts=_rebin(state.histogram, minimum, maximum),
        sample=stats.sample,
        tokens=stats.tokens,
        lowest=state.lowest,
        highest=state.highest,
    )


def _rebin(histogram: _Histogram, minimum: float, maximum: float) -> np.ndarray:
    """Return int64 [BINS] from the smallest to the largest value."""
    filled = np.flatnonzero(histogram.counts)
    centres = np.ldexp(filled - _FINE_BINS + 0.5, histogram.exponent or 0)
    share = np.clip((centres - minimum) / max(maximum - minimum, np.finfo(float).tiny), 0.0, 1.0)
    places = np.minimum((share * BINS).astype(np.int64), BINS - 1)
    return np.bincount(places, histogram.counts[filled], BINS).astype(np.int64)
