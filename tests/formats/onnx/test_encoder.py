"""What an ONNX export of an encoder leaves in its folder, and what it refuses."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.encoders.model import describe_encoder, load_encoder
from quantkit.errors import ArtifactError, InputError
from quantkit.formats.onnx.encoder import write_encoder, write_float_encoder
from quantkit.formats.onnx.encoder_agreement import (
    check_rounded,
    make_batches,
    measure_difference,
    measure_distance,
    run_graph,
    run_model,
)
from quantkit.formats.onnx.encoder_half import halve
from quantkit.recipe.exporting import ExportSpec
from quantkit.records import Artifact
from quantkit.records.encoders import SolvedEncoder, TextRows
from tests.encoder_models import write_encoder_checkpoint
from tests.formats.onnx.encoder_reference import (
    Encoder,
    make_encoder,
    make_plan,
    round_encoder,
    stand_in,
)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

HALF = {"format": "onnx", "precision": "fp16", "activations": "fp16"}
INT8 = ExportSpec(format="onnx", precision="int8")
NOTHING = SolvedEncoder((), (), (), ())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return make_encoder(tmp_path_factory.mktemp("encoder"), "BertModel", hidden=64, layers=1)


def write(encoder: Encoder, solved: SolvedEncoder, export: ExportSpec, folder: Path) -> None:
    plan = make_plan(encoder, str(export.precision))
    write_encoder(encoder.checkpoint, plan, solved, export, folder, encoder.model, None)


def some_rows() -> TextRows:
    ids = tuple(tuple(range(5, 8 + 3 * k)) for k in range(6))
    return TextRows(ids, tuple((0,) * len(each) for each in ids), (), (), "made up", "")


@pytest.fixture(scope="module")
def solved(encoder: Encoder) -> SolvedEncoder:
    return round_encoder(encoder)


@pytest.fixture(scope="module")
def artifact(
    encoder: Encoder, solved: SolvedEncoder, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    folder = tmp_path_factory.mktemp("artifact") / "onnx"
    plan = make_plan(encoder, "int8")
    return write_encoder(encoder.checkpoint, plan, solved, INT8, folder, encoder.model, some_rows())


def test_an_int8_artifact_is_complete(encoder: Encoder, artifact: Artifact) -> None:
    folder = artifact.folder
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert artifact.files.keys() == present
    assert {"model.onnx", "config.json", "tokenizer.json", "modules.json"} <= present
    assert "1_Pooling/config.json" in present
    for name, digest in artifact.files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    graph = onnx.load(folder / "model.onnx")
    sizes = [onnx.numpy_helper.to_array(each).nbytes for each in graph.graph.initializer]
    assert artifact.tensor_bytes == sum(sizes)
    assert artifact.bits_per_weight == 8 * sum(sizes) / make_plan(encoder, "int8").parameters


def test_the_file_holds_the_codes_and_no_trace_of_the_machine(
    artifact: Artifact, solved: SolvedEncoder
) -> None:
    graph = onnx.load(artifact.folder / "model.onnx").graph
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    for layer in solved.layers:
        assert np.array_equal(stored[f"{layer.name}.weight_quantized"], layer.codes.numpy().T)
        assert np.array_equal(stored[f"{layer.name}.weight_scale"], layer.scale.numpy())
    assert not any(node.metadata_props or node.doc_string for node in graph.node)


def test_the_file_computes_what_the_codes_stand_for(
    encoder: Encoder, artifact: Artifact, solved: SolvedEncoder
) -> None:
    batches = make_batches(encoder.model, encoder.info, some_rows())
    results = run_graph(artifact.folder / "model.onnx", encoder.info, batches)
    expected = run_model(stand_in(encoder, solved).model, encoder.info, batches)
    assert measure_distance(results, expected) < 0.01


def test_other_codes_than_the_files_are_told_apart(
    encoder: Encoder, artifact: Artifact, solved: SolvedEncoder
) -> None:
    batches = make_batches(encoder.model, encoder.info, None)
    exact = run_model(encoder.model, encoder.info, batches)
    graph = artifact.folder / "model.onnx"
    expected = run_model(stand_in(encoder, solved).model, encoder.info, batches)
    check_rounded(graph, encoder.info, batches, expected, exact)
    # The last layer loses its bias.
    last = replace(solved.layers[-1], bias=torch.zeros_like(solved.layers[-1].scale))
    other = replace(solved, layers=(*solved.layers[:-1], last))
    expected = run_model(stand_in(encoder, other).model, encoder.info, batches)
    with pytest.raises(ArtifactError, match=r"than its codes stand for.*reduce_range: true"):
        check_rounded(graph, encoder.info, batches, expected, exact)


def test_equal_input_gives_equal_bytes(
    encoder: Encoder, artifact: Artifact, solved: SolvedEncoder, tmp_path: Path
) -> None:
    write(encoder, solved, INT8, tmp_path)
    again = (tmp_path / "model.onnx").read_bytes()
    assert again == (artifact.folder / "model.onnx").read_bytes()


@pytest.mark.parametrize("activations", ["fp32", "fp16"])
def test_half_precision_takes_half_the_bytes(
    encoder: Encoder, tmp_path: Path, activations: str
) -> None:
    export = ExportSpec(format="onnx", precision="fp16", activations=activations)
    write(encoder, NOTHING, export, tmp_path / "half")
    graph = onnx.load(tmp_path / "half" / "model.onnx")
    outputs = {each.name: each.type.tensor_type.elem_type for each in graph.graph.output}
    assert outputs == {"last_hidden_state": 1, "sentence_embedding": 1}
    weights = [each for each in graph.graph.initializer if len(each.dims) > 1 and each.dims[0] > 2]
    assert {each.data_type for each in weights} <= {10, 7}
    batches = make_batches(encoder.model, encoder.info, None)
    results = run_graph(tmp_path / "half" / "model.onnx", encoder.info, batches)
    expected = run_model(encoder.model, encoder.info, batches)
    assert 0 < measure_difference(results, expected) < 1e-2


def test_rotary_embeddings_in_half_precision_are_those_of_the_model(tmp_path: Path) -> None:
    """The angles of a text of 512 tokens need more digits than float16 has."""
    folder = write_encoder_checkpoint(tmp_path / "model", "ModernBertModel")
    changes = {"config": "max_position_embeddings", "sentence_bert_config": "max_seq_length"}
    for name, key in changes.items():
        tree = json.loads((folder / f"{name}.json").read_text()) | {key: 512}
        (folder / f"{name}.json").write_text(json.dumps(tree))
    checkpoint = open_checkpoint(resolve_source(str(folder)))
    info = describe_encoder(checkpoint)
    encoder = Encoder(checkpoint, info, load_encoder(checkpoint, info))
    half, buffers = halve(encoder.model), dict(encoder.model.named_buffers())
    assert {each.dtype for each in half.parameters()} == {torch.float16}
    assert any("inv_freq" in name for name in buffers)
    assert all(torch.equal(each, buffers[name]) for name, each in half.named_buffers())
    write(encoder, NOTHING, ExportSpec(**HALF), tmp_path / "half")
    batches = make_batches(encoder.model, info, None)
    assert batches[-1]["input_ids"].shape[1] == 512
    results = run_graph(tmp_path / "half" / "model.onnx", info, batches)
    expected = run_model(encoder.model, info, batches)
    assert 0 < measure_difference(results, expected) < 1e-2


def test_long_texts_of_the_users_are_cut(encoder: Encoder) -> None:
    """Attention over thousands of tokens would take all memory."""
    long = TextRows(((5,) * 9000, (6,)), ((0,) * 9000, (0,)), (), (), "made up", "")
    assert make_batches(encoder.model, encoder.info, long)[-1]["input_ids"].shape == (2, 512)


def test_an_output_that_is_not_finite_is_no_measure(encoder: Encoder) -> None:
    batches = make_batches(encoder.model, encoder.info, None)
    damaged = copy.deepcopy(encoder.model)
    damaged.get_submodule("encoder.layer.0.output.dense").bias[3] = float("nan")
    with pytest.raises(ArtifactError, match="NaN or infinite outputs in PyTorch"):
        run_model(damaged, encoder.info, batches)
    one, other = np.zeros((2, 2), np.float32), np.full((2, 2), np.nan, np.float32)
    assert np.isnan(measure_difference([one, one], [other, one]))


def test_the_float_graph_is_written_for_comparison(encoder: Encoder, tmp_path: Path) -> None:
    path = write_float_encoder(encoder.checkpoint, encoder.info, tmp_path / "f", encoder.model)
    assert [each.name for each in (tmp_path / "f").iterdir()] == [path.name] == ["model.onnx"]


def test_weights_beyond_the_largest_file_lie_beside_it(encoder: Encoder, tmp_path: Path) -> None:
    from quantkit.formats.onnx.encoder import _save
    from quantkit.formats.onnx.encoder_export import export_encoder

    _save(export_encoder(encoder.model, encoder.info), tmp_path / "model.onnx", 1000)
    assert (tmp_path / "model.onnx.data").stat().st_size > 100_000
    batches = make_batches(encoder.model, encoder.info, None)
    results = run_graph(tmp_path / "model.onnx", encoder.info, batches)
    assert measure_difference(results, run_model(encoder.model, encoder.info, batches)) < 1e-5


def test_a_graph_that_drifts_is_refused_and_leaves_nothing(
    encoder: Encoder, tmp_path: Path
) -> None:
    model = encoder.model
    model.train()  # dropout: each run computes something else
    try:
        with pytest.raises(ArtifactError, match=r"differ by \S+ of the largest one, and 0\.0001"):
            write_float_encoder(encoder.checkpoint, encoder.info, tmp_path, model)
    finally:
        model.eval()
    assert list(tmp_path.iterdir()) == []


def test_codes_that_compute_nonsense_are_refused_and_leave_nothing(
    encoder: Encoder, solved: SolvedEncoder, tmp_path: Path
) -> None:
    broken = replace(solved.layers[3], scale=torch.full_like(solved.layers[3].scale, 1e38))
    layers = (*solved.layers[:3], broken, *solved.layers[4:])
    with pytest.raises(ArtifactError, match="NaN or infinite"):
        write(encoder, replace(solved, layers=layers), INT8, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_int8_computes_in_float32_alone(
    encoder: Encoder, solved: SolvedEncoder, tmp_path: Path
) -> None:
    export = ExportSpec(format="onnx", precision="int8", activations="fp16")
    with pytest.raises(InputError, match="leave activations out"):
        write(encoder, solved, export, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_process_that_checks_has_onnxruntime_and_numpy_alone() -> None:
    from quantkit.formats.onnx import graph_runner

    folder = str(Path(graph_runner.__file__).parent)
    source = (
        f"import sys; sys.path.insert(0, {folder!r})\n"
        "import graph_runner, numpy, onnxruntime\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'quantkit'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_file_that_is_no_graph_is_one_line(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    batches = make_batches(encoder.model, encoder.info, None)
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot run it") as caught:
        run_graph(tmp_path / "model.onnx", encoder.info, batches)
    assert "\n" not in str(caught.value)
