"""The walk: a model's own forward, suspended wherever a layer has to be solved.

Every micro-batch runs transformers' forward in a greenlet of its own. Hooks switch back to the
walk in front of each decoder block and in front of each group of linear layers that share an
input. When all micro-batches wait at the same place, the walk hands the group and the second
moment of its input to the caller, who may replace its weights; then all of them go on with what
stands there. So one forward in all gives every layer statistics that have seen the quantized
layers before it, and no block argument has to be guessed.

Where the key/value cache is to be quantized, the keys and values of each block are watched on
their way, and the walk also stops when all micro-batches have left the block.

Where the original model is to be followed, each micro-batch has a second forward through the
checkpoint's own weights. It is one group ahead: a group's layers are still the checkpoint's when
it passes them. What a group is given then comes with what the original would give it.

Memory: one block's weights, the suspended activations (twice, with the original's), one second
moment.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from quantkit.calibration.kv import OBSERVER, KvWatch, Observer, observed_attention
from quantkit.calibration.placing import TOKENS_AT_ONCE, empty, put
from quantkit.calibration.stats import accumulate, empty_moment, finish
from quantkit.errors import CheckpointError
from quantkit.records import (
    BlockPlan,
    GroupPlan,
    KvCachePlan,
    KvStats,
    LayerStats,
    TokenWindows,
)

LoadBlock = Callable[[BlockPlan], Mapping[str, Tensor]]
"""Reads a block's tensors from the checkpoint, by full name."""

LoadOutside = Callable[[], Mapping[str, Tensor]]
"""Reads the tensors outside of the blocks that the forward needs on its way to them."""


@dataclass(frozen=True)
class GroupStop:
    """All micro-batches wait in front of this group.

    tensors: the block's tensors as the checkpoint has them, by full name. `replace` puts a tensor
    in the place of the parameter with the full name (`....q_proj.weight`, `....q_proj.bias`), for
    this stop and all that follows.
    """

    block: BlockPlan
    group: GroupPlan
    stats: LayerStats | None
    tensors: Mapping[str, Tensor]
    replace: Callable[[str, Tensor], None]


@dataclass(frozen=True)
class BlockEnd:
    """All micro-batches have left this block; only there where the cache is watched.

    kv: of the block's attention layer, with the replaced weights of this block in place.
    """

    block: BlockPlan
    kv: KvStats


@dataclass(frozen=True)
class _Arrival:
    """What a suspended forward says: where it waits and, at a group, the group's input."""

    place: str
    inputs: Tensor | None


def walk(
    model: nn.Module,
    blocks: Sequence[BlockPlan],
    load_block: LoadBlock,
    load_outside: LoadOutside,
    windows: TokenWindows,
    *,
    device: torch.device,
    dtype: torch.dtype,
    needs_stats: Callable[[BlockPlan, GroupPlan], bool],
    kv_cache: KvCachePlan | None = None,
    follow_original: bool = False,
) -> Generator[GroupStop | BlockEnd, None, None]:
    """Yield every group with something to quantize, in the order in which the forward meets them.

    A stop is of no use once the next one is asked for: whoever drops it by then keeps the walk to
    one block's weights and one second moment. Close a walk that is not followed to its end.

    Args:
        model: the whole model with its parameters on the meta device.
        blocks: what to visit.
        load_block: reads a block's tensors from the checkpoint; those that the model has no place
            for are left aside.
        load_outside: reads the embedding and what else stands outside of the blocks.
        windows: the calibration tokens.
        device: where the forward runs.
        dtype: what the forward computes in.
        needs_stats: says whether a group's second moment is wanted.
        kv_cache: the attention layers, one a block, whose keys and values are watched; every block
            then ends with a `BlockEnd`.
        follow_original: whether statistics say how far inputs have drifted from the original's.

    Raises:
        CheckpointError: the forward does not meet the blocks and groups in the order of the plan,
            an activation is not finite, or keys and values cannot be watched.
    """
    with torch.inference_mode(), _hooked(model, blocks, dtype), ExitStack() as stack:
        _place_buffers(model, device)
        _fill(model, load_outside(), device, None)
        watch = None if kv_cache is None else KvWatch(model, kv_cache, device)
        if watch is not None:
            stack.enter_context(observed_attention(model))
        forwards = _start(model, windows, device, None if watch is None else watch.observe)
        originals = []
        if follow_original:
            originals = _start(model, windows, device, None if watch is None else _overlook)
        stack.callback(_end, [*forwards, *originals])
        _advance([*forwards, *originals], blocks[0].prefix)
        _empty_embeddings(model)
        for number, block in enumerate(blocks):
            tensors = {name: tensor.to(device) for name, tensor in load_block(block).items()}
            _fill(model, tensors, device, dtype)
            groups = [group for group in block.groups if group.solved]
            places = [*(group.linears[0].name for group in groups), *_next(blocks, number)]
            ahead = _advance(originals, places[0]) if places else []
            for position, group in enumerate(groups):
                stats = _arrive(forwards, group, needs_stats(block, group), device, ahead)
                # Before the group is replaced, which is what the caller does at the stop.
                left = places[position + 1 : position + 2]
                ahead = _advance(originals, left[0]) if left else []
                yield GroupStop(block, group, stats, tensors, _replacer(model, device, dtype))
                del stats
            del tensors
            for place in _next(blocks, number):
                _advance(forwards, place)
            if watch is not None:
                if number + 1 == len(blocks):
                    _finish(forwards)
                yield BlockEnd(block, watch.take(block.prefix))
            empty(model.get_submodule(block.prefix))


@dataclass(frozen=True)
class _Forward:
    run: greenlet
    weights: Tensor | None


def _start(
    model: nn.Module, windows: TokenWindows, device: torch.device, observer: Observer | None
) -> list[_Forward]:
    """Make one forward for each micro-batch; none has begun to run."""
    count, length = windows.ids.shape
    step = max(1, TOKENS_AT_ONCE[device.type] // length)
    decoder = getattr(model, cast(Any, model).base_model_prefix, model)
    options = {} if observer is None else {OBSERVER: observer}
    all_count = bool((windows.weights == 1).all())
    forwards = []
    for start in range(0, count, step):
        ids = torch.from_numpy(windows.ids[start : start + step]).to(device)
        weights = None
        if not all_count:
            weights = torch.from_numpy(windows.weights[start : start + step]).to(device)
        forwards.append(_Forward(greenlet(_runner(decoder, ids, options)), weights))
    return forwards


def _overlook(_: nn.Module, __: Tensor, ___: Tensor) -> None:
    """The original's keys and values are not those that will be cached."""


def _end(forwards: Sequence[_Forward]) -> None:
    """End the forwards where they stand: nothing behind the last stop is needed."""
    for forward in forwards:
        forward.run.throw(GreenletExit)


def _finish(forwards: Sequence[_Forward]) -> None:
    """Let every forward run to its end."""
    for forward in forwards:
        arrival = forward.run.switch()
        if isinstance(arrival, _Arrival):
            raise CheckpointError(
                f"the model's forward came to {arrival.place} where the plan expected its end: "
                f"its family data does not describe it"
            )


def _runner(decoder: nn.Module, ids: Tensor, options: Mapping[str, Any]) -> Callable[[], None]:
    def run() -> None:
        decoder(input_ids=ids, use_cache=False, **options)

    return run


def _next(blocks: Sequence[BlockPlan], number: int) -> tuple[str, ...]:
    """Name the place where the block behind this one begins; nothing behind the last one."""
    return tuple(block.prefix for block in blocks[number + 1 : number + 2])


def _advance(forwards: Sequence[_Forward], place: str) -> list[Tensor | None]:
    """Let every forward run on to `place` and return what each brings there."""
    return [_resume(forward, place).inputs for forward in forwards]


def _arrive(
    forwards: Sequence[_Forward],
    group: GroupPlan,
    wanted: bool,
    device: torch.device,
    originals: Sequence[Tensor | None],
) -> LayerStats | None:
    """Let every forward run on to the group and return the statistics of what it brings.

    Args:
        originals: what the original model brings there; empty where it is not followed.
    """
    first = group.linears[0]
    moment = empty_moment(first.in_features, device) if wanted else None
    for number, forward in enumerate(forwards):
        inputs = _resume(forward, first.name).inputs
        if moment is not None and inputs is not None:
            original = originals[number] if originals else None
            accumulate(moment, inputs, forward.weights, original)
    if moment is None:
        return None
    _return_freed_memory()
    stats = finish(moment)
    # No entry of a second moment is larger than the largest of its diagonal.
    if not bool(stats.second_moment.diagonal().isfinite().all()):
        raise CheckpointError(
            f"the input of {first.name} is not finite: the model overflows on the calibration "
            f"data, so check the checkpoint and its dtype"
        )
    return stats


def _return_freed_memory() -> None:
    """Give the holes between suspended activations back to the system, where the C library can."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _resume(forward: _Forward, place: str) -> _Arrival:
    arrival = forward.run.switch()
    if not isinstance(arrival, _Arrival) or arrival.place != place:
        found = arrival.place if isinstance(arrival, _Arrival) else "its end"
        raise CheckpointError(
            f"the model's forward came to {found} where the plan expected {place}: "
            f"its family data does not describe it"
        )
    return arrival


@contextmanager
def _hooked(model: nn.Module, blocks: Sequence[BlockPlan], dtype: torch.dtype) -> Iterator[None]:
    """Suspend forwards at the blocks and groups; remove all hooks afterwards."""
    walker = getcurrent()
    handles = []

    def at_block(place: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            walker.switch(_Arrival(place, None))
            return tuple(_cast(arg, dtype) for arg in args), {
                name: _cast(value, dtype) for name, value in kwargs.items()
            }

        return hook

    def at_group(place: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            walker.switch(_Arrival(place, args[0]))

        return hook

    def at_embedding(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return _cast(output, dtype)

    try:
        embedding = cast(Any, model).get_input_embeddings()
        handles.append(embedding.register_forward_hook(at_embedding))
        for block in blocks:
            module = model.get_submodule(block.prefix)
            handles.append(
                module.register_forward_pre_hook(at_block(block.prefix), with_kwargs=True)
            )
            for group in block.groups:
                if group.solved:
                    first = group.linears[0].name
                    linear = model.get_submodule(first)
                    handles.append(linear.register_forward_pre_hook(at_group(first)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Bring hidden states (and rotary tables) to the compute dtype; leave all else alone."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value


def _place_buffers(model: nn.Module, device: torch.device) -> None:
    """Rotary frequencies and the like are real from the start, but on the CPU."""
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)


def _fill(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Put the checkpoint's tensors in the place of the meta parameters of the same names.

    Old checkpoints have tensors that today's modules compute by themselves (`rotary_emb.inv_freq`);
    the plan names whatever has no place in the model.
    """
    modules = dict(model.named_modules())
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = modules.get(owner)
        if module is None:
            continue
        value = tensor.to(device=device, dtype=dtype or tensor.dtype)
        put(module, leaf, value)


def _empty_embeddings(model: nn.Module) -> None:
    """Every forward has looked its tokens up: the tables are not needed any more."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            empty(module)


def _replacer(
    model: nn.Module, device: torch.device, dtype: torch.dtype
) -> Callable[[str, Tensor], None]:
    def replace(name: str, tensor: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if module._parameters.get(leaf) is None:
            raise ValueError(f"{name} is no parameter of the model")
        put(module, leaf, tensor.to(device=device, dtype=dtype))

    return replace
