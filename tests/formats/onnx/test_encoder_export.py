"""The float graph of an encoder: it computes what the model does, for texts of any length."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantkit.encoders.model import run_encoder
from quantkit.errors import ArtifactError, InputError
from quantkit.formats.onnx.encoder_agreement import (
    make_batches,
    measure_difference,
    measure_distance,
    run_model,
)
from quantkit.formats.onnx.encoder_export import export_encoder, make_batch
from quantkit.formats.onnx.encoder_quantization import find_linears, quantize_layers
from quantkit.formats.onnx.encoder_tables import quantize_tables
from quantkit.records.encoders import EncoderTable, Pooling
from tests.encoder_models import POSITIONS, VOCABULARY
from tests.formats.onnx.encoder_reference import Encoder, make_encoder, round_encoder, stand_in

ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

ARCHITECTURES = (
    "BertModel",
    "BertForTokenClassification",
    "RobertaModel",
    "XLMRobertaForSequenceClassification",
    "DistilBertForSequenceClassification",
    "ModernBertModel",
)


@dataclass(frozen=True)
class Exported:
    encoder: Encoder
    graph: Any


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Architecture -> its encoder and graph, made once."""
    made: dict[str, Exported] = {}

    def get(architecture: str) -> Exported:
        if architecture not in made:
            encoder = make_encoder(tmp_path_factory.mktemp("encoder"), architecture)
            made[architecture] = Exported(encoder, export_encoder(encoder.model, encoder.info))
        return made[architecture]

    return get


@pytest.fixture(params=ARCHITECTURES)
def exported(request: pytest.FixtureRequest, export: Callable[[str], Exported]) -> Exported:
    return export(request.param)


@pytest.fixture
def bert(export: Callable[[str], Exported]) -> Exported:
    return export("BertModel")


def run(graph: Any, folder: Path, encoder: Encoder, batches: list[Any]) -> list[np.ndarray]:
    """The last output of the graph; logits of padding are left out."""
    ir.save(graph, folder / "graph.onnx")
    session = ort.InferenceSession(folder / "graph.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == list(encoder.info.inputs)
    assert all(value.shape == ["batch", "sequence"] for value in session.get_inputs())
    name = session.get_outputs()[-1].name
    results = []
    for batch in batches:
        feed = {key: tensor.numpy() for key, tensor in batch.items()}
        output = session.run([name], feed)[0]
        if encoder.info.task == "token-classification":
            output = output[batch["attention_mask"].bool().numpy()]
        results.append(output)
    return results


def test_the_float_graph_computes_what_the_model_does(exported: Exported, tmp_path: Path) -> None:
    encoder = exported.encoder
    lengths = ((1,), (2,), (9, 3, 1), (POSITIONS,), (POSITIONS, 5), (1, 1, 1))
    batches = [make_batch(encoder.info, each, VOCABULARY) for each in lengths]
    found = run(exported.graph, tmp_path, encoder, batches)
    expected = run_model(encoder.model, encoder.info, batches)
    assert measure_difference(found, expected) < 1e-5


@pytest.mark.parametrize("architecture", ["ElectraModel", "CamembertModel", "MPNetModel"])
def test_the_families_like_bert_compute_what_their_models_do(
    architecture: str, tmp_path: Path
) -> None:
    encoder = make_encoder(tmp_path / "model", architecture)
    graph = export_encoder(encoder.model, encoder.info)
    batches = make_batches(encoder.model, encoder.info, None)
    found = run(graph, tmp_path, encoder, batches)
    expected = run_model(encoder.model, encoder.info, batches)
    assert measure_difference(found, expected) < 1e-5


@pytest.mark.parametrize(("static", "smooth"), [(False, False), (False, True), (True, True)])
def test_codes_in_the_graph_compute_what_they_stand_for(
    exported: Exported, tmp_path: Path, static: bool, smooth: bool
) -> None:
    encoder = exported.encoder
    solved = round_encoder(encoder, static=static, smooth=smooth)
    graph = exported.graph.clone()
    quantize_layers(graph, solved.layers)
    quantize_tables(graph, solved.tables)
    batches = make_batches(encoder.model, encoder.info, None)
    found = run(graph, tmp_path, encoder, batches)
    expected = run_model(stand_in(encoder, solved).model, encoder.info, batches)
    exact = run_model(encoder.model, encoder.info, batches)
    assert measure_distance(found, expected) < 0.2 * measure_distance(exact, expected)
    # The first text is one token, whose few values do not happen to lie between two codes.
    assert measure_difference(found[:1], expected[:1]) < 1e-4
    wide = [value for value in graph.graph.initializers.values() if value.dtype == 1]
    assert not [value.name for value in wide if value.const_value.size > 2 * 128 * 32]


def test_layers_that_share_an_input_round_it_once(bert: Exported, tmp_path: Path) -> None:
    graph = bert.graph.clone()
    solved = round_encoder(bert.encoder)
    quantize_layers(graph, solved.layers)
    kinds = [node.op_type for node in graph.graph]
    # Query, key and value; the attention's output; two of the feed-forward: in each of two blocks.
    assert (kinds.count("DynamicQuantizeLinear"), kinds.count("MatMulInteger")) == (8, 12)


@pytest.mark.parametrize("static", [False, True])
def test_onnxruntime_joins_the_nodes_into_integer_kernels(
    bert: Exported, tmp_path: Path, static: bool
) -> None:
    graph = bert.graph.clone()
    quantize_layers(graph, round_encoder(bert.encoder, static=static).layers)
    ir.save(graph, tmp_path / "graph.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    joined = kinds.count("MatMulIntegerToFloat") + kinds.count("DynamicQuantizeMatMul")
    assert (joined, kinds.count("MatMulInteger"), kinds.count("DequantizeLinear")) == (12, 0, 0)
    assert "SkipLayerNormalization" not in kinds, "a kernel that is slower than its parts"


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_is_that_of_the_model(
    bert: Exported, tmp_path: Path, mode: Any, normalize: bool
) -> None:
    from quantkit.formats.onnx.pooling_graph import append_pooling

    info = replace(bert.encoder.info, pooling=Pooling(mode, normalize))
    graph = bert.graph.clone()
    tokens, old = graph.graph.outputs
    old.name = "other"
    for name in [name for name in graph.graph.initializers if name.startswith(("pool", "norm"))]:
        graph.graph.initializers[name].name = f"other_{name}"
    mask = next(value for value in graph.graph.inputs if value.name == "attention_mask")
    graph.graph.outputs[1] = append_pooling(graph, tokens, mask, info.pooling)
    batches = make_batches(bert.encoder.model, info, None)
    found = run(graph, tmp_path, bert.encoder, batches)
    assert measure_difference(found, run_model(bert.encoder.model, info, batches)) < 1e-5


def test_a_corrected_bias_takes_the_place_of_the_layers_own(bert: Exported, tmp_path: Path) -> None:
    encoder, graph = bert.encoder, bert.graph.clone()
    solved = round_encoder(encoder)
    layers = tuple(
        replace(layer, bias=torch.full((layer.codes.shape[0],), 0.25)) for layer in solved.layers
    )
    solved = replace(solved, layers=layers, tables=())
    quantize_layers(graph, solved.layers)
    batches = make_batches(encoder.model, encoder.info, None)
    found = run(graph, tmp_path, encoder, batches)
    expected = run_model(stand_in(encoder, solved).model, encoder.info, batches)
    assert measure_distance(found, expected) < 0.01


def test_a_layer_or_table_that_the_graph_lacks_is_an_error(bert: Exported) -> None:
    layer = round_encoder(bert.encoder).layers[0]
    with pytest.raises(ArtifactError, match=r"no product for 1 of 1 layers, for instance lost\.q"):
        quantize_layers(bert.graph.clone(), (replace(layer, name="lost.q"),))
    table = EncoderTable("lost.words", torch.zeros(2, 2, dtype=torch.int8), torch.ones(2))
    with pytest.raises(ArtifactError, match=r"does not look up rows of lost\.words"):
        quantize_tables(bert.graph.clone(), (table,))


def test_every_linear_layer_of_the_model_is_found(exported: Exported) -> None:
    linears = {
        name
        for name, module in exported.encoder.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert find_linears(exported.graph).keys() == linears


def test_the_opset_is_what_was_asked_for(bert: Exported, tmp_path: Path) -> None:
    graph = export_encoder(bert.encoder.model, bert.encoder.info, 18)
    assert graph.graph.opset_imports[""] == 18
    batches = make_batches(bert.encoder.model, bert.encoder.info, None)
    found = run(graph, tmp_path, bert.encoder, batches)
    expected = run_model(bert.encoder.model, bert.encoder.info, batches)
    assert measure_difference(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("opset", "words"), [(13, "writes 18 and later"), (99, "cannot write opset 99")]
)
def test_an_opset_that_cannot_be_is_refused(bert: Exported, opset: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        export_encoder(bert.encoder.model, bert.encoder.info, opset)


class _Hopeless(torch.nn.Module):
    """Does for some texts what it does not for others: no graph can."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
        if int(input_ids.sum()) % 2:
            return self.inner(input_ids, attention_mask, token_type_ids)
        return self.inner(input_ids, attention_mask)


def test_what_the_exporter_cannot_take_is_one_line(bert: Exported) -> None:
    model = _Hopeless(bert.encoder.model).eval()
    with pytest.raises(InputError, match="exporter cannot take BertModel") as caught:
        export_encoder(model, bert.encoder.info)
    assert "\n" not in str(caught.value)
    assert logging.root.manager.disable == 0


def test_the_exporter_keeps_quiet_and_the_model_as_it_was(
    bert: Exported, capfd: pytest.CaptureFixture[str]
) -> None:
    batch = make_batch(bert.encoder.info, (6, 2), VOCABULARY)
    before = run_encoder(bert.encoder.model, bert.encoder.info, batch)
    export_encoder(bert.encoder.model, bert.encoder.info)
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == 0
    assert torch.equal(before, run_encoder(bert.encoder.model, bert.encoder.info, batch))
