"""Does the artifact hold beyond the gate's windows (docs/gate.md, "Probes")?

Letters of shapes: N windows, T tokens of a window, n long windows, L tokens of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantkit.calibration.tokenizer import read_json_object
from quantkit.judging.probing.limits import fail_probe, judge_probe
from quantkit.judging.probing.logits import Compared
from quantkit.recipe.judging import ProbesSpec
from quantkit.records import TokenWindows
from quantkit.records.measuring import Probe

LONG_WINDOWS = 4
"""Long windows that are read, spread evenly over the data."""
LONGER = 4
"""So many times the gate's windows, unless the recipe says how long."""
MOST_FLOATS = 1 << 28
"""Logits of one long window, unless the recipe says how long: 1 GiB."""
SMALL_KL = 0.01
"""Nats. A KL within the windows that is smaller counts as this: far out it may well grow to a
multiple of next to nothing."""
MOST_WORSE = 0.25
"""Nats by which the baseline's own nll may be higher than within the windows."""


@dataclass(frozen=True)
class LongWindows:
    """Windows that reach beyond those of the gate, or why there are none.

    ids: int64 [n, L]; None where there are none. within: tokens of a window of the gate (T).
    note: what was not as asked for; one sentence.
    """

    ids: np.ndarray | None
    within: int
    note: str | None = None


def long_windows(
    windows: TokenWindows, spec: ProbesSpec, folder: Path, longest: int | None = None
) -> LongWindows:
    """Join windows that follow each other in the data to a few long ones.

    Where every window begins with the same token, that is the BOS: only the first of those that
    are joined keeps it.

    Args:
        windows: what the gate read: ids int64 [N, T], in any order that `numbers` tells.
        spec: `long_sequence_length` is read.
        folder: the baseline's: config.json says how many positions the model has.
        longest: tokens of a sequence that the runtimes take; None: they do not say.

    Raises:
        CheckpointError: config.json is damaged.
    """
    within = windows.ids.shape[1]
    wanted = _choose_length(within, spec.long_sequence_length, folder, longest)
    if wanted <= within:
        reason = f"the model has no positions beyond a window's {within}"
        if spec.long_sequence_length is not None and spec.long_sequence_length <= within:
            reason = f"gate.probes.long_sequence_length is not beyond a window's {within} tokens"
        return LongWindows(None, within, f"long context was not looked at: {reason}")
    runs = _find_runs(windows)
    begins_alike = len(windows.ids) > 1 and bool((windows.ids[:, 0] == windows.ids[0, 0]).all())
    front = int(begins_alike)
    needed = min(1 + -(-(wanted - within) // (within - front)), max(map(len, runs)))
    if needed < 2:
        reason = "the evaluation data holds no two windows that follow each other"
        return LongWindows(None, within, f"long context was not looked at: {reason}")
    length = min(wanted, within + (needed - 1) * (within - front))
    groups = [
        run[start : start + needed]
        for run in runs
        for start in range(0, len(run) - needed + 1, needed)
    ]
    chosen = np.unique(np.linspace(0, len(groups) - 1, min(LONG_WINDOWS, len(groups))).astype(int))
    ids = np.stack(
        [
            np.concatenate(
                [windows.ids[groups[g][0]], windows.ids[groups[g][1:], front:].reshape(-1)]
            )[:length]
            for g in chosen
        ]
    )
    asked = spec.long_sequence_length
    if asked is None or length >= asked:
        return LongWindows(ids, within)
    note = f"long windows have {length} tokens, not {asked}: the model or the data allows no more"
    return LongWindows(ids, within, note)


def _choose_length(within: int, asked: int | None, folder: Path, longest: int | None) -> int:
    """Tokens of a long window that the model and the runtimes allow."""
    config = read_json_object(folder / "config.json")
    text = config.get("text_config")
    config = text if isinstance(text, dict) else config
    positions = find_positions(folder, longest)
    if asked is not None:
        return min(asked, positions or asked)
    vocabulary = config.get("vocab_size")
    fitting = MOST_FLOATS // vocabulary if isinstance(vocabulary, int) and vocabulary else None
    # Some runtimes want room for one token more.
    limits = (LONGER * within, fitting, None if positions is None else positions - 1)
    return min(limit for limit in limits if limit is not None)


def find_positions(folder: Path, longest: int | None = None) -> int | None:
    """Return how many positions a checkpoint's config.json names, `longest` of them at the most.

    None where neither says.

    Raises:
        CheckpointError: it is damaged.
    """
    config = read_json_object(folder / "config.json")
    text = config.get("text_config")
    for each in (config, text if isinstance(text, dict) else {}):
        positions = each.get("max_position_embeddings")
        if isinstance(positions, int) and positions > 0:
            return positions if longest is None else min(positions, longest)
    return longest


def _find_runs(windows: TokenWindows) -> list[np.ndarray]:
    """Indexes of windows that follow each other in the data, in its order: one array a run."""
    count = len(windows.ids)
    numbers = np.arange(count) if windows.numbers is None else windows.numbers
    order = np.argsort(numbers)
    return np.split(order, np.flatnonzero(np.diff(numbers[order]) != 1) + 1)


def probe_long_context(
    near: Compared, far: Compared, within: int, long: int, limit: float | None
) -> Probe:
    """Compare the KL beyond the gate's windows with that within them.

    Args:
        near: the first `within` tokens of the long windows, read alone: some positional encodings
            change for all positions as a sequence grows.
        far: all of the long windows.
        within: tokens of a window of the gate.
        long: tokens of a long window.
        limit: of the ratio.
    """
    name = "long_context"
    end = _find_end(near, far, within)
    if end is None:
        detail = f"the baseline itself does not work beyond the first {within} tokens of a text"
        return judge_probe(name, None, limit, detail)
    inside = float(near.kl.mean(dtype=np.float64))
    beyond = float(far.kl[:, within:end].mean(dtype=np.float64))
    if not np.isfinite(inside + beyond):
        detail = f"not all logits of {len(near.kl)} windows of {long} tokens are finite"
        return fail_probe(name, limit, detail)
    detail = (
        f"mean KL is {beyond:.3g} nats at positions {within} to {end - 1} of {len(near.kl)} long "
        f"windows, and {inside:.3g} in their first {within} tokens"
        + (f" (counted as {SMALL_KL:g})" if inside < SMALL_KL else "")
        + ("" if end == far.kl.shape[1] else "; farther the baseline itself does not work")
    )
    return judge_probe(name, beyond / max(inside, SMALL_KL), limit, detail)


def _find_end(near: Compared, far: Compared, within: int) -> int | None:
    """Return the position up to which the baseline works about as well as within the windows.

    Stretches of `within` positions are looked at one by one. A model may have positions that it was
    never trained on: there the slightest change of it changes what it says, and nothing is lost.
    None: it does not work in the first of them.
    """
    usual = float(near.nll.mean(dtype=np.float64))
    end = within
    while end < far.kl.shape[1]:
        stretch = far.nll[:, end : end + within]
        # The baseline's own NaN is told of by the caller.
        if stretch.size and float(stretch.mean(dtype=np.float64)) > usual + MOST_WORSE:
            break
        end = min(end + within, far.kl.shape[1])
    return None if end == within else end
