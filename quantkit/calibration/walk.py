"""The walk: a model's own forward, suspended wherever a layer has to be solved.

Every micro-batch runs transformers' forward in a greenlet of its own (calibration/forwards.py),
which stops in front of each decoder block and of each group of linear layers that share an input.
When all micro-batches wait at the same place, the walk hands the group and the second
moment of its input to the caller, who may replace its weights; then all of them go on with what
stands there. So one forward in all gives every layer statistics that have seen the quantized
layers before it, and no block argument has to be guessed.

Where the key/value cache is to be quantized, the keys and values of each block are watched on
their way, and the walk also stops when all micro-batches have left the block.

Where the original model is to be followed, each micro-batch has a second forward through the
checkpoint's own weights. It is one group ahead: a group's layers are still the checkpoint's when
it passes them. What a group is given then comes with what the original would give it.

Memory: one block's weights and at most one more, read ahead and still in the checkpoint's dtype;
the suspended activations (twice, with the original's), whose place is a choice
(calibration/parking.py); one second moment.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantkit.calibration.attention import choose_attention, replaced_attention
from quantkit.calibration.forwards import (
    Forward,
    advance,
    arrivals,
    end,
    finish_forwards,
    fit_windows_at_once,
    hooked,
    run_through,
    start,
)
from quantkit.calibration.kv import KvWatch, observed_attention
from quantkit.calibration.parking import Parking, Room, parked
from quantkit.calibration.placing import empty, hidden_features, put
from quantkit.calibration.stats import Moment, accumulate, empty_moment, finish
from quantkit.checkpoint.ahead import read_ahead
from quantkit.errors import CheckpointError
from quantkit.numerics.batching import windows_at_once
from quantkit.numerics.memory import return_freed_memory
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
    needs_sample: Callable[[GroupPlan], bool] | None = None,
    kv_cache: KvCachePlan | None = None,
    follow_original: bool = False,
    combine: Callable[[Moment], None] | None = None,
    combine_kv: Callable[[KvStats], KvStats] | None = None,
    first_token: int = 0,
    room: Room | None = None,
    ahead: int = 1,
    probe_batch: bool | None = None,
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
        needs_sample: says whether some tokens themselves are wanted beside it; None: of all groups.
        kv_cache: the attention layers, one a block, whose keys and values are watched; every block
            then ends with a `BlockEnd`.
        follow_original: whether statistics say how far inputs have drifted from the original's.
        combine: is given the sums over all of `windows`, in front of every group whose statistics
            are wanted, and may add to them in place what others have summed over theirs.
        combine_kv: is given what a block's attention layer showed, and returns what counts.
        first_token: how many tokens that count come before those of `windows`, in other walks:
            samples are drawn by the number of a token.
        room: how much suspended forwards may hold and where; None: all stays on the device.
        ahead: how many blocks are read ahead while one is at work; `load_block` runs in a thread.
        probe_batch: whether micro-batches are made smaller until one of them passes the first
            block without running out of memory; None: on CUDA only. On a CPU the outcome would
            otherwise depend on what memory was free.

    Raises:
        CheckpointError: the forward does not meet the blocks and groups in the order of the plan,
            an activation is not finite, or keys and values cannot be watched.
        ResourceError: one window alone is too much, or the disk is full.
    """
    with torch.inference_mode(), hooked(model, blocks, dtype), ExitStack() as stack:
        _place_buffers(model, device)
        _fill(model, load_outside(), device, None)
        watch = None if kv_cache is None else KvWatch(model, kv_cache, device)
        attention = replaced_attention if watch is None else observed_attention
        stack.enter_context(attention(model, choose_attention(device, dtype)))
        count, length = windows.ids.shape
        on_device = device.type == "cuda"
        at_once = windows_at_once(hidden_features(model), length, on_device=on_device)
        at_once = min(count, at_once)
        if on_device if probe_batch is None else probe_batch:
            _fill(model, load_block(blocks[0]), device, dtype)
            at_once = _probe_batch(model, blocks[0], windows, at_once, device, watch is not None)
            empty(model.get_submodule(blocks[0].prefix))
        parking = stack.enter_context(parked(model, room, device))
        observe = None if watch is None else watch.observe
        forwards = start(model, windows, at_once, device, observe)
        originals: list[Forward] = []
        if follow_original:
            overlook = None if watch is None else _overlook
            originals = start(model, windows, at_once, device, overlook, len(forwards))
        stack.callback(end, [*forwards, *originals])
        advance([*forwards, *originals], blocks[0].prefix, parking)
        _empty_embeddings(model)
        reader = stack.enter_context(
            closing(read_ahead(blocks, _pinned(load_block, device), ahead))
        )
        for number, block in enumerate(blocks):
            tensors = _move(next(reader), device)
            _fill(model, tensors, device, dtype)
            groups = [group for group in block.groups if group.solved]
            places = [*(group.linears[0].name for group in groups), *_next(blocks, number)]
            leading = advance(originals, places[0], parking) if places else []
            for position, group in enumerate(groups):
                moment = None
                if needs_stats(block, group):
                    if room is not None and group is groups[-1]:
                        return_freed_memory()
                    sampled = needs_sample is None or needs_sample(group)
                    features = group.linears[0].in_features
                    moment = empty_moment(features, device, sampled=sampled)
                    moment.sample.seen = first_token
                stats = _arrive(forwards, group, moment, leading, parking, combine)
                del moment
                if group is groups[-1]:
                    # Once a block: what is given back has to be asked for again, page by page.
                    return_freed_memory()
                # Before the group is replaced, which is what the caller does at the stop.
                left = places[position + 1 : position + 2]
                leading = advance(originals, left[0], parking) if left else []
                yield GroupStop(block, group, stats, tensors, _replacer(model, device, dtype))
                del stats
            del tensors
            for place in _next(blocks, number):
                advance(forwards, place, parking)
            if watch is not None:
                if number + 1 == len(blocks):
                    finish_forwards(forwards, parking)
                seen = watch.take(block.prefix)
                yield BlockEnd(block, seen if combine_kv is None else combine_kv(seen))
            empty(model.get_submodule(block.prefix))


def _probe_batch(
    model: nn.Module,
    block: BlockPlan,
    windows: TokenWindows,
    at_once: int,
    device: torch.device,
    watched: bool,
) -> int:
    """Return how many windows, `at_once` or fewer, the first block can take at a time.

    Args:
        watched: whether the forwards need an observer of keys and values.

    Raises:
        ResourceError: memory does not suffice for one.
    """

    def look(_: str, inputs: Tensor) -> None:
        accumulate(empty_moment(inputs.shape[-1], device), inputs, None)

    def run(count: int) -> None:
        overlook = _overlook if watched else None
        (forward,) = start(model, _first(windows, count), count, device, overlook)
        run_through(forward, block, look)

    return fit_windows_at_once(run, at_once, windows)


def _first(windows: TokenWindows, count: int) -> TokenWindows:
    return replace(windows, ids=windows.ids[:count], weights=windows.weights[:count])


def _pinned(load_block: LoadBlock, device: torch.device) -> LoadBlock:
    """Read into memory from which a device copies without waiting."""
    if device.type != "cuda":
        return load_block

    def load(block: BlockPlan) -> Mapping[str, Tensor]:
        return {name: tensor.pin_memory() for name, tensor in load_block(block).items()}

    return load


def _move(tensors: Mapping[str, Tensor], device: torch.device) -> Mapping[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def _overlook(_: nn.Module, __: Tensor, ___: Tensor) -> None:
    """The original's keys and values are not those that will be cached."""


def _next(blocks: Sequence[BlockPlan], number: int) -> tuple[str, ...]:
    """Name the place where the block behind this one begins; nothing behind the last one."""
    return tuple(block.prefix for block in blocks[number + 1 : number + 2])


def _arrive(
    forwards: Sequence[Forward],
    group: GroupPlan,
    moment: Moment | None,
    originals: Sequence[tuple[Forward, Tensor | None]],
    parking: Parking,
    combine: Callable[[Moment], None] | None,
) -> LayerStats | None:
    """Let every forward run on to the group and return the statistics of what it brings.

    Args:
        moment: empty sums to add to; None where no statistics are wanted.
        originals: who brings what there in the original model; empty where it is not followed.
        combine: see `walk`.
    """
    first = group.linears[0]
    for number, (forward, inputs) in enumerate(arrivals(forwards, first.name, parking)):
        if moment is None or inputs is None:
            continue
        if originals:
            leading, original = originals[number]
            with parking.shown(leading.number):
                accumulate(moment, inputs, forward.weights, original)
        else:
            accumulate(moment, inputs, forward.weights)
    if moment is None:
        return None
    if combine is not None:
        combine(moment)
    stats = finish(moment)
    # No entry of a second moment is larger than the largest of its diagonal.
    if not bool(stats.second_moment.diagonal().isfinite().all()):
        raise CheckpointError(
            f"the input of {first.name} is not finite: the model overflows on the calibration "
            f"data, so check the checkpoint and its dtype"
        )
    return stats


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
