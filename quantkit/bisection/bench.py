"""Both models on the same windows, with any units of the artifact replaced: how far apart they are.

All trials go through the blocks together. Trials that are equal so far share a stream of hidden
states, so to restore block i costs the blocks from i on. In memory are one block of each model in
float32, what stands outside of the blocks of both, and the streams; where those are too many the
trials are measured in several passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantkit.allocation.streams import Recording, compute_logits, record, run_block
from quantkit.bisection.reading import Weights
from quantkit.bisection.records import Trial, Unit
from quantkit.bisection.remedies import replace_tensor
from quantkit.bisection.scores import Scores, score
from quantkit.bisection.survey import Pair
from quantkit.calibration.placing import empty, put
from quantkit.errors import CheckpointError
from quantkit.numerics.activations import round_inputs
from quantkit.records import Event, Progress, TokenWindows

_LOGITS_AT_ONCE = 1 << 24
"""Entries of the logits that are compared at a time."""
_STREAM_BYTES = 2 << 30
"""Of the streams of one pass."""

_Key = frozenset[tuple[str, str]]
"""The units that were replaced so far, and by what: trials with the same key share a stream."""


@dataclass(frozen=True)
class Bench:
    """The model and where its weights come from. outside: by full name, both models' tensors."""

    model: nn.Module
    pair: Pair
    units: Mapping[str, Unit]
    found: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    device: torch.device
    tell: Progress


@dataclass(frozen=True)
class Part:
    """Some windows, and where the original stands behind its last block on them.

    model: the original's. ids: int64 [N, T]. counted: bool [N, T - 1], positions that are scored.
    final: float32 [N, T, H].
    """

    model: nn.Module
    ids: Tensor
    counted: Tensor
    final: Tensor
    in_tuple: bool


def set_up(
    model: nn.Module, pair: Pair, units: Sequence[Unit], device: torch.device, tell: Progress
) -> Bench:
    """Read what stands outside of the blocks.

    Args:
        model: whose config is computed with, parameters on the meta device.
    """
    inside = tuple(f"{prefix}." for prefix in pair.prefixes)
    names = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if not name.startswith(inside)
    ]
    found, base = (
        _read_outside(pair, weights, names, device) for weights in (pair.found, pair.base)
    )
    place_buffers(model, device)
    return Bench(model, pair, {unit.name: unit for unit in units}, found, base, device, tell)


def place_buffers(model: nn.Module, device: torch.device) -> None:
    """Bring a model's buffers to where it computes."""
    for owner in model.modules():
        for leaf, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[leaf] = buffer.to(device)


def _read_outside(
    pair: Pair, weights: Weights, names: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    """Read tensors once each; tied ones are one."""
    stored = {name: pair.read(weights, name).to(device) for name in names if name in weights.names}
    for name in names:
        if name not in stored:
            source = pair.ties.get(name, name)
            stored[name] = stored[source] if source in stored else pair.read(weights, name)
    return stored


def prepare(bench: Bench, windows: TokenWindows) -> Part:
    """Run the original on the windows.

    Raises:
        CheckpointError: the model cannot be run block by block.
    """
    ids = torch.from_numpy(windows.ids)
    counted = torch.from_numpy(windows.weights[:, 1:] != 0)
    with torch.inference_mode():
        _place(bench.model, bench.base)
        recording = record(bench.model, bench.pair.prefixes, ids, bench.device)
        hidden = recording.hidden
        for index, prefix in enumerate(bench.pair.prefixes):
            _place(bench.model, _read_block(bench, index, original=True))
            hidden = run_block(
                bench.model, bench.pair.prefixes, index, recording, hidden, bench.device
            )
            empty(bench.model.get_submodule(prefix))
            bench.tell(Event("baseline", index + 1, len(bench.pair.prefixes), prefix))
    return Part(bench.model, ids, counted, hidden, recording.in_tuple)


def measure(bench: Bench, part: Part, trials: Sequence[Trial], stage: str) -> list[Scores]:
    """Return the scores of each trial on the windows of a part.

    Raises:
        CheckpointError: the original's logits are not finite.
    """
    size = part.final.numel() * part.final.element_size()
    step = max(1, _STREAM_BYTES // max(1, size))
    found: list[Scores] = []
    with torch.inference_mode():
        for start in range(0, len(trials), step):
            found += _measure_together(bench, part, trials[start : start + step], stage)
    return found


def _measure_together(
    bench: Bench, part: Part, trials: Sequence[Trial], stage: str
) -> list[Scores]:
    prefixes = bench.pair.prefixes
    keys: list[_Key] = [_restored(bench, trial, None) for trial in trials]
    recordings: dict[_Key, Recording] = {}
    for key in keys:
        if key not in recordings:
            _place(bench.model, _outside(bench, dict(key)))
            recordings[key] = record(bench.model, prefixes, part.ids, bench.device)
    recording = next(iter(recordings.values()))
    streams = {key: each.hidden for key, each in recordings.items()}
    for index, prefix in enumerate(prefixes):
        found, base = (_read_block(bench, index, original=each) for each in (False, True))
        following: dict[_Key, Tensor] = {}
        for number, trial in enumerate(trials):
            own = _restored(bench, trial, index)
            key = keys[number] | own
            if key not in following:
                with _placed(bench, found, base, dict(own), index):
                    following[key] = run_block(
                        bench.model, prefixes, index, recording, streams[keys[number]], bench.device
                    )
            keys[number] = key
        streams = following
        empty(bench.model.get_submodule(prefix))
        bench.tell(Event(stage, index + 1, len(prefixes), f"{prefix}, {len(streams)} streams"))
    return _score_streams(bench, part, trials, [streams[key] for key in keys])


def _restored(bench: Bench, trial: Trial, block: int | None) -> _Key:
    """What a trial replaces in a block, or outside of all."""
    return frozenset(
        (name, remedy) for name, remedy in trial.items() if bench.units[name].block == block
    )


def _read_block(bench: Bench, index: int, *, original: bool) -> dict[str, Tensor]:
    weights = bench.pair.base if original else bench.pair.found
    prefix = bench.pair.prefixes[index]
    block = bench.model.get_submodule(prefix)
    return {
        f"{prefix}.{name}": bench.pair.read(weights, f"{prefix}.{name}").to(bench.device)
        for name, _ in block.named_parameters(remove_duplicate=False)
    }


def _place(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        put(model.get_submodule(owner), leaf, tensor)


def _replaced(
    bench: Bench, base: Mapping[str, Tensor], restored: Trial
) -> Iterator[tuple[str, Tensor]]:
    for unit, remedy in restored.items():
        for name in bench.units[unit].tensors:
            yield name, _replace(bench.units[unit], name, base[name], remedy)


def _replace(unit: Unit, name: str, base: Tensor, remedy: str) -> Tensor:
    return replace_tensor(unit, name, base.cpu(), remedy).to(base.device)


def _outside(bench: Bench, restored: Trial) -> dict[str, Tensor]:
    """What stands outside of the blocks; what is tied goes with what it is tied to."""
    tensors = {**bench.found, **dict(_replaced(bench, bench.base, restored))}
    for name, source in bench.pair.ties.items():
        if name not in bench.pair.found.names and source in tensors:
            tensors[name] = tensors[source]
    return tensors


@contextmanager
def _placed(
    bench: Bench,
    found: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    restored: Trial,
    index: int,
) -> Iterator[None]:
    """Hold a block in its place with some of its units replaced, and round inputs meanwhile."""
    _place(bench.model, {**found, **dict(_replaced(bench, base, restored))})
    prefix = f"{bench.pair.prefixes[index]}."
    handles = []
    try:
        for name, form in bench.pair.found.forms.items():
            keeps = restored.get(name, "again") == "again"
            if name.startswith(prefix) and form.activations is not None and keeps:
                module = bench.model.get_submodule(name)
                scale = None if form.input_scale is None else form.input_scale.to(bench.device)
                handles.append(module.register_forward_pre_hook(_rounding(form.activations, scale)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounding(scheme: Any, scale: Tensor | None) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
        return (round_inputs(args[0], scheme, scale), *args[1:])

    return hook


def _score_streams(
    bench: Bench, part: Part, trials: Sequence[Trial], streams: Sequence[Tensor]
) -> list[Scores]:
    rows = torch.nonzero(part.counted)
    targets = part.ids[:, 1:][part.counted]
    outside = [_outside(bench, dict(_restored(bench, trial, None))) for trial in trials]
    vocabulary = len(cast(Any, bench.model).get_output_embeddings().weight)
    pieces: list[list[Scores]] = [[] for _ in trials]

    def logits(
        model: nn.Module, tensors: Mapping[str, Tensor], hidden: Tensor, at: Tensor
    ) -> Tensor:
        _place(model, tensors)
        batch = hidden[at[:, 0], at[:, 1]].to(bench.device)
        return compute_logits(model, bench.pair.prefixes, batch, part.in_tuple).float()

    for numbers in torch.arange(len(rows)).split(max(1, _LOGITS_AT_ONCE // vocabulary)):
        at, wanted = rows[numbers], targets[numbers].to(bench.device)
        original = torch.log_softmax(logits(part.model, bench.base, part.final, at), -1)
        if not bool(original.isfinite().all()):
            raise CheckpointError(
                "the baseline's logits are not finite on the evaluation data: it overflows on them"
            )
        for number, stream in enumerate(streams):
            found = logits(bench.model, outside[number], stream, at)
            pieces[number].append(score(original, found, wanted, at[:, 0]))
    return [Scores.join(each) for each in pieces]
