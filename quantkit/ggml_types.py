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

GGUF = "gguf"
"""The format of the files, as recipes, artifacts and reports call it."""


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
            raise ValueError(
                f"{columns} columns are not whole blocks of {self.block} of {self.name}"
            )
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


@dataclass(frozen=True)
class FileType:
    """One kind of GGUF file: the mix of tensor types that users know by its name."""

    name: str
    number: int
    """`general.file_type` of the file: LLAMA_FTYPE of llama.h."""
    default: GgmlType
    """Type of the tensors that no rule of the mix lifts above the others."""
    needs_importance: bool = False
    """Whether llama.cpp refuses to make it without an importance matrix."""


def _file_types(*rows: tuple[str, int, str]) -> Mapping[str, FileType]:
    return MappingProxyType(
        {
            name: FileType(name, number, GGML_TYPES[default], name == "Q2_K_S")
            for name, number, default in rows
        }
    )


FILE_TYPES: Mapping[str, FileType] = _file_types(
    ("F32", 0, "F32"),
    ("F16", 1, "F16"),
    ("BF16", 32, "BF16"),
    ("Q8_0", 7, "Q8_0"),
    ("Q6_K", 18, "Q6_K"),
    ("Q5_K_M", 17, "Q5_K"),
    ("Q5_K_S", 16, "Q5_K"),
    ("Q5_1", 9, "Q5_1"),
    ("Q5_0", 8, "Q5_0"),
    ("Q4_K_M", 15, "Q4_K"),
    ("Q4_K_S", 14, "Q4_K"),
    ("IQ4_NL", 25, "IQ4_NL"),
    ("IQ4_XS", 30, "IQ4_XS"),
    ("Q4_1", 3, "Q4_1"),
    ("Q4_0", 2, "Q4_0"),
    ("Q3_K_L", 13, "Q3_K"),
    ("Q3_K_M", 12, "Q3_K"),
    ("Q3_K_S", 11, "Q3_K"),
    ("Q2_K", 10, "Q2_K"),
    ("Q2_K_S", 21, "Q2_K"),
)
"""Name -> file type, roughly from the largest to the smallest."""
