"""Keys that have no effect on a model are refused, and not passed over."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.encoders.planning import make_encoder_plan
from quantkit.errors import PlanError
from quantkit.job import plan_job
from quantkit.recipe import CalibrationSpec, ExportSpec, GateSpec, Recipe, validate
from quantkit.recipe.scopes import DECODERS, ENCODERS, INT8_ENCODERS, SCOPES, find_idle_keys
from tests.encoder_models import write_encoder_checkpoint
from tests.helpers import make_pico_model

SPECS: dict[str, type[BaseModel]] = {
    "export": ExportSpec,
    "calibration": CalibrationSpec,
    "gate": GateSpec,
}
OTHERS: dict[str, Any] = {
    "export.float_layers": 2,
    "export.reduce_range": True,
    "export.opset": 18,
    "calibration.text_pair_column": "second",
    "calibration.range": "minmax",
    "calibration.percentile": 99.0,
    "gate.text_pair_column": "second",
    "gate.label_column": "label",
    "gate.min_cosine": 0.9,
    "gate.min_cosine_p1": 0.9,
    "gate.min_retrieval_overlap": None,
    "gate.top_k": 5,
    "gate.min_label_agreement": 0.9,
    "gate.max_metric_drop": 0.1,
    "gate.max_samples": 500,
    "gate.max_perplexity_increase": 0.1,
    "gate.max_kl": None,
    "gate.min_top1_agreement": 0.8,
    "gate.tokenizer": "note",
}
"""A value of each key that is not its default."""


def make_recipe(*keys: str) -> Recipe:
    groups: dict[str, dict[str, Any]] = {
        "export": {"format": "onnx"},
        "calibration": {"data": "x.txt"},
        "gate": {"data": "y.txt"},
    }
    for key in keys:
        group, _, name = key.partition(".")
        groups[group][name] = OTHERS[key]
    return validate({"version": 1, "model": "m", **groups, "export": [groups["export"]]})


@pytest.mark.parametrize("key", SCOPES)
def test_a_key_is_idle_for_all_but_what_it_is_for(key: str) -> None:
    """One line, which says what it is for."""
    recipe, scope = make_recipe(key), SCOPES[key]
    found = {
        DECODERS: list(find_idle_keys(recipe, "decoder")),
        ENCODERS: list(find_idle_keys(recipe, "encoder", ["fp16"])),
        INT8_ENCODERS: list(find_idle_keys(recipe, "encoder", ["int8"])),
    }
    fits = {INT8_ENCODERS} | ({ENCODERS} if scope == ENCODERS else set())

    idle = {kind for kind, lines in found.items() if lines}
    assert idle == ({ENCODERS, INT8_ENCODERS} if scope == DECODERS else found.keys() - fits)
    where = key.replace("export.", "export[0].")
    lines = [line for kind in idle for line in found[kind]]
    assert len(lines) == len(idle)
    assert all(line.startswith(f"{where} is for {scope}, and ") for line in lines)


def test_defaults_are_never_idle() -> None:
    """Nor are keys of exports in another format."""
    for kind in ("decoder", "encoder"):
        assert list(find_idle_keys(make_recipe(), kind, ["fp32"])) == []


def test_the_table_has_every_key_that_says_so_of_itself() -> None:
    """Descriptions of keys begin with what they are for."""
    said = {
        f"{group}.{name}": field.description or ""
        for group, spec in SPECS.items()
        for name, field in spec.model_fields.items()
    }
    codes, models = (
        r"for (static INT8 encoders|INT8 encoders|range)",
        r"for (onnx )?(enc|emb|class)",
    )
    assert said.keys() >= SCOPES.keys() == OTHERS.keys()
    for start, scope in ((codes, INT8_ENCODERS), (models, ENCODERS)):
        assert {key for key, text in said.items() if re.match(start, text)} == {
            key for key, found in SCOPES.items() if found == scope
        }


def test_a_decoders_plan_refuses_what_is_for_encoders(tmp_path: Path) -> None:
    """Whatever it exports."""
    checkpoint = open_checkpoint(resolve_source(str(make_pico_model(tmp_path / "model"))))
    keys = ("export.float_layers", "calibration.range", "gate.label_column")

    with pytest.raises(PlanError) as caught:
        plan_job(make_recipe(*keys), checkpoint, gate=True)

    assert caught.value.problems[-3:] == (
        "export[0].float_layers is for INT8 encoders, and m is a decoder: leave it out",
        "calibration.range is for INT8 encoders, and m is a decoder: leave it out",
        "gate.label_column is for encoders, and m is a decoder: leave it out",
    )


def test_an_encoders_plan_refuses_what_is_for_decoders_and_for_codes(tmp_path: Path) -> None:
    """A graph in float16 has no layers to choose from."""
    folder = write_encoder_checkpoint(tmp_path / "model", "BertModel")
    recipe = make_recipe("export.float_layers", "export.reduce_range", "gate.tokenizer")
    export = recipe.export[0].model_copy(update={"precision": "fp16"})
    spec = recipe.quantize.model_copy(update={"scheme": "w8a8"})
    recipe = recipe.model_copy(update={"export": (export,), "quantize": spec})

    with pytest.raises(PlanError) as caught:
        make_encoder_plan(recipe, open_checkpoint(resolve_source(str(folder))))

    assert caught.value.problems == (
        "export[0].float_layers is for INT8 encoders, and this is in float: leave it out",
        "export[0].reduce_range is for INT8 encoders, and this is in float: leave it out",
        "gate.tokenizer is for decoders, and m is an encoder: leave it out",
    )
