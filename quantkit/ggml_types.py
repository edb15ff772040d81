"""The block types of ggml, in which GGUF files hold their tensors: one table.

Sizes and ids are those of ggml-common.h and ggml.h of llama.cpp (build 11549). A weight is

    weight = scale * code + minimum

with a scale, and a minimum where the type has one, for each sub-block. In the types with
super-blocks of 256 weights both are products of a float16 of the super-block and a small integer of
the sub-block: scale = d * sub_scale, minimum = -dmin * sub_minimum. In the others they are the
float16 themselves: scale = d, minimum = the file's m.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class GgmlType:
    """One type of tensors in a GGUF file."""

    name: str
    id: int
    """Its number in the file."""
    block: int
    """Weights of a block; rows are whole blocks."""
    block_bytes: int
    sub_block: int = 0
    """Weights that share a scale; 0 for plain floating point."""
    codes: tuple[int, int] = (0, 0)
    """Smallest and largest code; stored codes less what they are shifted by."""
    values: tuple[int, ...] = ()
    """What the codes stand for, where that is not the code itself."""
    sub_scales: tuple[int, int] | None = None
    """Range of the integer scales of sub-blocks."""
    sub_minimums: tuple[int, int] | None = None
    """Range of the integer minimums of sub-blocks."""
    has_minimum: bool = False

    @property
    def quantized(self) -> bool:
        """Whether it has codes."""
        return self.sub_block > 0

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes and scales for each weight."""
        return 8 * self.block_bytes / self.block

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of one row.

        Raises:
            ValueError: the columns are not whole blocks.
        """
        if columns % self.block:
            raise ValueError(f"{columns} columns are not whole blocks of {self.block} of {self.name}")
        return columns // self.block * self.block_bytes


def _table(*rows: GgmlType) -> Mapping[str, GgmlType]:
    return MappingProxyType({row.name: row for row in rows})


_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_SIX_BITS = (0, 63)

GGML_TYPES: Mapping[str, GgmlType] = _table(
    GgmlType("F32", 0, 1, 4),
    GgmlType("F16", 1, 1, 2),
    GgmlType("BF16", 30, 1, 2),
    GgmlType("Q4_0", 2, 32, 18, 32, (-8, 7)),
    GgmlType("Q4_1", 3, 32, 20, 32, (0, 15), has_minimum=True),
    GgmlType("Q5_0", 6, 32, 22, 32, (-16, 15)),
    GgmlType("Q5_1", 7, 32, 24, 32, (0, 31), has_minimum=True),
    GgmlType("Q8_0", 8, 32, 34, 32, (-127, 127)),
    GgmlType("Q2_K", 10, 256, 84, 16, (0, 3), (), (0, 15), (0, 15), has_minimum=True),
    GgmlType("Q3_K", 11, 256, 110, 16, (-4, 3), (), (-32, 31)),
    GgmlType("Q4_K", 12, 256, 144, 32, (0, 15), (), _SIX_BITS, _SIX_BITS, has_minimum=True),
    GgmlType("Q5_K", 13, 256, 176, 32, (0, 31), (), _SIX_BITS, _SIX_BITS, has_minimum=True),
    GgmlType("Q6_K", 14, 256, 210, 16, (-32, 31), (), (-128, 127)),
    GgmlType("IQ4_NL", 20, 32, 18, 32, (0, 15), _IQ4_VALUES),
    GgmlType("IQ4_XS", 23, 256, 136, 32, (0, 15), _IQ4_VALUES, (-32, 31)),
)
