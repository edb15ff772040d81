"""Keys of a recipe that only some kinds of models have a use for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal

from pydantic import BaseModel

from quantkit.recipe.spec import Recipe
from quantkit.schemes import ONNX

DECODERS: Final = "decoders"
ENCODERS: Final = "encoders"
INT8_ENCODERS: Final = "INT8 encoders"

SCOPES: Mapping[str, str] = MappingProxyType(
    {
        "export.float_layers": INT8_ENCODERS,
        "export.reduce_range": INT8_ENCODERS,
        "export.opset": ENCODERS,
        "calibration.text_pair_column": ENCODERS,
        "calibration.range": INT8_ENCODERS,
        "calibration.percentile": INT8_ENCODERS,
        "gate.text_pair_column": ENCODERS,
        "gate.label_column": ENCODERS,
        "gate.min_cosine": ENCODERS,
        "gate.min_cosine_p1": ENCODERS,
        "gate.min_retrieval_overlap": ENCODERS,
        "gate.top_k": ENCODERS,
        "gate.min_label_agreement": ENCODERS,
        "gate.max_metric_drop": ENCODERS,
        "gate.max_samples": DECODERS,
        "gate.max_perplexity_increase": DECODERS,
        "gate.max_kl": DECODERS,
        "gate.min_top1_agreement": DECODERS,
        "gate.tokenizer": DECODERS,
    }
)
"""Key -> what it is for."""


def find_idle_keys(
    recipe: Recipe, kind: Literal["decoder", "encoder"], precisions: Sequence[str] = ()
) -> Iterator[str]:
    """Yield a line for each key that was given another value than its default and has no effect.

    Args:
        recipe: of a job with one model.
        kind: of the model.
        precisions: of an encoder's exports, in the recipe's order; decoders have none to tell.
    """
    model = recipe.model or "the model"
    for key, scope in SCOPES.items():
        group, _, name = key.partition(".")
        for where, spec, has_codes in _list_specs(recipe, group, precisions):
            if getattr(spec, name) == type(spec).model_fields[name].default:
                continue
            if (scope == DECODERS) != (kind == "decoder"):
                reason = f"{model} is {'a' if kind == 'decoder' else 'an'} {kind}"
            elif scope == INT8_ENCODERS and not has_codes:
                reason = "nothing is stored in INT8" if group != "export" else "this is in float"
            else:
                continue
            yield f"{where}.{name} is for {scope}, and {reason}: leave it out"


def _list_specs(
    recipe: Recipe, group: str, precisions: Sequence[str]
) -> Iterator[tuple[str, BaseModel, bool]]:
    """Yield where a group stands, its keys, and whether an export in INT8 has to do with it."""
    if group == "export":
        for number, export in enumerate(recipe.export):
            # Other formats have refused these keys before.
            if export.format == ONNX:
                yield f"export[{number}]", export, "int8" in precisions[number : number + 1]
    else:
        spec = recipe.calibration if group == "calibration" else recipe.gate
        if spec is not None:
            yield group, spec, "int8" in precisions
