"""The formats of a recipe: the records below `export`."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from quantkit.ggml_types import FILE_TYPES, GGML_TYPES, GGUF
from quantkit.recipe.fields import Spec, choice_of
from quantkit.schemes import FORMATS, ONNX

AUTO: Final = "auto"
"""The scheme, the type of a GGUF file, or the layers of an encoder that stay in float: chosen from
measured sensitivity."""


def _upper(value: object) -> object:
    """llama.cpp's names of types are in capitals, and people write them as they like."""
    if not isinstance(value, str):
        return value
    return AUTO if value.lower() == AUTO else value.upper()


FileTypeName: Any = Annotated[
    choice_of("GGUF type", dict.fromkeys([*FILE_TYPES, AUTO])), BeforeValidator(_upper)
]
TensorTypeName: Any = Annotated[choice_of("GGUF tensor type", GGML_TYPES), BeforeValidator(_upper)]


Precision = Literal["int4", "int8", "fp16", "fp32"]
TablePrecision = Literal["float", "int8", "int4"]


def _float_layers(value: object) -> object:
    if value == AUTO or (type(value) is int and value >= 0):
        return value
    raise PydanticCustomError(
        "float_layers",
        "float_layers is auto or a number of layers, not {value}",
        {"value": repr(value)},
    )


FloatLayers = Annotated[
    int | Literal["auto"],
    BeforeValidator(_float_layers),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"const": AUTO}]}),
]


class TypeOverride(Spec):
    """Another type in a GGUF file for the tensors whose full name in the checkpoint matches a shell
    pattern; the first match wins."""

    match: str = Field(min_length=1, description="shell pattern, for instance *.down_proj.weight")
    type: TensorTypeName = Field(description="type of the tensors, for instance Q6_K")


_KEYS_OF = {
    GGUF: ("type", "target_bits", "overrides", "pre_tokenizer"),
    ONNX: (
        "precision",
        "activations",
        "accuracy_level",
        "embeddings",
        "lm_head",
        "float_layers",
        "reduce_range",
        "opset",
    ),
}
"""Format -> the keys that only it has."""


class ExportSpec(Spec):
    """One format to write."""

    format: choice_of("format", FORMATS) = Field(  # type: ignore[valid-type]
        default="compressed-tensors", description="what the files are for"
    )
    type: FileTypeName | None = Field(
        default=None,
        description="for gguf: mix of types, for instance Q4_K_M; auto: chosen per tensor by "
        "target_bits",
    )
    target_bits: float | None = Field(
        default=None,
        gt=0,
        le=32,
        description="for type auto: bits per weight of the whole file, at the most",
    )
    candidates: tuple[TensorTypeName, ...] = Field(
        default=("Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
        min_length=2,
        description="for type auto: the types to choose from",
    )
    overrides: tuple[TypeOverride, ...] = Field(
        default=(),
        description="for gguf: other types for some tensors, as {match: '*.down_proj.weight', "
        "type: Q6_K}; the first match wins",
    )
    pre_tokenizer: str | None = Field(
        default=None,
        description="for gguf: llama.cpp's name of the pre-tokenizer, where it is not recognised",
    )
    precision: Precision | None = Field(
        default=None,
        description="for onnx: int4 or int8, which the scheme must give; fp16 or fp32: weights are "
        "not quantized, whatever the scheme; null: what the scheme gives",
    )
    activations: Literal["fp32", "fp16"] = Field(
        default="fp32", description="for onnx: what the graph computes in"
    )
    accuracy_level: int = Field(
        default=0,
        ge=0,
        le=4,
        description="for onnx decoders: 0 multiplies in the precision of the activations; 4 lets "
        "CPUs round them to INT8 in blocks, which is faster",
    )
    embeddings: TablePrecision | None = Field(
        default=None,
        description="for onnx: how embeddings are stored, float, int8 or int4; null: int8 for INT8 "
        "encoders, float for the rest",
    )
    lm_head: TablePrecision = Field(
        default="float", description="for onnx decoders: how the output layer is stored"
    )
    float_layers: FloatLayers = Field(
        default=AUTO,
        description="for INT8 encoders: how many of the most sensitive layers stay in float; auto: "
        "as many as the measured error asks for",
    )
    reduce_range: bool = Field(
        default=False,
        description="for INT8 encoders: weights of 7 bits, for CPUs without VNNI, whose sums "
        "saturate otherwise",
    )
    opset: int | None = Field(
        default=None, ge=1, description="for onnx encoders: version of the operators"
    )
    max_shard_bytes: int = Field(
        default=5_000_000_000, ge=1_000_000, description="bytes of one shard, at the most"
    )

    @model_validator(mode="after")
    def _keys_of_the_format(self) -> ExportSpec:
        """A GGUF file needs a type; other formats have none."""
        if self.format == GGUF and self.type is None:
            raise PydanticCustomError(
                "export",
                "a gguf export needs a type, for instance Q4_K_M (known: {known})",
                {"known": ", ".join(FILE_TYPES)},
            )
        for owner, names in _KEYS_OF.items():
            for name in names:
                if self.format != owner and getattr(self, name) != _default_of(name):
                    raise PydanticCustomError(
                        "export",
                        "{name} belongs to the format {owner}, and the format is {format}",
                        {"name": name, "owner": owner, "format": self.format},
                    )
        if self.type == AUTO and self.target_bits is None:
            raise PydanticCustomError("export", "type auto needs target_bits")
        default = type(self).model_fields["candidates"].default
        given = {
            "target_bits": self.target_bits is not None,
            "candidates": self.candidates != default,
        }
        for name in (name for name, found in given.items() if found and self.type != AUTO):
            raise PydanticCustomError(
                "export",
                "{name} belongs to type auto, and the type is {type}",
                {"name": name, "type": str(self.type)},
            )
        return self


def _default_of(name: str) -> object:
    return ExportSpec.model_fields[name].default
