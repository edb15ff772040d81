"""What a model takes to serve, from its config alone: weights, cache, GPUs, money.

A planning approximation. It counts what can be counted: the bytes of the weights in each format,
and of keys and values. What a runtime takes besides is a flat allowance.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from quantkit.capacity import GPUS, Gpu, ModelShape, find_gpu, kv_cache_bytes, read_shape
from quantkit.capacity.gpus import PRICES_ARE, PRICES_AS_OF
from quantkit.errors import InputError
from quantkit.estimating.records import CacheEstimate, Estimate, GpuEstimate, WeightEstimate
from quantkit.estimating.weights import (
    estimate_from_count,
    estimate_weights,
    read_count,
    read_shapes,
)
from quantkit.ggml_types import GGUF

HOURS_A_MONTH = 730
USABLE = 0.9
"""Share of a GPU's memory that a server fills: vLLM's gpu_memory_utilization by default."""
ALLOWANCE_BYTES = 1_500_000_000
"""For the runtime's kernels, graphs and activations on each GPU."""
COUNTS = (1, 2, 4, 8)
DEFAULT_CONCURRENCY = 8

_CONTEXTS = (4096, 8192, 32_768, 131_072)
_CONCURRENCIES = (1, 8, 32)
_COMPARED = ("BF16", "fp8_dynamic", "w4a16", "Q4_K_M")
"""The weights, by the first word of their names, that GPUs are counted for."""


def estimate(
    model: str | os.PathLike[str],
    *,
    context: int | None = None,
    concurrency: int = DEFAULT_CONCURRENCY,
    gpus: Sequence[str] = (),
    prices: Mapping[str, float] = MappingProxyType({}),
) -> Estimate:
    """Say what a model takes to serve, from its config alone; no weight is read or downloaded.

    Args:
        model: folder, Hub id or id@revision; or a number of weights as `7B`, of which nothing else
            is known.
        context: tokens of each sequence, prompt and answer together; by default 8192, or the
            longest that the model has.
        concurrency: sequences that are served at once.
        gpus: names of the table `quantkit.capacity.GPUS`; by default all.
        prices: GPU -> US dollars an hour, in place of the dated defaults.

    Raises:
        CheckpointError: there is no such model, or transformers cannot build it.
        InputError: a GPU is unknown, or a number makes no sense.
    """
    chosen = _choose_gpus(gpus, prices)
    _check_counts(context, concurrency)
    name = os.fspath(model)
    parameters = read_count(name)
    shape: ModelShape | None = None
    notes: tuple[str, ...] = ()
    if parameters is None:
        shapes = read_shapes(name)
        parameters, weights = shapes.parameters, estimate_weights(shapes)
        shape = read_shape(shapes.config)
        notes = (*shapes.notes, *shape.notes)
        context = _settle_context(shape, context)
    else:
        weights = estimate_from_count(parameters)
        notes = (
            "of a number of weights alone: every weight has the same bits, where real files keep "
            "some in more, and the cache is not known",
        )
        context = None
    return Estimate(
        model=name,
        parameters=parameters,
        weights=weights,
        context=context,
        concurrency=concurrency,
        caches=() if shape is None else _list_caches(shape, context, concurrency),
        gpus=tuple(_count_gpus(chosen, weights, shape, context, concurrency)),
        prices=_name_prices(prices),
        notes=notes,
    )


def _choose_gpus(names: Sequence[str], prices: Mapping[str, float]) -> list[Gpu]:
    """The GPUs that are asked for, with the user's prices in place of the defaults."""
    own = {}
    for name, price in prices.items():
        if not math.isfinite(price) or price < 0:
            raise InputError(f"price of {name}: {price!r} is not a number of dollars an hour")
        own[find_gpu(name).name] = price
    found = [find_gpu(name) for name in names] or list(GPUS.values())
    return [
        Gpu(
            gpu.name,
            gpu.memory_bytes,
            gpu.compute_capability,
            own.get(gpu.name, gpu.hourly_price),
        )
        for gpu in found
    ]


def _check_counts(context: int | None, concurrency: int) -> None:
    for name, value in (("context", context), ("concurrency", concurrency)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: it must be 1 or more")


def _settle_context(shape: ModelShape, asked: int | None) -> int:
    """The context to plan for.

    Raises:
        InputError: the model has no such long one.
    """
    most = shape.max_positions
    if asked is None:
        return shape.usual_context
    if most is not None and asked > most:
        raise InputError(f"context {asked}: the model's config has {most} positions at the most")
    return asked


def _list_caches(
    shape: ModelShape, context: int | None, concurrency: int
) -> tuple[CacheEstimate, ...]:
    """The usual contexts and numbers of sequences, and those asked for."""
    most = shape.max_positions or max(_CONTEXTS)
    contexts = sorted({min(each, most) for each in (*_CONTEXTS, context or shape.usual_context)})
    return tuple(
        CacheEstimate(
            length,
            count,
            kv_cache_bytes(shape, length, count, 2),
            kv_cache_bytes(shape, length, count, 1),
        )
        for length in contexts
        for count in sorted({*_CONCURRENCIES, concurrency})
    )


def _count_gpus(
    gpus: Sequence[Gpu],
    weights: Sequence[WeightEstimate],
    shape: ModelShape | None,
    context: int | None,
    concurrency: int,
) -> list[GpuEstimate]:
    """For each GPU and each of the compared formats, how many suffice."""
    cached = 0
    if shape is not None and context is not None:
        cached = kv_cache_bytes(shape, context, concurrency, 2)
    rows = []
    for gpu in gpus:
        for row in weights:
            if row.name.split()[0] not in _COMPARED:
                continue
            # An FP8 model may be run by older GPUs, whose kernels keep the inputs in 16 bits.
            count = _fewest(gpu, row, cached, shape)
            price = None
            if count is not None and gpu.hourly_price is not None:
                price = count * gpu.hourly_price * HOURS_A_MONTH
            rows.append(GpuEstimate(gpu.name, row.name, count, price))
    return rows


def _fewest(gpu: Gpu, row: WeightEstimate, cached: int, shape: ModelShape | None) -> int | None:
    """The smallest number of GPUs that hold weights and cache; None: none of `COUNTS` does.

    Tensor parallelism deals out the weights evenly, and the cache by key/value heads. llama.cpp's
    files are dealt out by layers, which are as even.
    """
    free = USABLE * gpu.memory_bytes - ALLOWANCE_BYTES
    for count in COUNTS:
        share = 1 / count
        if shape is not None and row.format != GGUF:
            if shape.heads % count:
                continue
            share = shape.cached_share(count)
        if row.size_bytes / count + cached * share <= free:
            return count
    return None


def _name_prices(own: Mapping[str, float]) -> str:
    default = f"{PRICES_ARE}, as of {PRICES_AS_OF}"
    return f"{default}, but for {', '.join(sorted(own))}" if own else default
