"""The costs of layers are those of the encoder's outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantkit.encoders.model import run_encoder
from quantkit.encoders.observing import observe
from quantkit.encoders.sensitivity import MOST_FLOAT, choose_float_layers
from quantkit.encoders.simulation import simulated
from quantkit.encoders.solving import solve_encoder
from quantkit.recipe import ExportSpec
from quantkit.records import EncoderLayer, Event, SolvedEncoder
from tests.encoders.cases import Case, make_case


def _silent(_event: Event) -> None:
    pass


def _solve(case: Case) -> SolvedEncoder:
    spec = ExportSpec(format="onnx", float_layers=0)
    stats = observe(case.model, case.plan, case.rows)
    return solve_encoder(case.model, case.plan, stats, None, spec, None, _silent)


def _damaged(layer: EncoderLayer) -> EncoderLayer:
    return replace(layer, scale=layer.scale * 3.0)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("BertModel", "mean 1 - cosine"),
        ("BertForSequenceClassification", "mean KL divergence of labels"),
        ("BertForTokenClassification", "mean KL divergence of labels"),
    ],
)
def test_the_layer_that_costs_most_is_found(architecture: str, words: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, architecture)
    layers = list(_solve(case).layers)
    # The output of the first attention: a sixteenth of the weights.
    layers[3] = _damaged(layers[3])
    choice = choose_float_layers(case.model, case.plan.info, layers, (), case.rows, "auto", _silent)
    assert choice.layers == (layers[3].name,)
    assert choice.notes[0].startswith(words)


def test_auto_leaves_no_more_than_a_tenth_in_float(tmp_path: Path) -> None:
    """And says that this was not enough."""
    case = make_case(tmp_path)
    layers = [_damaged(layer) for layer in _solve(case).layers]
    choice = choose_float_layers(case.model, case.plan.info, layers, (), case.rows, "auto", _silent)
    sizes = {layer.name: layer.codes.numel() for layer in layers}
    assert sum(sizes[name] for name in choice.layers) <= MOST_FLOAT * sum(sizes.values())
    assert any("export.float_layers sets their number" in note for note in choice.notes)
    every = choose_float_layers(
        case.model, case.plan.info, layers, (), case.rows, len(layers), _silent
    )
    assert every.layers == tuple(sizes)


def test_the_cost_is_the_mean_distance_of_the_embeddings(tmp_path: Path) -> None:
    """Against one text at a time; static inputs, as dynamic ranges depend on the batch."""
    case = make_case(tmp_path, scheme="w8a8_static", texts=8)
    layers = [_damaged(layer) for layer in _solve(case).layers]
    choice = choose_float_layers(case.model, case.plan.info, layers, (), case.rows, 1, _silent)
    costs = []
    for ids in case.rows.ids:
        ones = torch.ones(1, len(ids), dtype=torch.int64)
        batch = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": ones,
            "token_type_ids": 0 * ones,
        }
        plain = run_encoder(case.model, case.plan.info, batch)
        with simulated(case.model, layers) as model:
            found = run_encoder(model, case.plan.info, batch)
        costs.append(float(1 - (plain * found).sum()))
    said = float(choice.notes[0].split(": ")[1].split(" ")[0])
    assert said == pytest.approx(sum(costs) / len(costs), rel=0.06)


@pytest.mark.parametrize("kind", ["score", "several labels"])
def test_the_cost_of_scores_and_of_several_labels(kind: str, tmp_path: Path) -> None:
    """Where a softmax says nothing: against the definitions, one text at a time."""
    labels = ("relevance",) if kind == "score" else ("a", "b", "c")
    case = make_case(
        tmp_path, "BertForSequenceClassification", "w8a8_static", texts=8, labels=labels
    )
    info = replace(case.plan.info, multi_label=kind != "score")
    layers = [_damaged(layer) for layer in _solve(case).layers]
    choice = choose_float_layers(case.model, info, layers, (), case.rows, 1, _silent)
    batches = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        | {"token_type_ids": torch.zeros(1, len(ids)).long()}
        for ids in case.rows.ids
    ]
    plain = torch.cat([run_encoder(case.model, info, batch) for batch in batches]).double()
    with simulated(case.model, layers) as model:
        found = torch.cat([run_encoder(model, info, batch) for batch in batches]).double()
    if kind == "score":
        cost = ((plain - found) ** 2).mean() / plain.var(correction=0)
        words = "mean squared error of scores, as a share of their variance on 8 texts"
    else:
        p, q = plain.sigmoid(), found.sigmoid()
        parts = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        cost = parts.sum(1).mean()
        words = "mean KL divergence of labels, summed over them on 8 texts"
    said = choice.notes[0].split(": ")
    assert said[0] == words
    assert float(said[1].split(" ")[0]) == pytest.approx(float(cost), rel=0.06)
    assert float(cost) > 0
