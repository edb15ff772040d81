"""How compressed-tensors stores one linear layer: which tensors, their dtypes and shapes.

In place of a layer's `weight` [O, I], with G groups along I, stand, packed (`pack-quantized`):

    weight_packed      int32 [O, ceil(I * bits / 32)]   codes, packed along I
    weight_scale       float, shaped as below
    weight_shape       int64 [2]                        O and I
    weight_zero_point  int32 [ceil(O * bits / 32), G]   packed along O; asymmetric schemes only

or plain (`int-quantized`, `float-quantized`):

    weight             int8 or float8_e4m3fn [O, I]     codes
    weight_scale       float, shaped as below
    weight_zero_point  int8, the scale's shape          asymmetric schemes only

and, for static activations, `input_scale` [1]. A scale is [O, G] (group), [O, 1] (channel), [1]
(tensor) or [ceil(O / 128), ceil(I / 128)] (block).

Sources: the compressors of compressed-tensors 0.17 to 0.20 (`compressors/pack_quantized`,
`compressors/naive_quantized`, `quantization/lifecycle/initialize.py`) and the schemes of vLLM 0.32
(`layers/quantization/compressed_tensors/schemes`), which agree on all of it. Which container a
scheme gets: 8-bit codes with rounded activations lie plain; everything else with integer codes is
packed, 4-bit codes with rounded activations too: vLLM reads `w4a8_fp8` so alone
(`compressed_tensors_w4a8_fp8.py`) and `w4a8` on GPUs (`compressed_tensors_wNa8.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from quantkit.schemes import BLOCK_SIZE, SCHEMES, Scheme

WEIGHT, PACKED, SCALE, SHAPE, ZERO_POINT, INPUT_SCALE, INPUT_ZERO_POINT = PARTS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "input_scale",
    "input_zero_point",
)

PACK_QUANTIZED = "pack-quantized"
INT_QUANTIZED = "int-quantized"
FLOAT_QUANTIZED = "float-quantized"
CONTAINERS: Mapping[str, bool] = MappingProxyType(
    {PACK_QUANTIZED: True, INT_QUANTIZED: False, FLOAT_QUANTIZED: False, "naive-quantized": False}
)
"""Format of a group of layers -> whether its codes are packed into words."""

FLOATS = ("BF16", "F16", "F32")
"""safetensors' names of the dtypes that a scale may have."""

Strategy = Literal["tensor", "channel", "group", "block"]


@dataclass(frozen=True)
class InputRounding:
    """How a reader rounds the input of a layer."""

    kind: Literal["int", "float"]
    bits: int
    symmetric: bool
    dynamic: bool
    strategy: str
    """`token`, `group` (columns of a token) or `tensor`."""
    group_size: int | None = None


@dataclass(frozen=True)
class Layout:
    """What a reader must know of a layer in order to find and decode its tensors."""

    packed: bool
    kind: Literal["int", "float"]
    bits: int
    symmetric: bool
    strategy: Strategy
    group_size: int | None = None
    """Columns that share a scale, for the strategy `group`."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale, for the strategy `block`."""
    inputs: InputRounding | None = None
    """None: the input stays in 16 bits."""

    @property
    def format(self) -> str:
        """The readers' name of the container."""
        if self.packed:
            return PACK_QUANTIZED
        return INT_QUANTIZED if self.kind == "int" else FLOAT_QUANTIZED

    @property
    def static(self) -> bool:
        """Whether the scale of the input is stored."""
        return self.inputs is not None and not self.inputs.dynamic


def lay_out(scheme: Scheme, group_size: int | None) -> Layout:
    """Return the layout in which layers of a scheme are written.

    Raises:
        ValueError: the scheme does not quantize, or its group size is missing or too many.
    """
    if scheme.weight_kind == "none":
        raise ValueError(f"layers of the scheme {scheme.name} are not quantized")
    if group_size is not None and not scheme.grouped:
        raise ValueError(f"layers of the scheme {scheme.name} have no groups")
    strategy: Strategy = "channel"
    if scheme.granularity == "block":
        strategy = "block"
    elif group_size is not None:
        strategy = "group"
    return Layout(
        packed=scheme.weight_kind == "int" and (scheme.weight_bits < 8 or not scheme.activations),
        kind=scheme.weight_kind,
        bits=scheme.weight_bits,
        symmetric=scheme.symmetric,
        strategy=strategy,
        group_size=group_size,
        block=(BLOCK_SIZE, BLOCK_SIZE) if strategy == "block" else None,
        inputs=_round_inputs(scheme),
    )


def _round_inputs(scheme: Scheme) -> InputRounding | None:
    activations = scheme.activations
    if activations is None:
        return None
    if not activations.dynamic:
        return InputRounding(activations.kind, 8, True, False, "tensor")
    if scheme.granularity == "block":
        return InputRounding(activations.kind, 8, True, True, "group", BLOCK_SIZE)
    return InputRounding(activations.kind, 8, True, True, "token")


def pack_weights_only(bits: int, symmetric: bool, group_size: int | None) -> Layout:
    """Return the layout of packed integer codes whose inputs stay in 16 bits."""
    strategy: Strategy = "channel" if group_size is None else "group"
    return Layout(True, "int", bits, symmetric, strategy, group_size)


def find_scheme(layout: Layout) -> Scheme | None:
    """Return the scheme with such codes and inputs, or None where quantkit has none.

    The container does not matter, and one scale a tensor is taken for one a row.
    """
    granularity = "channel" if layout.strategy == "tensor" else layout.strategy
    for scheme in SCHEMES.values():
        if scheme.weight_kind == "none":
            continue
        if granularity != scheme.granularity and not (granularity == "channel" and scheme.grouped):
            continue
        known = lay_out(scheme, layout.group_size if scheme.grouped else None)
        if replace(layout, packed=known.packed, strategy=known.strategy) == known:
            return scheme
    return None


def name_scheme(layout: Layout) -> str:
    """Return quantkit's name of the scheme, or one made after its pattern."""
    scheme = find_scheme(layout)
    if scheme is not None:
        return scheme.name
    name = f"w{layout.bits}" if layout.kind == "int" else f"fp{layout.bits}"
    inputs = layout.inputs
    name += "a16" if inputs is None else f"a{inputs.bits}"
    if inputs is not None:
        name += "_fp" if inputs.kind == "float" else ""
        name += "_dynamic" if inputs.dynamic else "_static"
        name += "" if inputs.symmetric else "_asym_inputs"
    return name + ("" if layout.symmetric else "_asym")


def part_shapes(layout: Layout, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a layer with weight [rows, columns]."""
    scale = _scale_shape(layout, rows, columns)
    shapes: dict[str, tuple[int, ...]] = {}
    if layout.packed:
        shapes[PACKED] = (rows, math.ceil(columns * layout.bits / 32))
        shapes[SHAPE] = (2,)
    else:
        shapes[WEIGHT] = (rows, columns)
    shapes[SCALE] = scale
    if not layout.symmetric:
        packed = (math.ceil(rows * layout.bits / 32), *scale[1:])
        shapes[ZERO_POINT] = packed if layout.packed else scale
    if layout.inputs is not None and not layout.inputs.dynamic:
        shapes[INPUT_SCALE] = (1,)
        if not layout.inputs.symmetric:
            shapes[INPUT_ZERO_POINT] = (1,)
    return shapes


def _scale_shape(layout: Layout, rows: int, columns: int) -> tuple[int, ...]:
    if layout.strategy == "tensor":
        return (1,)
    if layout.block is not None:
        return (math.ceil(rows / layout.block[0]), math.ceil(columns / layout.block[1]))
    return (rows, 1 if layout.group_size is None else columns // layout.group_size)


def part_dtypes(layout: Layout) -> dict[str, tuple[str, ...]]:
    """Return the dtypes that readers take for every tensor of a layer, by safetensors' names."""
    codes = "I8" if layout.kind == "int" else "F8_E4M3"
    return {
        WEIGHT: (codes,),
        PACKED: ("I32",),
        SCALE: FLOATS,
        SHAPE: ("I64", "I32"),
        ZERO_POINT: ("I32",) if layout.packed else ("I8",),
        INPUT_SCALE: FLOATS,
        INPUT_ZERO_POINT: ("I8",),
    }


def find_misfits(layout: Layout, rows: int, columns: int) -> Iterator[str]:
    """Say why a weight [rows, columns] cannot be stored so that every reader decodes it right.

    compressed-tensors 0.17 derives the size of blocks from the shape of the scale when it
    decodes (`quantization/lifecycle/forward.py`, `dequantize`): blocks that reach over an edge get
    the wrong scales without a word, and a single block of columns is taken for scales of rows.
    """
    if layout.group_size is not None and columns % layout.group_size:
        yield f"groups of {layout.group_size} do not divide {columns} columns"
    if layout.block is None:
        return
    high, wide = layout.block
    if rows % high or columns % wide:
        yield f"blocks of {high} x {wide} do not divide {rows} x {columns}"
    elif columns == wide and rows > high:
        yield f"{columns} columns are a single block of {high} x {wide}"
