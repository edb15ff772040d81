"""Which runtimes can serve a stored model, and where that was read.

The facts are those of transformers with compressed-tensors 0.17 and of vLLM 0.32; the files named
are theirs. "vllm-cuda" is vLLM on NVIDIA GPUs, "vllm-cpu" its CPU build on x86.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from quantkit.formats.layouts import Layout, find_misfits, name_scheme
from quantkit.formats.reader_rules import ClaimedLayer, find_fused
from quantkit.schemes import BLOCK_SIZE

Serves = Literal["yes", "partly", "no"]
"""`partly`: it loads, and computes something else than the scheme says."""

RUNTIMES = ("transformers", "vllm-cuda", "vllm-cpu")


@dataclass(frozen=True)
class Answer:
    """What a runtime makes of a scheme, of a cache or of a layer."""

    serves: Serves
    words: str
    source: str
    """File of the runtime that says so."""
    what: str = ""
    """The scheme, the cache or the layer."""


@dataclass(frozen=True)
class RuntimeSupport:
    """Whether a runtime can serve a model: the worst of its answers."""

    runtime: str
    serves: Serves
    answers: tuple[Answer, ...]


_EMULATED = "weights are decoded to 16 bits, the rounding of inputs is emulated"
_DECODED = "weights are decoded to 16 bits"
_CT = "compressed_tensors/quantization/lifecycle/forward.py"
_PACKED_CPU = "kernels/linear/mixed_precision/cpu.py"
_SCALED_CPU = "kernels/linear/scaled_mm/cpu.py"
_WNA16 = "compressed_tensors/schemes/compressed_tensors_wNa16.py"
_FOUR_BITS_IN_BYTES = "compressed_tensors/schemes/compressed_tensors_w4a8_int.py"
_FOUR_BITS_FP8 = "compressed_tensors/schemes/compressed_tensors_w4a8_fp8.py"
_INT8 = "compressed_tensors/schemes/compressed_tensors_w8a8_int8.py"
_FP8 = "compressed_tensors/schemes/compressed_tensors_w8a8_fp8.py"
_INT8_GPUS = "compute capability 7.5 (Turing) to 9.0 (Hopper); CUTLASS has no INT8 from 10.0 on"
_FP8_GPUS = (
    "compute capability 8.9 (Ada, Hopper) or later; from 7.5 on weights only, inputs stay in 16 "
    "bits"
)


_Row = tuple[Serves, str, str]


def _rows(transformers: _Row, cuda: _Row, cpu: _Row) -> tuple[Answer, Answer, Answer]:
    """The answers of `RUNTIMES`, in their order."""
    return Answer(*transformers), Answer(*cuda), Answer(*cpu)


_PACKED_GPU: _Row = ("yes", "compute capability 7.5 (Turing) or later", _WNA16)
_FOUR_BITS_CPU: _Row = ("yes", "with AVX-512", _PACKED_CPU)

SUPPORT: Mapping[str, tuple[Answer, Answer, Answer]] = MappingProxyType(
    {
        "w4a16": _rows(("yes", _DECODED, _CT), _PACKED_GPU, _FOUR_BITS_CPU),
        "w4a16_asym": _rows(
            ("yes", f"{_DECODED}; with compressed-tensors 0.17, not 0.18 to 0.20", _CT),
            _PACKED_GPU,
            _FOUR_BITS_CPU,
        ),
        "w8a16": _rows(
            ("yes", _DECODED, _CT), _PACKED_GPU, ("no", "no kernel for 8-bit weights", _PACKED_CPU)
        ),
        "w4a8": _rows(
            ("yes", _EMULATED, _CT),
            (
                "partly",
                "compute capability 7.5 or later; inputs are rounded with --linear-backend "
                "humming, other kernels leave them in 16 bits",
                "compressed_tensors/schemes/compressed_tensors_wNa8.py",
            ),
            ("partly", "packed codes are taken for w4a16: inputs stay in 16 bits", _PACKED_CPU),
        ),
        "w4a8_fp8": _rows(
            ("yes", _EMULATED, _CT),
            ("yes", "compute capability 9.0 (Hopper) alone", _FOUR_BITS_FP8),
            ("no", "no scheme of its own", "compressed_tensors/compressed_tensors.py"),
        ),
        "w4a8, a byte a code": _rows(
            ("yes", _EMULATED, _CT),
            ("no", "its kernels read packed codes", _FOUR_BITS_IN_BYTES),
            ("yes", "", "kernels/linear/mixed_precision/dynamic_4bit.py"),
        ),
        "w4a8_fp8, a byte a code": _rows(
            ("yes", _EMULATED, _CT),
            ("no", "it reads packed codes", _FOUR_BITS_FP8),
            ("no", "no scheme of its own", "compressed_tensors/compressed_tensors.py"),
        ),
        "w8a8": _rows(
            ("yes", _EMULATED, _CT), ("yes", _INT8_GPUS, _INT8), ("yes", "", _SCALED_CPU)
        ),
        "w8a8_static": _rows(
            ("yes", _EMULATED, _CT),
            ("yes", _INT8_GPUS, _INT8),
            ("yes", "with AMX, one scale a token is taken for the stored one", _SCALED_CPU),
        ),
        "fp8_dynamic": _rows(
            ("yes", _EMULATED, _CT),
            ("yes", _FP8_GPUS, _FP8),
            ("yes", "without AMX-FP8 by torch's kernel", "kernels/linear/scaled_mm/pytorch.py"),
        ),
        "fp8_static": _rows(
            ("yes", _EMULATED, _CT),
            ("yes", _FP8_GPUS, _FP8),
            (
                "no",
                "torch's kernel stops on one input scale beside one weight scale a row",
                "kernels/linear/scaled_mm/pytorch.py",
            ),
        ),
        "fp8_block": _rows(
            ("yes", _EMULATED, _CT),
            ("yes", _FP8_GPUS, _FP8),
            ("partly", "needs AMX; inputs stay in 16 bits without AMX-FP8", _SCALED_CPU),
        ),
    }
)
"""Scheme, and its storage -> what each of `RUNTIMES` makes of it."""

CACHE_SUPPORT: Mapping[str, tuple[Answer, Answer, Answer]] = MappingProxyType(
    {
        "fp8": _rows(
            ("yes", "the rounding of keys and values is emulated", "modeling/kvcache.py"),
            ("yes", "compute capability 8.9 (Ada, Hopper) or later", "v1/attention/backends"),
            (
                "yes",
                "with AVX-512 or AMX, and a head_dim that 32 divides",
                "v1/attention/backends/cpu_attn.py",
            ),
        ),
        "fp8_per_head": _rows(
            ("yes", "the rounding of keys and values is emulated", "modeling/kvcache.py"),
            (
                "yes",
                "with FlashAttention 3 or later (Hopper, data-centre Blackwell) alone",
                "v1/attention/backends/flash_attn.py",
            ),
            (
                "partly",
                "takes the largest scale for all heads",
                "compressed_tensors/compressed_tensors.py",
            ),
        ),
    }
)
"""Key/value cache -> what each of `RUNTIMES` makes of it."""

_CPU_MULTIPLE = 32
_MARLIN_GROUPS = (None, 32, 64, 128)
_ORDER: tuple[Serves, ...] = ("no", "partly", "yes")
_UNKNOWN = _rows(*(("no", "not known", "") for _ in RUNTIMES))


def find_support(claimed: Sequence[ClaimedLayer], kv_cache: str) -> tuple[RuntimeSupport, ...]:
    """Say for each runtime what it makes of a model with such layers and such a cache."""
    quantized = [layer for layer in claimed if layer.layout is not None]
    schemes = dict.fromkeys(_name_storage(layer.layout) for layer in quantized if layer.layout)
    rows = [(scheme, SUPPORT.get(scheme, _UNKNOWN)) for scheme in schemes]
    if kv_cache != "none":
        rows.append((f"kv cache {kv_cache}", CACHE_SUPPORT.get(kv_cache, _UNKNOWN)))
    obstacles = list(_find_obstacles(quantized))
    support = []
    for index, runtime in enumerate(RUNTIMES):
        answers = [replace(answers[index], what=what) for what, answers in rows]
        # The first layer stands for all that the same rule keeps out.
        first = {answer.source: answer for name, answer in reversed(obstacles) if name == runtime}
        answers += reversed(first.values())
        found = {answer.serves for answer in answers}
        serves = next((each for each in _ORDER if each in found), _ORDER[-1])
        support.append(RuntimeSupport(runtime, serves, tuple(answers)))
    return tuple(support)


def _name_storage(layout: Layout) -> str:
    """The scheme, and how it is stored where that decides who can serve it."""
    name = name_scheme(layout)
    return name if layout.packed or layout.bits == 8 else f"{name}, a byte a code"


def _find_obstacles(quantized: Iterable[ClaimedLayer]) -> Iterator[tuple[str, Answer]]:
    """Yield (runtime, answer) for layers whose shape or group it cannot serve."""
    layers = {layer.name: layer for layer in quantized}
    for layer in layers.values():
        if layer.layout is not None:
            yield from _check_layer(layer, layer.layout)
    for members in find_fused(layers):
        for name in members[:-1]:
            layout, (rows, _) = layers[name].layout, layers[name].shape
            if layout is not None and layout.block is not None and rows % layout.block[0]:
                words = f"it has {rows} rows, and blocks of layers that are fused must be whole"
                answer = Answer("no", words, "quantization/utils/fp8_utils.py", name)
                yield "vllm-cuda", answer
                yield "vllm-cpu", answer


def _check_layer(layer: ClaimedLayer, layout: Layout) -> Iterator[tuple[str, Answer]]:
    rows, columns = layer.shape
    misfit = next(find_misfits(layout, rows, columns), None)
    if misfit is not None:
        yield "transformers", Answer("no", misfit, _CT, layer.name)
    if layout.packed and (rows % _CPU_MULTIPLE or columns % _CPU_MULTIPLE):
        words = f"{rows} x {columns} is not made of multiples of {_CPU_MULTIPLE}"
        yield "vllm-cpu", Answer("no", words, _PACKED_CPU, layer.name)
    if layout.packed and layout.group_size not in _MARLIN_GROUPS:
        words = f"groups of {layout.group_size}; Marlin has 32, 64, 128 and whole rows"
        yield (
            "vllm-cuda",
            Answer("no", words, "kernels/linear/mixed_precision/marlin.py", layer.name),
        )
    if name_scheme(layout) == "w4a8_fp8" and (
        layout.group_size != BLOCK_SIZE or rows % BLOCK_SIZE or columns % BLOCK_SIZE
    ):
        words = (
            f"{rows} x {columns} in groups of {layout.group_size or columns}; the kernel has "
            f"groups of {BLOCK_SIZE} and multiples of it"
        )
        yield (
            "vllm-cuda",
            Answer("no", words, "kernels/linear/mixed_precision/cutlass.py", layer.name),
        )
