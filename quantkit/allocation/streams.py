"""A model's blocks run one at a time, on as many streams of hidden states as one likes.

A dry run of the model's own forward, whose blocks pass their hidden states through untouched,
tells what each block is given besides them: masks, positions, rotary tables. With that a block
can be run on any hidden states, and no argument has to be guessed. The logits of hidden states
that have passed all blocks come from another such run, whose last block returns them.

That is right for a model whose forward hands the output of a block to the next one as it is. The
dry run checks it: each block must be given the very tensor that the one before it returned.

Shapes: N windows, T tokens of a window, H hidden size, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantkit.calibration.placing import hidden_features, put
from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.checkpoint.skeleton import tied_names
from quantkit.errors import CheckpointError
from quantkit.numerics.batching import windows_at_once


@dataclass(frozen=True)
class _Call:
    """What the forward gives a block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """The dry run of a model on N windows.

    hidden: float32 [N, T, H] on the CPU, what the first block is given. windows_at_once: of a
    micro-batch. calls: for each micro-batch one call a block. in_tuple: blocks return a tuple.
    """

    hidden: Tensor
    windows_at_once: int
    calls: tuple[tuple[_Call, ...], ...]
    in_tuple: bool


def record(
    model: nn.Module, prefixes: Sequence[str], ids: Tensor, device: torch.device
) -> Recording:
    """Run the forward without its blocks; everything outside of them must be in its place.

    Args:
        model: the whole model; its blocks may be on the meta device.
        prefixes: full names of the blocks, in order.
        ids: int64 [N, T].

    Raises:
        CheckpointError: the forward does something to hidden states between two blocks.
    """
    features, on_device = hidden_features(model), device.type == "cuda"
    step = windows_at_once(features, ids.shape[1], on_device=on_device)
    for in_tuple in (False, True):
        hidden, calls = [], []
        for start in range(0, len(ids), step):
            batch = ids[start : start + step].to(device)
            found = _dry_run(model, prefixes, batch, in_tuple)
            if found is None:
                break
            hidden.append(found[0].cpu())
            calls.append(found[1])
        else:
            return Recording(torch.cat(hidden), step, tuple(calls), in_tuple)
    raise CheckpointError(
        f"{type(model).__name__} cannot be measured block by block: its forward changes hidden "
        f"states between blocks; name the schemes in the recipe in the place of auto, and take "
        f"another quantize.effort than best"
    )


def run_block(
    model: nn.Module,
    prefixes: Sequence[str],
    index: int,
    recording: Recording,
    hidden: Tensor,
    device: torch.device,
    *,
    in_place: bool = False,
) -> Tensor:
    """Return the output [N, T, H] of a block, on the CPU as its input is.

    With `in_place` the output takes the place of the input.
    """
    block = model.get_submodule(prefixes[index])
    outputs = hidden if in_place else torch.empty_like(hidden)
    step = recording.windows_at_once
    for number, calls in enumerate(recording.calls):
        batch, call = slice(number * step, (number + 1) * step), calls[index]
        output = block(hidden[batch].to(device), *call.args, **call.kwargs)
        outputs[batch] = output[0] if isinstance(output, tuple) else output
    return outputs


def compute_logits(
    model: nn.Module, prefixes: Sequence[str], hidden: Tensor, in_tuple: bool
) -> Tensor:
    """Return the logits [S, V] of hidden states [S, H] behind the last block."""
    batch = hidden.unsqueeze(0)

    def stand_in(*_: Any, **__: Any) -> Any:
        return (batch,) if in_tuple else batch

    with _standing_in(model, dict.fromkeys(prefixes, stand_in)):
        output = model(inputs_embeds=batch, use_cache=False)
    logits: Tensor = output.logits.squeeze(0)
    return logits


def _dry_run(
    model: nn.Module, prefixes: Sequence[str], ids: Tensor, in_tuple: bool
) -> tuple[Tensor, tuple[_Call, ...]] | None:
    """Return what the first block is given and all calls; None where hidden states change."""
    calls: list[_Call] = []
    given: list[Tensor] = []

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, rest = args[0], args[1:]
        else:
            hidden, rest = kwargs.pop("hidden_states"), ()
        given.append(hidden)
        calls.append(_Call(rest, kwargs))
        return (hidden,) if in_tuple else hidden

    with _standing_in(model, dict.fromkeys(prefixes, stand_in)):
        decoder = getattr(model, cast(Any, model).base_model_prefix, model)
        try:
            decoder(input_ids=ids, use_cache=False)
        except (AttributeError, IndexError, TypeError, ValueError):
            # What a forward raises that expects its blocks to return something else.
            if not given:
                raise
            return None
    if len(given) != len(prefixes) or any(hidden is not given[0] for hidden in given):
        return None
    return given[0], tuple(calls)


@contextmanager
def _standing_in(model: nn.Module, forwards: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of modules for a while."""
    modules = [model.get_submodule(name) for name in forwards]
    try:
        for module, forward in zip(modules, forwards.values(), strict=True):
            # An attribute of the measurement's own model: the class keeps its forward.
            module.forward = forward
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def place_block(
    model: nn.Module, checkpoint: Checkpoint, prefix: str, device: torch.device
) -> dict[str, Tensor]:
    """Read a block into its modules, in float32; return its tensors as the checkpoint has them."""
    tensors = {
        name: read_tensor(checkpoint, name).to(device)
        for name in checkpoint.tensors
        if name.startswith(f"{prefix}.")
    }
    for name, owner, leaf in _slots(model.get_submodule(prefix)):
        if f"{prefix}.{name}" in tensors:
            _place(owner, leaf, tensors[f"{prefix}.{name}"], device)
    return tensors


def place_outside(
    model: nn.Module, checkpoint: Checkpoint, prefixes: Sequence[str], device: torch.device
) -> None:
    """Read what stands outside of the blocks, in float32; tied tensors become two."""
    ties = tied_names(model)
    inside = tuple(f"{prefix}." for prefix in prefixes)
    for name, owner, leaf in _slots(model):
        source = name if name in checkpoint.tensors else ties.get(name)
        if source and source in checkpoint.tensors and not name.startswith(inside):
            _place(owner, leaf, read_tensor(checkpoint, source), device)
        elif leaf in owner._buffers:
            _place(owner, leaf, cast(Tensor, owner._buffers[leaf]), device)


def _slots(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """List the places of tensors: full name, owner, and the name within the owner."""
    return [
        (f"{name}.{leaf}" if name else leaf, owner, leaf)
        for name, owner in module.named_modules()
        for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items())
        if tensor is not None
    ]


def _place(owner: nn.Module, leaf: str, tensor: Tensor, device: torch.device) -> None:
    """Put a tensor in the place of a parameter, in float32, or of a buffer as it is."""
    value = tensor.to(device)
    put(owner, leaf, value.float() if leaf in owner._parameters else value)
