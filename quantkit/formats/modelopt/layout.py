"""How ModelOpt's unified Hugging Face layout stores one linear layer.

Every layer has the algorithm that hf_quant_config.json names, unless it is excluded. In place of
its `weight` [O, I], with G groups along I, stand

    FP8                        weight           float8_e4m3fn [O, I]
                               weight_scale     float32 []
                               input_scale      float32 []
    FP8_PER_CHANNEL_PER_TOKEN  weight           float8_e4m3fn [O, I]
                               weight_scale     float32 [O]
    W8A8_SQ_PER_CHANNEL        weight           int8 [O, I]
                               weight_scale     float32 [O]
                               input_scale      float32 []
                               pre_quant_scale  float [I]
    W4A16_AWQ                  weight           uint8 [O / 2, I]   two rows a byte
                               weight_scale     float32 [O, G]
                               pre_quant_scale  float [I]

A weight is code times scale, and all are symmetric. An input is multiplied by `pre_quant_scale`
first, where that is stored. Here it is always 1, since what it is for has been folded into the
operation in front; but TensorRT-LLM does not load o_proj and down_proj of W4A16_AWQ without it.
A scale of an FP8 key/value cache lies at `<attention>.k_proj.k_scale` or `.v_proj.v_scale`,
float32 [].

Sources: ModelOpt 0.47 (torch/export/quant_utils.py: `to_quantized_weight`, `pack_int4_in_uint8`,
`get_scaling_factor`, `_KV_CACHE_REPLACEMENTS`), TensorRT-LLM (_torch/modules/linear.py:
`FP8QDQLinearMethod`, `FP8RowwiseLinearMethod`, `W4A16_AWQ_LinearMethod`; quantization/mode.py, by
which W8A8_SQ_PER_CHANNEL rounds inputs with one stored scale) and vLLM 0.32
(quantization/modelopt.py: both FP8 algorithms).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.formats.kv_scales import K_SCALE, V_SCALE
from quantkit.formats.layouts import FLOATS, INPUT_SCALE, SCALE, WEIGHT
from quantkit.formats.shards import TensorSpec
from quantkit.numerics.packing import pack_row_pairs, unpack_row_pairs
from quantkit.records import KvCachePlan, LinearPlan, QuantizedLayer
from quantkit.schemes import MODELOPT_ALGORITHMS, SCHEMES

FP8, FP8_ROWS, AWQ, SMOOTHQUANT = (
    MODELOPT_ALGORITHMS[scheme] for scheme in ("fp8_static", "fp8_dynamic", "w4a16", "w8a8_static")
)
SCHEME_OF: Mapping[str, str] = MappingProxyType(
    {algorithm: scheme for scheme, algorithm in MODELOPT_ALGORITHMS.items()}
)

PRE_QUANT_SCALE = "pre_quant_scale"
PARTS = (WEIGHT, SCALE, INPUT_SCALE, PRE_QUANT_SCALE)
"""Last parts of the names of a layer's tensors."""

_CODES = MappingProxyType({FP8: "F8_E4M3", FP8_ROWS: "F8_E4M3", AWQ: "U8", SMOOTHQUANT: "I8"})
_CACHE_PLACES = MappingProxyType({K_SCALE: f"k_proj.{K_SCALE}", V_SCALE: f"v_proj.{V_SCALE}"})


def part_shapes(
    algorithm: str, rows: int, columns: int, group_size: int | None
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a layer with weight [rows, columns]."""
    if algorithm == AWQ:
        groups = columns // (group_size or columns)
        return {
            WEIGHT: (rows // 2, columns),
            SCALE: (rows, groups),
            PRE_QUANT_SCALE: (columns,),
        }
    shapes: dict[str, tuple[int, ...]] = {WEIGHT: (rows, columns)}
    shapes[SCALE] = () if algorithm == FP8 else (rows,)
    if algorithm != FP8_ROWS:
        shapes[INPUT_SCALE] = ()
    if algorithm == SMOOTHQUANT:
        shapes[PRE_QUANT_SCALE] = (columns,)
    return shapes


def part_dtypes(algorithm: str) -> dict[str, tuple[str, ...]]:
    """Return the dtypes that readers take for every tensor, by safetensors' names."""
    codes = (_CODES[algorithm],)
    return {WEIGHT: codes, SCALE: FLOATS, INPUT_SCALE: FLOATS, PRE_QUANT_SCALE: FLOATS}


def specify_layer(linear: LinearPlan, scale_dtype: str) -> tuple[TensorSpec, ...]:
    """Announce the tensors of a planned layer.

    Args:
        scale_dtype: safetensors' name of the model's dtype, which inputs are multiplied in. Scales
            are float32, as ModelOpt's are.
    """
    algorithm = MODELOPT_ALGORITHMS[linear.scheme.name]
    dtypes = {
        WEIGHT: _CODES[algorithm],
        SCALE: "F32",
        INPUT_SCALE: "F32",
        PRE_QUANT_SCALE: scale_dtype,
    }
    shapes = part_shapes(algorithm, linear.out_features, linear.in_features, linear.group_size)
    return tuple(
        TensorSpec(f"{linear.name}.{part}", dtypes[part], shape) for part, shape in shapes.items()
    )


def encode_part(layer: QuantizedLayer, part: str) -> Tensor:
    """Return the tensor that is stored as `part` of a layer.

    Raises:
        ValueError: the layer has no such part, or several scales where there is one place.
    """
    algorithm = MODELOPT_ALGORITHMS[layer.scheme.name]
    if part == WEIGHT:
        return pack_row_pairs(layer.codes) if algorithm == AWQ else layer.codes
    if part == PRE_QUANT_SCALE:
        return torch.ones(layer.codes.shape[1], dtype=layer.scale.dtype)
    if part == INPUT_SCALE and layer.input_scale is not None:
        return layer.input_scale.float().reshape(())
    if part != SCALE:
        raise ValueError(f"{layer.name} has no {part}")
    if algorithm == AWQ:
        return layer.scale.float()
    if algorithm != FP8:
        return layer.scale.float().reshape(-1)
    first = layer.scale[0, 0]
    if not bool((layer.scale == first).all()):
        raise ValueError(f"{layer.name} has rows with scales of their own")
    return first.float()


def decode_layer(
    name: str, algorithm: str, group_size: int | None, parts: Mapping[str, Tensor]
) -> QuantizedLayer:
    """Rebuild a layer from its stored tensors, whose shapes fit `algorithm`.

    One scale a tensor becomes one a row. A `pre_quant_scale` is left to the caller.
    """
    stored, scale = parts[WEIGHT], parts[SCALE]
    codes = unpack_row_pairs(stored) if algorithm == AWQ else stored
    if algorithm != AWQ:
        scale = scale.reshape(-1, 1).expand(len(codes), 1).contiguous()
    inputs = parts.get(INPUT_SCALE)
    return QuantizedLayer(
        name,
        SCHEMES[SCHEME_OF[algorithm]],
        group_size,
        codes,
        scale,
        None,
        None if inputs is None else inputs.reshape(1),
    )


def place_scales(added: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a solved block's scales of the key/value cache under the names of the layout."""
    placed = {}
    for name, scale in added.items():
        attention, _, part = name.rpartition(".")
        placed[f"{attention}.{_CACHE_PLACES[part]}"] = scale.float().reshape(())
    return placed


def name_scales(attentions: Iterable[str]) -> list[str]:
    """Return the names of the scales of attention layers."""
    return [f"{name}.{place}" for name in attentions for place in _CACHE_PLACES.values()]


def specify_scales(
    kv_cache: KvCachePlan | None, prefix: str, scale_dtype: str
) -> tuple[TensorSpec, ...]:
    """Announce the scales of the attention layers whose names begin with `prefix`."""
    attentions = () if kv_cache is None else kv_cache.attentions
    inside = [name for name in attentions if name.startswith(prefix)]
    return tuple(TensorSpec(name, "F32", ()) for name in name_scales(inside))


def is_late(spec: TensorSpec) -> bool:
    """Whether a tensor of a layer is a scale of the whole layer, or one a row."""
    return spec.name.rpartition(".")[2] in (SCALE, INPUT_SCALE) and len(spec.shape) < 2
