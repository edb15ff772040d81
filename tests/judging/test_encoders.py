"""Tests of quantkit.judging.encoders and .speed: real checkpoints, graphs, and processes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.encoders.data import load_rows
from quantkit.encoders.model import describe_encoder, load_encoder
from quantkit.errors import ArtifactError, CalibrationError, InputError, WorkerError
from quantkit.formats.onnx.encoder import write_float_encoder
from quantkit.judging.encoder_comparison import Outputs, compare_outputs
from quantkit.judging.encoder_verdict import judge_encoder
from quantkit.judging.encoders import evaluate_encoder
from quantkit.judging.speed import measure_encoder_speed
from quantkit.recipe import GateSpec
from quantkit.records import EncoderInfo, EncoderResult, Event, TextRows
from tests.encoder_models import encoder_sentences, write_encoder_checkpoint

TEXTS = 40


@dataclass(frozen=True)
class Encoder:
    """A checkpoint, its graph in float, and texts."""

    folder: Path
    graph: Path
    info: EncoderInfo
    rows: TextRows


def make_encoder(folder: Path, architecture: str) -> Encoder:
    import transformers

    checkpoint = open_checkpoint(
        resolve_source(str(write_encoder_checkpoint(folder / "model", architecture)))
    )
    info = describe_encoder(checkpoint)
    graph = write_float_encoder(checkpoint, info, folder / "onnx", load_encoder(checkpoint, info))
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in encoder_sentences(TEXTS))
    )
    rows = load_rows(
        folder / "texts.jsonl",
        split="train",
        text_column="text",
        pair_column=None,
        label_column=None,
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "model"),
        info=info,
        samples=TEXTS,
        sequence_length=32,
        seed=0,
        order="sequential",
    )
    return Encoder(folder / "model", graph, info, rows)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return make_encoder(tmp_path_factory.mktemp("embedding"), "BertModel")


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return make_encoder(tmp_path_factory.mktemp("tagger"), "BertForTokenClassification")


def run(encoder: Encoder, graph: Path, **settings: object) -> EncoderResult:
    return evaluate_encoder(
        encoder.folder,
        graph,
        encoder.rows,
        encoder.info,
        timeout_seconds=120,
        device="cpu",
        **settings,  # type: ignore[arg-type]
    )


def damage(graph: Path, into: Path, factor: float) -> Path:
    """Write the graph with its largest matrix of a linear layer multiplied by `factor`."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(graph)
    matrices = {
        name for node in model.graph.node if node.op_type == "MatMul" for name in node.input
    }
    weights = [each for each in model.graph.initializer if each.name in matrices]
    weight = max(weights, key=lambda each: len(numpy_helper.to_array(each).ravel()))
    array = numpy_helper.to_array(weight) * np.float32(factor)
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    into.mkdir()
    onnx.save(model, into / "model.onnx")
    return into


def spec(**limits: object) -> GateSpec:
    return GateSpec.model_validate({"data": "test"} | limits)


@pytest.mark.slow
def test_the_float_graph_of_an_encoder_is_its_baseline_up_to_rounding(encoder: Encoder) -> None:
    """Whatever the batches are, each text's numbers are its own; as an INT8 artifact it fails."""
    events: list[Event] = []

    got = run(encoder, encoder.graph.parent, top_k=5, progress=events.append)

    assert (got.task, got.texts, got.runtime) == ("embedding", TEXTS, "onnxruntime")
    np.testing.assert_allclose(got.cosine, 1, atol=1e-6)
    assert got.overlap == (1.0,) * TEXTS
    assert got.difference is not None
    assert got.difference < 1e-6
    assert (got.finite, got.suspicions, got.notes) == (True, (), ())
    assert {"torch", "transformers", "onnxruntime"} <= got.versions.keys()
    assert (events[0].done, events[-1].done) == (0, TEXTS)
    assert judge_encoder(got, spec(), quantized=False).verdict == "PASS"
    assert judge_encoder(got, spec()).verdict == "FAIL"


@pytest.mark.slow
def test_measurements_agree_with_an_independent_script(encoder: Encoder, tmp_path: Path) -> None:
    """Text by text, without batches or padding, in this process."""
    import onnxruntime
    import transformers

    graph = damage(encoder.graph, tmp_path / "bad", 1.1)
    session = onnxruntime.InferenceSession(graph / "model.onnx")
    model = transformers.AutoModel.from_pretrained(encoder.folder).eval()
    want = []
    for ids in encoder.rows.ids:
        inputs = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "token_type_ids": torch.zeros(1, len(ids), dtype=torch.long),
        }
        with torch.no_grad():
            first = model(**inputs).last_hidden_state.mean(dim=1)[0]
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        (second,) = session.run(["sentence_embedding"], feeds)
        want.append(float(torch.cosine_similarity(first, torch.from_numpy(second[0]), dim=0)))

    got = run(encoder, graph)

    np.testing.assert_allclose(got.cosine, want, atol=1e-5)
    assert 0.5 < np.mean(got.cosine) < 0.9999


@pytest.mark.slow
def test_a_damaged_graph_fails(encoder: Encoder, tmp_path: Path) -> None:
    got = run(encoder, damage(encoder.graph, tmp_path / "bad", -3), top_k=5)

    judgement = judge_encoder(got, spec())

    assert judgement.verdict == "FAIL"
    assert {check.name for check in judgement.checks if check.verdict == "FAIL"} == {
        "min_cosine",
        "min_retrieval_overlap",
    }


@pytest.mark.slow
def test_a_graph_that_is_not_finite_fails_without_numbers(encoder: Encoder, tmp_path: Path) -> None:
    got = run(encoder, damage(encoder.graph, tmp_path / "bad", float("nan")))

    judgement = judge_encoder(got, spec())

    assert (got.finite, judgement.verdict, judgement.measures) == (False, "FAIL", ())
    assert judgement.reasons == (
        f"not finite: the artifact's outputs hold a NaN or an infinity in {TEXTS} of {TEXTS} texts",
    )


@pytest.mark.slow
def test_labels_of_tokens_are_compared_without_those_of_specials(
    tagger: Encoder, tmp_path: Path
) -> None:
    """And padding: the share of a text is that of its own tokens, read one text at a time."""
    import onnxruntime
    import transformers

    graph = damage(tagger.graph, tmp_path / "bad", 3)
    session = onnxruntime.InferenceSession(graph / "model.onnx")
    model = transformers.AutoModelForTokenClassification.from_pretrained(tagger.folder).eval()
    want = []
    for ids in tagger.rows.ids:
        inputs = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "token_type_ids": np.zeros((1, len(ids)), np.int64),
        }
        (second,) = session.run(["logits"], inputs)
        with torch.no_grad():
            first = model(**{n: torch.from_numpy(a) for n, a in inputs.items()}).logits.numpy()
        # [CLS] comes first and [SEP] last.
        same = (first.argmax(2) == second.argmax(2))[0, 1:-1]
        want.append(float(same.mean()))

    got = run(tagger, graph)

    assert got.agreement == pytest.approx(want)
    assert 0.3 < np.mean(want) < 1
    assert (got.cosine, got.labels, got.finite) == ((), (), True)


@pytest.mark.slow
def test_another_model_is_refused(encoder: Encoder, tagger: Encoder) -> None:
    """By what its graph gives; by its width; by its file."""
    with pytest.raises(WorkerError, match="outputs logits, and a embedding needs"):
        run(encoder, tagger.graph)
    with pytest.raises(ArtifactError, match="no ONNX file"):
        run(encoder, encoder.folder)
    with pytest.raises(InputError, match="there is no such program"):
        run(encoder, encoder.graph, python="/nowhere/python")


@pytest.mark.slow
def test_both_graphs_are_timed_in_the_same_run(encoder: Encoder, tmp_path: Path) -> None:
    events: list[Event] = []
    other = damage(encoder.graph, tmp_path / "other", 0.5)

    got = measure_encoder_speed(
        encoder.graph,
        other,
        encoder.rows,
        encoder.info,
        threads=1,
        repetitions=3,
        timeout_seconds=120,
        progress=events.append,
    )

    assert (got.unit, got.threads, got.repetitions) == ("sentences", 1, 3)
    assert got.what.startswith(f"{TEXTS} texts of ")
    assert got.runtime.startswith("onnxruntime 1.")
    # The same arithmetic: whatever the machine does, it is not ten times as fast.
    assert 0.1 < got.artifact / got.baseline < 10
    assert [event.done for event in events] == [0, 1, 2, 3]


# --- comparing, without processes -----------------------------------------------------------------


def make_rows(count: int, **fields: object) -> TextRows:
    """Different texts, with labels or pairs."""
    ids = tuple((2, 5 + number, 3) for number in range(count))
    rows = TextRows(ids, tuple((0, 0, 0) for _ in ids), (), (), "test", "0" * 64)
    return dataclasses.replace(rows, **fields)  # type: ignore[arg-type]


def make_outputs(vectors: np.ndarray) -> Outputs:
    return Outputs(vectors, tuple(row.argmax(keepdims=True) for row in vectors))


def compare(task: str, first: np.ndarray, second: np.ndarray, rows: TextRows) -> EncoderResult:
    result = EncoderResult("onnxruntime", task, len(rows.ids))
    return compare_outputs(result, (make_outputs(first), make_outputs(second)), rows, 10)


def test_classes_are_compared_with_each_other_and_with_the_labels() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 20, 3)).astype(np.float32)
    labels = rng.integers(0, 3, 20)

    got = compare(
        "sequence-classification", first, second, make_rows(20, labels=tuple(map(float, labels)))
    )

    assert got.agreement == tuple((first.argmax(1) == second.argmax(1)).astype(float))
    assert got.candidate_score == tuple((second.argmax(1) == labels).astype(float))
    assert got.baseline_labels == tuple(first.argmax(1))


@pytest.mark.parametrize("label", [3.0, -1.0, 0.5])
def test_a_label_that_is_no_class_is_refused(label: float) -> None:
    vectors = np.zeros((1, 3), np.float32)

    with pytest.raises(CalibrationError, match="none of the model's 3 classes"):
        compare("sequence-classification", vectors, vectors, make_rows(1, labels=(label,)))


def test_one_number_a_text_is_compared_by_its_rank_alone() -> None:
    """A score has no class; without labels nothing is compared, and a note says so."""
    scores = np.arange(20, dtype=np.float32)[:, None]

    ranked = compare(
        "sequence-classification",
        scores,
        scores,
        make_rows(20, labels=tuple(map(float, range(20)))),
    )
    nothing = compare("sequence-classification", scores, scores, make_rows(20))

    assert (ranked.agreement, ranked.baseline_score) == ((), tuple(map(float, range(20))))
    judgement = judge_encoder(nothing, spec())
    assert judgement.verdict == "INCONCLUSIVE"
    assert "name gate.label_column" in judgement.reasons[0]


def test_pairs_are_scored_by_the_cosine_of_their_texts() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 4, 5)).astype(np.float32)
    rows = make_rows(4, labels=(0.5, 4.0), pairs=((0, 1), (2, 3)))

    got = compare("embedding", first, second, rows)

    cosine = first[2] @ first[3] / np.linalg.norm(first[2]) / np.linalg.norm(first[3])
    assert got.baseline_score[1] == pytest.approx(float(cosine), abs=1e-6)
    assert (got.labels, got.baseline_labels) == ((0.5, 4.0), ())


def test_labels_that_say_nothing_of_embeddings_are_refused() -> None:
    vectors = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)

    with pytest.raises(CalibrationError, match=r"gate\.text_pair_column"):
        compare("embedding", vectors, vectors, make_rows(4, labels=(1.0, 2.0, 3.0, 4.0)))
    with pytest.raises(CalibrationError, match="all similarities are equal"):
        compare(
            "embedding", vectors, vectors, make_rows(4, labels=(1.0, 1.0), pairs=((0, 1), (2, 3)))
        )


def test_neighbours_of_too_few_texts_are_not_compared() -> None:
    """With 11 texts the ten nearest are all others; a text that comes twice is one."""
    vectors = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    rows = make_rows(12)
    twice = dataclasses.replace(rows, ids=(*rows.ids[:11], rows.ids[0]))

    assert len(compare("embedding", vectors, vectors, rows).overlap) == 12
    few = compare("embedding", vectors, vectors, twice)
    assert few.overlap == ()
    assert "11 different texts, and the nearest 10 need at least 12" in few.notes[0]
