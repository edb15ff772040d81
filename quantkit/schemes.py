"""Schemes, methods, formats and runtimes: what exists, and what fits what.

The literal tables in this file are the only place that knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

Rounder = Literal["rtn", "search", "gptq", "custom"]
"""`custom`: the function that a `Method` brings."""
Transform = Literal["awq", "smoothquant"]
Granularity = Literal["none", "group", "channel", "block"]
"""What shares a scale: `group_size` columns of a row, a row, or a block of 128 x 128."""


@dataclass(frozen=True)
class Activations:
    """How the input of a linear layer is rounded, always to eight bits and symmetrically.

    Dynamic: one scale a token (a token's 128 columns for the granularity `block`), computed as
    the server runs. Static: one scale a layer, from calibration.
    """

    kind: Literal["int", "float"]
    dynamic: bool


@dataclass(frozen=True)
class Scheme:
    """How the weights (and activations) of one linear layer are stored.

    Integer weights use the signed convention of compressed-tensors: codes and zero points lie in
    [-2**(bits-1), 2**(bits-1) - 1] and a weight is `scale * (code - zero_point)`. Floating-point
    codes are float8_e4m3fn and a weight is `scale * code`.
    """

    name: str
    weight_bits: int
    symmetric: bool
    weight_kind: Literal["int", "float", "none"]
    granularity: Granularity
    """`group` is the only one that a recipe's `group_size` applies to."""
    activations: Activations | None
    """None: the input stays in 16 bits."""
    summary: str
    built: bool = True

    @property
    def grouped(self) -> bool:
        """Whether `group_size` applies."""
        return self.granularity == "group"

    @property
    def static(self) -> bool:
        """Whether the input's scale comes from calibration."""
        return self.activations is not None and not self.activations.dynamic


@dataclass(frozen=True)
class Solver:
    """A user's own function that chooses codes (docs/python.md, "Your own solver").

    function: called with the weight float32 [O, I], the `LayerStats` of its input or None, and the
    `WeightForm` that is asked for; returns a `SolvedWeight`.
    needs_statistics: whether it looks at the statistics, for which there must be calibration data.
    """

    function: Callable[..., Any]
    needs_statistics: bool = False


@dataclass(frozen=True)
class Method:
    """How codes are chosen: an optional equivalent transform, then a rounder."""

    name: str
    transform: Transform | None
    rounder: Rounder
    needs_calibration: bool
    summary: str
    built: bool = True
    solver: Solver | None = None
    """Of the rounder `custom`."""


@dataclass(frozen=True)
class Effort:
    """How long a job may look for better codes.

    beam_width: roundings of a row that error-compensated rounding follows at a time.
    polish_sweeps: passes of coordinate descent after it. whole_model: whether rounding knows what
    the outputs of each layer mean to the whole model, from a pass back through it, and makes up for
    the layers before.
    """

    name: str
    beam_width: int
    polish_sweeps: int
    whole_model: bool
    summary: str


def _table(*rows: Scheme) -> Mapping[str, Scheme]:
    return MappingProxyType({row.name: row for row in rows})


def _methods(*rows: Method) -> Mapping[str, Method]:
    return MappingProxyType({row.name: row for row in rows})


def _efforts(*rows: Effort) -> Mapping[str, Effort]:
    return MappingProxyType({row.name: row for row in rows})


_INT8 = Activations("int", dynamic=True)
_INT8_STATIC = Activations("int", dynamic=False)
_FP8 = Activations("float", dynamic=True)
_FP8_STATIC = Activations("float", dynamic=False)

SCHEMES: Mapping[str, Scheme] = _table(
    Scheme("none", 16, True, "none", "none", None, "left in the checkpoint's 16-bit precision"),
    Scheme("w4a16", 4, True, "int", "group", None, "4-bit symmetric weights, 16-bit activations"),
    Scheme("w4a16_asym", 4, False, "int", "group", None, "4-bit weights with zero points"),
    Scheme("w8a16", 8, True, "int", "group", None, "8-bit symmetric weights, 16-bit activations"),
    Scheme("w4a8", 4, True, "int", "group", _INT8, "4-bit weights, INT8 activations"),
    Scheme("w4a8_fp8", 4, True, "int", "group", _FP8, "4-bit weights, FP8 activations"),
    Scheme("w8a8", 8, True, "int", "channel", _INT8, "INT8 weights, dynamic INT8 activations"),
    Scheme(
        "w8a8_static", 8, True, "int", "channel", _INT8_STATIC, "INT8, static activation scales"
    ),
    Scheme("fp8_dynamic", 8, True, "float", "channel", _FP8, "FP8, dynamic activations"),
    Scheme("fp8_static", 8, True, "float", "channel", _FP8_STATIC, "FP8, static activations"),
    Scheme("fp8_block", 8, True, "float", "block", _FP8, "FP8 in blocks of 128 x 128"),
)

METHODS: Mapping[str, Method] = _methods(
    Method("rtn", None, "rtn", False, "round to nearest; no calibration"),
    Method("gptq", None, "gptq", True, "error-compensated rounding under the second moment"),
    Method("awq", "awq", "search", True, "activation-aware scaling, then clipped rounding"),
    Method("awq+gptq", "awq", "gptq", True, "activation-aware scaling, then gptq"),
    Method("smoothquant", "smoothquant", "rtn", True, "activation smoothing, then rounding"),
    Method("smoothquant+gptq", "smoothquant", "gptq", True, "activation smoothing, then gptq"),
)


def add_solvers(solvers: Mapping[str, Solver]) -> Mapping[str, Method]:
    """Return the methods that a recipe may name: the built ones, and each solver alone and behind
    each transform."""
    own = [
        Method(
            name if transform is None else f"{transform}+{name}",
            transform,
            "custom",
            solver.needs_statistics or transform is not None,
            "a solver of the caller's own",
            solver=solver,
        )
        for name, solver in solvers.items()
        for transform in (None, *get_args(Transform))
    ]
    return _methods(*METHODS.values(), *own) if own else METHODS


BEST_METHODS: Mapping[str, str] = MappingProxyType(
    {
        "none": "rtn",
        "w4a16": "awq+gptq",
        "w4a16_asym": "awq+gptq",
        "w8a16": "gptq",
        "w4a8": "smoothquant+gptq",
        "w4a8_fp8": "awq+gptq",
        "w8a8": "smoothquant+gptq",
        "w8a8_static": "smoothquant+gptq",
        "fp8_dynamic": "gptq",
        "fp8_static": "gptq",
        "fp8_block": "gptq",
    }
)
"""Scheme -> what `method: best` stands for: the method that measured best (docs/methods.md)."""

EFFORTS: Mapping[str, Effort] = _efforts(
    Effort("fast", 1, 0, False, "one pass of each solver"),
    Effort("normal", 1, 2, False, "codes and scales are polished"),
    Effort("best", 16, 4, True, "rounded for the whole model, from a pass back through it"),
)

GROUP_SIZES = (32, 64, 128)
"""Columns that share a scale; besides these, `channel` means one scale per output row."""

ONNX_GROUP_SIZES = (16, *GROUP_SIZES)
"""The same for ONNX graphs."""

ONNX_CHANNEL_BLOCK = 128
"""Columns of a block in ONNX graphs, where a scale for a whole row is repeated for each block."""

ONNX_TABLE_BLOCK = 32
"""The same for embeddings and output layers in four or eight bits, which are rounded without data.
"""

BLOCK_SIZE = 128
"""Rows and columns that share a scale in the granularity `block`."""

KV_CACHES: Mapping[str, bool] = MappingProxyType({"none": True, "fp8": True, "fp8_per_head": True})
"""KV-cache precision -> built. `fp8`: one scale for K and one for V a layer; `fp8_per_head`: one a
key/value head."""

ONNX = "onnx"
MODELOPT = "modelopt"

MODELOPT_ALGORITHMS: Mapping[str, str] = MappingProxyType(
    {
        "fp8_static": "FP8",
        "fp8_dynamic": "FP8_PER_CHANNEL_PER_TOKEN",
        "w4a16": "W4A16_AWQ",
        "w8a8_static": "W8A8_SQ_PER_CHANNEL",
    }
)
"""Scheme -> TensorRT-LLM's name of it (`quant_algo`)."""

MODELOPT_GROUP_SIZES = (64, 128)
"""Columns that share a scale in TensorRT-LLM's kernels for W4A16_AWQ."""

FORMATS: Mapping[str, bool] = MappingProxyType(
    {"compressed-tensors": True, "gguf": True, ONNX: True, MODELOPT: True}
)
"""Export format -> built."""

RUNTIMES: Mapping[str, bool] = MappingProxyType(
    {"auto": True, "transformers": True, "vllm": True, "llama.cpp": True, "onnxruntime": True}
)
"""Runtime of the gate -> built."""

FORMAT_SCHEMES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "compressed-tensors": frozenset(SCHEMES),
        # Decoders: MatMulNBits has weights in groups and no rounded activations.
        ONNX: frozenset({"none", "w4a16", "w4a16_asym", "w8a16"}),
        MODELOPT: frozenset({"none", *MODELOPT_ALGORITHMS}),
    }
)
"""Export format -> the schemes that its readers have."""

ENCODER_SCHEMES = frozenset({"none", "w8a8", "w8a8_static"})
"""The schemes that encoders have, in ONNX: one scale for all inputs of a layer, dynamic or static,
and one for each row of a weight."""

RUNTIME_NOTES: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("w4a16_asym", "transformers"): "transformers loads zero points with compressed-tensors "
        "0.17, not with 0.18 to 0.20",
        ("w8a16", "vllm-cpu"): "vLLM's CPU build has no W8A16 kernel; its GPU build and "
        "transformers have one",
        ("w4a8", "vllm"): "vLLM rounds the inputs of w4a8 on GPUs with --linear-backend humming "
        "alone; its other kernels, and its CPU build, leave them in 16 bits",
        ("w4a8_fp8", "vllm"): "vLLM serves w4a8_fp8 on Hopper GPUs alone, with group_size 128 and "
        "layers whose sizes 128 divides",
        ("w8a8", "vllm-cuda"): "vLLM serves INT8 inputs on GPUs of compute capability 7.5 to 9.0 "
        "(Turing to Hopper), not on Blackwell",
        ("w8a8_static", "vllm-cuda"): "vLLM serves INT8 inputs on GPUs of compute capability 7.5 "
        "to 9.0 (Turing to Hopper), not on Blackwell",
        ("w8a8_static", "vllm-cpu"): "vLLM's CPU build takes a scale for each token in place of "
        "the stored one where the CPU has AMX",
        ("fp8_dynamic", "vllm-cuda"): "vLLM rounds inputs to FP8 on GPUs of compute capability 8.9 "
        "(Ada, Hopper) or later; older ones leave them in 16 bits",
        ("fp8_static", "vllm-cuda"): "vLLM rounds inputs to FP8 on GPUs of compute capability 8.9 "
        "(Ada, Hopper) or later; older ones leave them in 16 bits",
        ("fp8_static", "vllm-cpu"): "vLLM's CPU build cannot run fp8_static; it has fp8_dynamic",
        ("fp8_block", "vllm-cuda"): "vLLM rounds inputs to FP8 on GPUs of compute capability 8.9 "
        "(Ada, Hopper) or later; older ones leave them in 16 bits",
        ("fp8_block", "vllm-cpu"): "vLLM's CPU build needs AMX for fp8_block",
    }
)
"""(scheme, runtime) -> what a plan should tell its reader."""

RUNTIME_SCHEMES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "transformers": frozenset(SCHEMES),
        "vllm": frozenset(SCHEMES),
        "onnxruntime": frozenset({"none", "w4a16", "w4a16_asym", "w8a16"}),
        # Its files have types of their own (quantkit/ggml_types.py).
        "llama.cpp": frozenset({"none"}),
    }
)
"""Runtime -> the schemes that it has on some machine; RUNTIME_NOTES says what it needs for them."""
