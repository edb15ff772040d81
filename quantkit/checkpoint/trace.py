"""The decoder blocks of a model that no data file describes, found by tracing its forward.

A model of zeros runs a few tokens. Its linear layers note where their input lies in memory instead
of multiplying, so that a trace costs neither time nor memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import build_unchecked
from quantkit.errors import CheckpointError
from quantkit.records import FoldPlan

_TRACED_TOKENS = 4
# A router picks experts by small differences; 4 bits would reroute tokens, to save nothing.
_ROUTERS = frozenset({"gate", "router"})

InputKey = tuple[int, int, tuple[int, ...], int]
"""Where an input lies in memory, its shape, and how often it was written: equal for one input."""


@dataclass(frozen=True)
class InputGroup:
    """Linear layers, by their full names, that read the same input."""

    linears: tuple[str, ...]
    fold: FoldPlan | None


@dataclass(frozen=True)
class BlockStructure:
    """One decoder block: its groups in the order in which the forward reaches them.

    fused: full names of layers that vLLM makes one of. attention: full name of the module that
    caches keys and values; None where it is not known.
    """

    prefix: str
    groups: tuple[InputGroup, ...]
    fused: tuple[tuple[str, ...], ...]
    attention: str | None = None


def trace_blocks(checkpoint: Checkpoint) -> tuple[BlockStructure, ...]:
    """Find the blocks and groups of a model by one forward through a model of zeros.

    Raises:
        CheckpointError: there is no list of decoder blocks, or the forward fails.
    """
    model = build_unchecked(checkpoint, experts="eager")
    tokens = torch.zeros((1, _TRACED_TOKENS), dtype=torch.int64)
    try:
        calls = record_calls(model, {"input_ids": tokens, "use_cache": False})
    except CheckpointError as error:
        raise CheckpointError(
            f"{checkpoint.source.name}: {error}; a family file can describe it"
        ) from error.__cause__
    prefix, count = _find_blocks(model, calls, checkpoint)
    blocks = []
    for index in range(count):
        inside = f"{prefix}.{index}."
        groups: dict[InputKey, list[str]] = {}
        for name, key in calls.items():
            if key is not None and name.startswith(inside) and not _is_router(name):
                groups.setdefault(key, []).append(name)
        members = [tuple(names) for names in groups.values()]
        fused = tuple(names for names in members if len(names) > 1)
        found = tuple(InputGroup(names, None) for names in members)
        blocks.append(BlockStructure(inside[:-1], found, fused))
    return tuple(blocks)


def _find_blocks(model: nn.Module, calls: Iterable[str], checkpoint: Checkpoint) -> tuple[str, int]:
    """Return the name and the length of the longest list of modules of one class.

    Lists within lists (experts) do not count, nor those that the forward of text does not reach
    (the layers of a vision tower).
    """
    called = tuple(calls)
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(member) for member in module}) == 1
        and any(call.startswith(f"{name}.") for call in called)
    }
    outermost = {
        name: length
        for name, length in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    if not outermost:
        raise CheckpointError(
            f"{checkpoint.source.name}: no list of decoder blocks was found in "
            f"{type(model).__name__}; a family file can describe it"
        )
    return max(outermost.items(), key=lambda item: item[1])


def record_calls(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, InputKey | None]:
    """Run a model of zeros on a few tokens; linear layers only note what they are given.

    Args:
        model: built for this alone; it is of no other use afterwards.
        inputs: arguments of its forward.

    Returns:
        Linear layer -> its input, in the order of the calls; None where calls differ.

    Raises:
        CheckpointError: the forward fails.
    """
    calls: dict[str, InputKey | None] = {}
    kept: list[Tensor] = []  # As long as an input lives, no other can lie in its place.
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            _listen(name, module, calls, kept)
    _fill_with_zeros(model)
    try:
        with torch.no_grad():
            model(**inputs)
    except (
        AttributeError,
        ImportError,
        IndexError,
        KeyError,
        NotImplementedError,
        OverflowError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{type(model).__name__} cannot be traced ({reason})") from error
    return calls


def _listen(
    name: str, module: nn.Linear, calls: dict[str, InputKey | None], kept: list[Tensor]
) -> None:
    """Let a layer note its inputs in `calls`."""

    def note(inputs: Tensor) -> None:
        key = (
            inputs.untyped_storage().data_ptr(),
            int(inputs.storage_offset()),
            tuple(inputs.shape[-1:]),
            inputs._version,
        )
        kept.append(inputs)
        calls[name] = key if calls.get(name, key) == key else None

    def stand_in(inputs: Tensor) -> Tensor:
        note(inputs)
        return inputs.new_zeros((*inputs.shape[:-1], module.out_features))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # What returns something else (a router's choice) is no matrix product.
        if args and isinstance(output, Tensor) and output.shape[-1:] == (module.out_features,):
            note(args[0])

    if type(module).forward is nn.Linear.forward:
        # An attribute of a throw-away model's own module: its matrix is never multiplied.
        module.forward = stand_in  # type: ignore[assignment,method-assign]
    else:
        module.register_forward_hook(after)


def _fill_with_zeros(model: nn.Module) -> None:
    """Give every parameter its shape over a single zero: real values, no memory."""
    for module in model.modules():
        for leaf, parameter in _own_parameters(module):
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module._parameters[leaf] = nn.Parameter(zeros, requires_grad=False)


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)


def _is_router(name: str) -> bool:
    return name.rpartition(".")[2] in _ROUTERS
