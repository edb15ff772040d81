"""The frozen records of a recipe: every key of the design, also those of features to come."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from quantkit.ggml_types import GGUF
from quantkit.recipe.exporting import AUTO, ExportSpec
from quantkit.recipe.fields import Spec, check_choice, choice_of
from quantkit.recipe.judging import GateSpec
from quantkit.schemes import (
    EFFORTS,
    KV_CACHES,
    METHODS,
    ONNX_GROUP_SIZES,
    SCHEMES,
)


def _group_size(value: object) -> object:
    if value == "channel" or (type(value) is int and value in ONNX_GROUP_SIZES):
        return value
    raise PydanticCustomError(
        "group_size",
        "group_size {value} is unknown (known: {known}, channel)",
        {"value": repr(value), "known": ", ".join(map(str, ONNX_GROUP_SIZES))},
    )


BEST = "best"
"""The method that stands for: what measured best for the layer's scheme."""

METHODS_GIVEN = "methods"
"""Key of pydantic's context: the methods that a caller adds by solvers of its own."""


def _method(value: object, info: ValidationInfo) -> str:
    given = (info.context or {}).get(METHODS_GIVEN) or METHODS
    more = ", or the name of a solver that quantkit.quantize(solvers=...) is given"
    return check_choice("method", value, dict.fromkeys([BEST, *given]), more)


SchemeName = choice_of("scheme", SCHEMES)
MethodName = Annotated[
    str,
    BeforeValidator(_method),
    WithJsonSchema({"type": "string", "enum": [BEST, *METHODS]}),
]
GroupSize = Annotated[
    int | Literal["channel"],
    BeforeValidator(_group_size),
    WithJsonSchema({"enum": [*ONNX_GROUP_SIZES, "channel"]}),
]


class CalibrationSpec(Spec):
    """Which tokens the statistics are taken from."""

    data: str = Field(description="text, jsonl or parquet file, or a datasets id")
    split: str = Field(default="train", description="split, for a datasets id")
    text_column: str = Field(default="text", description="column that holds the text")
    samples: int = Field(default=256, ge=1, description="number of token windows")
    sequence_length: int = Field(default=2048, ge=8, description="tokens of a window")
    seed: int = Field(default=0, ge=0, description="which windows are drawn, and in which order")
    text_pair_column: str | None = Field(
        default=None, description="for encoders: column of the second text of a pair"
    )
    range: Literal["minmax", "percentile", "mse", "entropy"] = Field(
        default="mse",
        description="for static INT8 encoders: which part of the inputs' range is kept",
    )
    percentile: float = Field(
        default=99.99, gt=50, le=100, description="for range percentile: share that is kept"
    )
    assistant_only: bool = Field(
        default=False, description="count only the assistant's tokens of chat rows (needs messages)"
    )


class Override(Spec):
    """Settings for the layers whose full name matches a shell pattern; the first match wins."""

    match: str = Field(min_length=1, description="shell pattern, for instance *.down_proj")
    scheme: SchemeName | None = Field(  # type: ignore[valid-type]
        default=None, description="replaces quantize.scheme"
    )
    group_size: GroupSize | None = Field(default=None, description="replaces quantize.group_size")
    method: MethodName | None = Field(default=None, description="replaces quantize.method")


class QuantizeSpec(Spec):
    """What becomes of the weights."""

    scheme: choice_of("scheme", dict.fromkeys([*SCHEMES, AUTO])) = Field(  # type: ignore[valid-type]
        default="w4a16",
        description="how weights and activations are stored; auto: chosen per layer by target_bits "
        "or max_kl",
    )
    target_bits: float | None = Field(
        default=None,
        gt=0,
        le=32,
        description="for scheme auto: bits per weight of the whole artifact, at the most",
    )
    max_kl: float | None = Field(
        default=None,
        gt=0,
        description="for scheme auto: predicted KL divergence, nats per token, at the most",
    )
    candidates: tuple[SchemeName, ...] = Field(  # type: ignore[valid-type]
        default=("w4a16", "w8a16", "none"),
        min_length=2,
        description="for scheme auto: the schemes to choose from",
    )
    group_size: GroupSize = Field(
        default=128,
        description="columns of a weight that share a scale; channel: one scale a row; 16: for "
        "onnx alone",
    )
    method: MethodName = Field(
        default=BEST,
        description="how the codes are chosen; best: what measured best for the scheme",
    )
    effort: choice_of("effort", EFFORTS) = Field(  # type: ignore[valid-type]
        default="normal", description="how long to look for better codes"
    )
    kv_cache: choice_of("kv_cache", KV_CACHES) = Field(  # type: ignore[valid-type]
        default="none", description="precision of the KV cache"
    )
    ignore: tuple[str, ...] = Field(
        default=("lm_head",), description="shell patterns of layers that stay in 16 bits"
    )
    overrides: tuple[Override, ...] = Field(
        default=(),
        description="other settings for some layers, as {match: '*.down_proj', scheme: w8a16}; "
        "the first match wins",
    )

    @model_validator(mode="after")
    def _one_target_for_auto(self) -> QuantizeSpec:
        """`auto` needs exactly one target, and other schemes have none."""
        targets = [name for name in ("target_bits", "max_kl") if getattr(self, name) is not None]
        if self.scheme == AUTO and len(targets) != 1:
            raise PydanticCustomError(
                "target", "scheme auto needs target_bits or max_kl, one of the two"
            )
        if self.scheme != AUTO and targets:
            raise PydanticCustomError(
                "target",
                "{name} belongs to scheme auto, and the scheme is {scheme}",
                {"name": targets[0], "scheme": self.scheme},
            )
        return self


class PublishSpec(Spec):
    """Where a passed artifact goes."""

    repo: str = Field(description="repository on the Hub, owner/name; made if it is not there")
    private: bool | None = Field(
        default=None,
        description="whether only its owner sees it; null: one that exists stays as it is, a new "
        "one is private",
    )
    revision: str | None = Field(
        default=None, description="branch to commit to; null: the main one"
    )
    tag: str | None = Field(default=None, description="name of the commit for good")
    pull_request: bool = Field(default=False, description="propose the commit instead of making it")


class Recipe(Spec):
    """A whole job. `load_recipe` makes it from YAML."""

    version: Literal[1] = Field(description="of the recipe's own format")
    model: str | None = Field(default=None, description="Hub id, id@revision, or a folder")
    output: str | None = Field(default=None, description="folder to write; must not exist")
    calibration: CalibrationSpec | None = Field(
        default=None, description="which tokens the statistics are taken from; rtn needs none"
    )
    quantize: QuantizeSpec = Field(
        default=QuantizeSpec(), description="what becomes of the weights"
    )
    export: tuple[ExportSpec, ...] = Field(
        default=(ExportSpec(),), description="the formats to write"
    )
    gate: GateSpec | None = Field(
        default=None, description="on what, and how strictly, the artifact is judged"
    )
    publish: PublishSpec | None = Field(
        default=None, description="where an artifact goes that passes, as {repo: owner/name}"
    )

    @property
    def only_gguf(self) -> bool:
        """Whether no format has a place for schemes."""
        return all(export.format == GGUF for export in self.export)

    @property
    def chooses_types(self) -> bool:
        """Whether the types of a GGUF file are chosen from measured sensitivity."""
        return any(export.type == AUTO for export in self.export)

    @property
    def measures(self) -> bool:
        """Whether schemes or types are chosen from measured sensitivity."""
        return self.quantize.scheme == AUTO or self.chooses_types

    @field_validator("export")
    @classmethod
    def _each_format_once(cls, value: tuple[ExportSpec, ...]) -> tuple[ExportSpec, ...]:
        if not value:
            raise PydanticCustomError("export", "export is empty: name at least one format")
        formats = [(export.format, export.type, export.precision) for export in value]
        if len(set(formats)) < len(formats):
            raise PydanticCustomError("export", "export names a format twice")
        if len(value) > 1 and any(export.type == AUTO for export in value):
            raise PydanticCustomError(
                "export", "type auto chooses for a single file: make it the only export"
            )
        return value

    @model_validator(mode="after")
    def _schemes_have_a_format(self) -> Recipe:
        """What GGUF files have no place for is asked for in vain without another format."""
        quantize = self.quantize
        asked = {
            "overrides": bool(quantize.overrides),
            "kv_cache": quantize.kv_cache != "none",
            "scheme": quantize.scheme == AUTO,
            "ignore": quantize.ignore != QuantizeSpec().ignore,
        }
        name = next((name for name, found in asked.items() if found), None)
        if name is not None and self.only_gguf:
            raise PydanticCustomError(
                "export",
                "quantize.{name} is for formats with schemes, and the only format is gguf: write "
                "`overrides` below the export, or export compressed-tensors too",
                {"name": name},
            )
        return self


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, for editors to complete and check against."""
    return Recipe.model_json_schema()
