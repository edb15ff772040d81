"""Which type each tensor of a GGUF file has: llama.cpp's mixes of types.

Source: src/llama-quant.cpp of llama.cpp (commit 0c1e570). A file type gives most tensors its
default type and some of them more bits: values and the layers back from the MLP are the most
sensitive, more so in the first and the last blocks, and an output layer is worth six bits in nearly
every file. Mixtures of experts and Falcon have rules of their own, which are not built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from quantkit.errors import InputError
from quantkit.formats.gguf.architecture import Architecture
from quantkit.formats.gguf.tensors import GgufTensor
from quantkit.ggml_types import FILE_TYPES, GGML_TYPES, FileType, GgmlType

_FALLBACKS: Mapping[str, str] = MappingProxyType(
    {
        "IQ4_XS": "IQ4_NL",
        "Q2_K": "Q4_0",
        "Q3_K": "Q4_0",
        "Q4_K": "Q5_0",
        "Q5_K": "Q5_1",
        "Q6_K": "Q8_0",
    }
)
"""Types of 256 columns a block -> what stands in where a row is no whole number of blocks."""

_IQ4 = frozenset({"IQ4_NL", "IQ4_XS"})
_VALUES = frozenset({"attn_v", "attn_qkv"})


@dataclass(frozen=True)
class Mix:
    """The type of every tensor of a file."""

    types: Mapping[str, GgmlType]
    """Name of the tensor in the file -> its type."""
    notes: tuple[str, ...]
    """Where tensors could not have the type that the mix gives them."""


@dataclass(frozen=True)
class _Model:
    """What the rules look at besides the tensor."""

    blocks: int
    values: int
    """Tensors that hold values: attn_v or attn_qkv."""
    queries_per_value: int
    large_llama: bool
    """Whether llama.cpp takes it for a 70B: eight heads of queries share small values there."""
    tied: bool
    has_importance: bool


def choose_types(
    file_type: FileType,
    tensors: Sequence[GgufTensor],
    architecture: Architecture,
    has_importance: bool,
) -> Mix:
    """Give every tensor of a file its type.

    Args:
        tensors: all of the file, as `lay_out_tensors` returns them.
        has_importance: whether the codes are chosen with an importance matrix (or the second
            moment, which holds one): some mixes save bits then.

    Raises:
        InputError: the file type needs one, as llama-quantize says.
    """
    model = _Model(
        blocks=architecture.blocks,
        values=sum(tensor.role in _VALUES for tensor in tensors),
        queries_per_value=architecture.heads // architecture.key_value_heads,
        large_llama=_is_70b(architecture),
        tied=all(tensor.role != "output" for tensor in tensors),
        has_importance=has_importance,
    )
    types: dict[str, GgmlType] = {}
    fallen: list[tuple[GgufTensor, GgmlType, GgmlType]] = []
    seen = 0
    for tensor in sorted(tensors, key=lambda tensor: -1 if tensor.block is None else tensor.block):
        wanted = _choose(file_type, tensor, model, seen)
        types[tensor.name] = fitting_type(wanted, tensor.shape[-1])
        if types[tensor.name] != wanted:
            fallen.append((tensor, wanted, types[tensor.name]))
        seen += tensor.role in _VALUES
    # Narrow layers have other types, of which llama-quantize asks nothing either.
    weighed = {kind.name for name, kind in types.items() if name != "token_embd.weight"}
    if file_type.needs_importance and not has_importance and file_type.default.name in weighed:
        raise InputError(
            f"{file_type.name} is of use only where errors are weighed by what calibration saw: "
            f"choose Q2_K, or calibrate (a method other than rtn; in `convert`, --imatrix FILE)"
        )
    ordered = {tensor.name: types[tensor.name] for tensor in tensors}
    return Mix(MappingProxyType(ordered), tuple(_note(fallen)))


def fitting_type(wanted: GgmlType, columns: int) -> GgmlType:
    """Return the type that llama.cpp takes in place of one whose blocks do not fill a row."""
    if columns % wanted.block == 0:
        return wanted
    fallback = GGML_TYPES[_FALLBACKS.get(wanted.name, wanted.name)]
    return fallback if columns % fallback.block == 0 else GGML_TYPES["F16"]


def fit_candidates(candidates: Iterable[str], columns: int) -> tuple[str, ...]:
    """Return the types that stand for candidates in rows of so many columns, each once."""
    fitting = (fitting_type(GGML_TYPES[name], columns).name for name in candidates)
    return tuple(dict.fromkeys(fitting))


def nearest_file_type(tensors: Sequence[GgufTensor], types: Mapping[str, str]) -> FileType:
    """Return the file type whose default most of the weights of the blocks have.

    It is what llama.cpp calls a file whose types follow none of its mixes.
    """
    weights: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.block is not None and tensor.quantizable:
            weights[types[tensor.name]] += tensor.parameters
    ((most, _),) = weights.most_common(1)
    matching = [each for each in FILE_TYPES.values() if each.default.name == most]
    return max(matching, key=lambda each: each.name.endswith("_M"))


def _choose(file_type: FileType, tensor: GgufTensor, model: _Model, seen: int) -> GgmlType:
    """Apply the rules to one tensor, of which `seen` ones with values came before."""
    if not tensor.quantizable:
        return GGML_TYPES["F32"]
    default = file_type.default
    if not default.quantized:
        return default
    if tensor.role == "output" or (tensor.role == "token_embd" and model.tied):
        return GGML_TYPES["Q8_0" if default.name == "Q8_0" else "Q6_K"]
    name = file_type.name
    if tensor.role in _VALUES:
        lifted = _choose_for_values(name, model, seen)
        if model.large_llama and (lifted or default.name) in ("Q3_K", "Q4_K"):
            lifted = "Q5_K"
    elif tensor.role == "ffn_down":
        lifted = _choose_for_down(name, model, tensor.block or 0)
    elif tensor.role == "attn_output":
        lifted = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(name)
    else:
        lifted = None
    return default if lifted is None else GGML_TYPES[lifted]


def _choose_for_values(name: str, model: _Model, seen: int) -> str | None:
    """The type of attention's values, fused with queries and keys or not; None: the default."""
    grouped = model.queries_per_value >= 4
    if name == "Q2_K":
        return "Q4_K" if grouped else "Q3_K"
    if name == "Q2_K_S" and grouped:
        return "Q4_K"
    if name == "Q3_K_M":
        return "Q5_K" if seen < 2 else "Q4_K"
    if name == "Q3_K_L":
        return "Q5_K"
    if name in _IQ4 and grouped:
        return "Q5_K"
    if name in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(seen, model.values):
        return "Q6_K"
    if name == "Q4_K_S" and seen < 4:
        return "Q5_K"
    return None


def _choose_for_down(name: str, model: _Model, block: int) -> str | None:
    """The type of the layer back from the MLP; None: the default."""
    early = block < model.blocks // 8
    if name == "Q2_K":
        return "Q3_K"
    if name == "Q2_K_S" and early:
        return "Q4_K"
    if name == "Q3_K_M":
        return "Q5_K" if block < model.blocks // 16 else "Q4_K"
    if name == "Q3_K_L":
        return "Q5_K"
    if name in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(block, model.blocks):
        return "Q6_K"
    if name == "Q4_K_S" and early:
        return "Q5_K"
    if name in _IQ4 and early and not model.has_importance:
        return "Q5_K"
    if name in ("Q4_0", "Q5_0") and early and model.has_importance:
        return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[name]
    return None


def _gets_more_bits(index: int, count: int) -> bool:
    """Whether a layer is in the first or last eighth, or every third of those between."""
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2


def _is_70b(architecture: Architecture) -> bool:
    """Whether llama.cpp takes the model for a 70B, by its 80 layers."""
    if architecture.blocks != 80:
        return False
    if architecture.name == "llama":
        return architecture.heads != architecture.key_value_heads
    return architecture.name == "qwen2"


def _note(fallen: Iterable[tuple[GgufTensor, GgmlType, GgmlType]]) -> list[str]:
    """Say which tensors got another type than the mix says: one line for those alike."""
    groups: dict[tuple[str, int, str, str], int] = {}
    for tensor, wanted, got in fallen:
        stem = tensor.name if tensor.block is None else f"blk.*.{tensor.name.split('.', 2)[2]}"
        key = (stem, tensor.shape[-1], wanted.name, got.name)
        groups[key] = groups.get(key, 0) + 1
    return [
        f"{stem}: {columns} columns are not whole blocks of {wanted}, so "
        f"{'it gets' if count == 1 else f'{count} of them get'} {got}"
        for (stem, columns, wanted, got), count in groups.items()
    ]
