"""What weights and key/value cache take, over how many GPUs, and the context that fits.

Counted: the weights as they are stored, divided evenly over the GPUs, and the cache with every
sequence as long as the context, each in whole pages. Guessed: what the runtime needs besides; a
server that measures itself, as vLLM does, has the last word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from quantkit.capacity import kv_cache_bytes
from quantkit.errors import InputError, ResourceError
from quantkit.report.rounding import format_bytes
from quantkit.schemes import BLOCK_SIZE
from quantkit.serving.records import Machine, MemoryPlan, ServedLayer, Target, Wish

LEAST_CONTEXT = 16
GIB = 1 << 30

_ROW_PARALLEL = frozenset({"o_proj", "down_proj", "out_proj", "dense_4h_to_h", "fc2", "w2"})
"""Layers whose input is divided over GPUs, as vLLM and TGI do; of the others it is the output."""


@dataclass(frozen=True)
class Needs:
    """What a runtime takes of a machine, besides the model."""

    share: float
    """Of each GPU's memory that it may take."""
    bytes_per_value: float
    """Of the key/value cache."""
    base_bytes: int
    """Of the runtime itself, on each GPU."""
    step_tokens: int
    """Tokens that are computed at a time."""
    divides_layers: bool = True
    """Whether GPUs share each layer (tensor parallel), or have layers of their own."""


def plan_memory(target: Target, machine: Machine, needs: Needs, wish: Wish) -> MemoryPlan:
    """Return the fewest GPUs that hold the model with the context that is asked for.

    Where no number of them does, all that the model can be divided over, and the longest context
    that they hold at the same concurrency.

    Raises:
        InputError: the context is longer than the model's.
        ResourceError: the weights leave no room for a context.
    """
    asked = choose_context(target, wish.context)
    counts = list(list_divisions(target, machine, needs)) if machine.gpus else [0]
    plans = [_plan(target, machine, needs, wish, asked, count) for count in counts]
    fitting = next((plan for plan in plans if plan.total <= plan.available), None)
    return fitting or _shorten(target, machine, plans[-1])


def choose_context(target: Target, context: int | None) -> int:
    """Return the context to plan for; 8192 or the model's own where none is asked for.

    Raises:
        InputError: the model was not made for so many tokens.
    """
    longest = target.shape.max_positions
    if context is None:
        return target.shape.usual_context
    if context < LEAST_CONTEXT:
        raise InputError(f"--context {context}: a context has at least {LEAST_CONTEXT} tokens")
    if longest is not None and context > longest:
        raise InputError(
            f"--context {context}: {target.name} was made for {longest} tokens at the most"
        )
    return context


def list_divisions(target: Target, machine: Machine, needs: Needs) -> Iterator[int]:
    """Yield over how many GPUs the model can be divided, fewest first; one always does.

    Where they share layers, the number divides the attention heads and the width of the MLP,
    divides or is a multiple of the key/value heads, and cuts no group or block of weights.
    """
    shape = target.shape
    for count in range(1, machine.gpus + 1):
        if not needs.divides_layers:
            if count <= len(shape.layers):
                yield count
            continue
        heads = shape.heads % count == 0 and target.intermediate % count == 0
        cached = shape.kv_heads % count == 0 or count % shape.kv_heads == 0
        if count == 1 or (
            heads and cached and all(_is_divisible(layer, count) for layer in target.layers)
        ):
            yield count


def cache_bytes(target: Target, bytes_per_value: float, context: int, sequences: int) -> int:
    """Return the bytes of the whole cache."""
    return kv_cache_bytes(target.shape, context, sequences, bytes_per_value)


def _is_divisible(layer: ServedLayer, count: int) -> bool:
    rows, columns = layer.shape[-2:]
    by_columns = layer.name.rpartition(".")[2] in _ROW_PARALLEL
    divided = columns if by_columns else rows
    unit = 1
    if layer.sharing == "block":
        unit = BLOCK_SIZE
    elif by_columns and layer.group_size is not None:
        unit = layer.group_size
    return divided % (count * unit) == 0


def _plan(
    target: Target, machine: Machine, needs: Needs, wish: Wish, context: int, count: int
) -> MemoryPlan:
    """The bytes of each GPU where `count` of them are used."""
    parts = max(1, count)
    whole = cache_bytes(target, needs.bytes_per_value, context, wish.concurrency)
    return MemoryPlan(
        available=int(needs.share * machine.memory_bytes),
        weights=-(-target.weight_bytes // parts),
        kv_cache=round(
            whole * (target.shape.cached_share(parts) if needs.divides_layers else 1 / parts)
        ),
        overhead=needs.base_bytes + _activation_bytes(target, needs, wish.concurrency),
        gpus=count,
        context=context,
        concurrency=wish.concurrency,
        asked_context=context,
        bytes_per_value=needs.bytes_per_value,
    )


def _activation_bytes(target: Target, needs: Needs, concurrency: int) -> int:
    """Inputs and outputs of the widest layers in 16 bits, and logits with their softmax."""
    step = needs.step_tokens * 2 * (4 * target.shape.hidden + 2 * target.intermediate)
    return step + concurrency * target.shape.vocabulary * 8


def _shorten(target: Target, machine: Machine, plan: MemoryPlan) -> MemoryPlan:
    """The same with the longest context that fits.

    Raises:
        ResourceError: there is none.
    """
    low, high = 0, plan.context // LEAST_CONTEXT
    while low < high:
        middle = (low + high + 1) // 2
        if _with_context(target, plan, middle * LEAST_CONTEXT).total <= plan.available:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        raise ResourceError(_too_large(target, machine, plan))
    return _with_context(target, plan, low * LEAST_CONTEXT)


def _with_context(target: Target, plan: MemoryPlan, context: int) -> MemoryPlan:
    """`plan` with a cache for another context; windows and pages make it no straight line."""
    full = cache_bytes(target, plan.bytes_per_value, plan.context, plan.concurrency)
    other = cache_bytes(target, plan.bytes_per_value, context, plan.concurrency)
    return replace(
        plan, context=context, kv_cache=round(plan.kv_cache * other / full) if full else 0
    )


def _too_large(target: Target, machine: Machine, plan: MemoryPlan) -> str:
    held = f"{format_bytes(plan.weights)} of weights and {format_bytes(plan.overhead)} besides"
    where = f"{format_bytes(plan.available)} that a server may take of {machine.words}"
    ways = "name a larger --gpu or more --gpus, " if machine.gpus else ""
    if plan.gpus > 1:
        held += f" on each of {plan.gpus} GPUs"
    return (
        f"{target.name} does not fit: {held} leave no room in the {where} for "
        f"{plan.concurrency} sequences; {ways}lower --concurrency, or quantize to fewer bits"
    )
