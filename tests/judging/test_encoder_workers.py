"""Tests of the encoders' workers, spoken to by hand: real processes, small graphs made here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantkit.judging.encoders import ENCODER_WORKERS
from tests.encoder_models import write_encoder_checkpoint
from tests.judging.conversation import running_worker, say
from tests.judging.lookup_graph import TABLE, write_graph

ROWS = [[2, 5, 9, 3], [2, 7, 3, 0]]
MASK = [[1, 1, 1, 1], [1, 1, 1, 0]]
BATCH = {"input_ids": ROWS, "attention_mask": MASK, "token_type_ids": [[0] * 4] * 2}
MEAN = {"mode": "mean", "normalize": False}


@pytest.fixture(scope="module")
def onnx_worker() -> Iterator[subprocess.Popen[str]]:
    with running_worker("onnxruntime", ENCODER_WORKERS) as process:
        yield process


@pytest.fixture(scope="module")
def torch_worker() -> Iterator[subprocess.Popen[str]]:
    with running_worker("transformers", ENCODER_WORKERS) as process:
        yield process


def load(
    process: subprocess.Popen[str],
    path: Path,
    task: str = "embedding",
    pooling: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Let a worker load an encoder on the CPU."""
    request = {"op": "load", "path": str(path), "device": "cpu", "threads": 1}
    return say(process, **request, task=task, pooling=pooling)


def encode(process: subprocess.Popen[str], file: Path, **changes: Any) -> dict[str, Any]:
    batch = {name: rows for name, rows in (BATCH | changes).items() if rows is not None}
    return say(process, op="encode", batch=batch, file=str(file))


def read(answer: dict[str, Any], file: Path) -> np.ndarray:
    return np.fromfile(file, np.float32).reshape(answer["shape"])


@pytest.mark.parametrize("name", ["token_embeddings", "last_hidden_state"])
@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalize", [False, True])
def test_token_vectors_are_pooled_as_the_model_says(
    onnx_worker: subprocess.Popen[str], tmp_path: Path, name: str, mode: str, normalize: bool
) -> None:
    """With loops over the tokens that are no padding."""
    load(
        onnx_worker,
        write_graph(tmp_path / "g.onnx", name),
        pooling={"mode": mode} | {"normalize": normalize},
    )
    want = []
    for row, mask in zip(ROWS, MASK, strict=True):
        tokens = TABLE[[token for token, seen in zip(row, mask, strict=True) if seen]]
        pooled = {"mean": tokens.mean(axis=0), "cls": tokens[0], "max": tokens.max(axis=0)}[mode]
        want.append(pooled / np.linalg.norm(pooled) if normalize else pooled)

    answer = encode(onnx_worker, tmp_path / "x.f32")

    assert answer == {"ok": True, "shape": [2, 6]}
    np.testing.assert_allclose(read(answer, tmp_path / "x.f32"), want, rtol=1e-5)


def test_both_workers_pool_alike() -> None:
    """The same formulas twice, as neither worker may import what the other has."""
    sys.path.insert(0, str(ENCODER_WORKERS["transformers"].parent))
    import encoder_worker  # type: ignore[import-not-found]
    import onnxruntime_encoder_worker  # type: ignore[import-not-found]

    sys.path.pop(0)
    hidden = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    mask = np.array(MASK)
    for mode in ("mean", "cls", "max"):
        for normalize in (False, True):
            pooling = {"mode": mode, "normalize": normalize}
            first = encoder_worker.pool(torch.from_numpy(hidden), torch.from_numpy(mask), pooling)
            second = onnxruntime_encoder_worker.pool(hidden, mask, pooling)
            np.testing.assert_allclose(first.numpy(), second, rtol=1e-6)
            assert second.dtype == np.float32


def test_a_graph_of_another_kind_is_refused_by_the_outputs_that_it_has(
    onnx_worker: subprocess.Popen[str], tmp_path: Path
) -> None:
    graph = write_graph(tmp_path / "g.onnx", "hidden")

    embedding = load(onnx_worker, graph, pooling=MEAN)
    labels = load(onnx_worker, graph, "sequence-classification")

    assert not embedding["ok"]
    assert "the outputs hidden, attention_mask_seen, and a embedding needs" in embedding["error"]
    assert labels["error"].endswith("a sequence-classification needs logits")


def test_logits_of_the_wrong_rank_are_refused(
    onnx_worker: subprocess.Popen[str], tmp_path: Path
) -> None:
    load(onnx_worker, write_graph(tmp_path / "g.onnx", "logits"), "sequence-classification")

    answer = encode(onnx_worker, tmp_path / "x.f32")

    assert "the output logits has the shape [2, 4, 6]" in answer["error"]


@pytest.mark.parametrize(
    ("inputs", "changes", "words"),
    [
        (("input_ids", "attention_mask", "position_ids"), {}, "needs the inputs position_ids"),
        (("input_ids",), {}, "does not take attention_mask"),
        (
            ("input_ids", "attention_mask"),
            {"token_type_ids": [[0, 0, 1, 1]] * 2},
            "does not take token_type_ids",
        ),
    ],
)
def test_inputs_that_do_not_fit_the_graph_are_named(
    onnx_worker: subprocess.Popen[str],
    tmp_path: Path,
    inputs: tuple[str, ...],
    changes: dict[str, Any],
    words: str,
) -> None:
    """A mask of ones alone, or types of zeros alone, may be left out; these may not."""
    load(onnx_worker, write_graph(tmp_path / "g.onnx", "token_embeddings", inputs), pooling=MEAN)

    answer = encode(onnx_worker, tmp_path / "x.f32", **changes)

    assert (answer["ok"], answer["kind"]) == (False, "other")
    assert words in answer["error"]


def test_an_input_that_says_nothing_may_be_left_out(
    onnx_worker: subprocess.Popen[str], tmp_path: Path
) -> None:
    graph = write_graph(tmp_path / "g.onnx", "token_embeddings", ("input_ids",))
    load(onnx_worker, graph, pooling=MEAN)

    answer = encode(onnx_worker, tmp_path / "x.f32", attention_mask=[[1] * 4] * 2)

    assert answer["ok"]


def test_graphs_of_32_bit_inputs_get_them(
    onnx_worker: subprocess.Popen[str], tmp_path: Path
) -> None:
    graph = write_graph(tmp_path / "g.onnx", "token_embeddings", kind="INT32")
    load(onnx_worker, graph, pooling=MEAN)

    assert encode(onnx_worker, tmp_path / "x.f32")["ok"]


def test_a_pass_over_batches_is_timed(onnx_worker: subprocess.Popen[str], tmp_path: Path) -> None:
    load(onnx_worker, write_graph(tmp_path / "g.onnx", "token_embeddings"), pooling=MEAN)

    answer = say(onnx_worker, op="time", batches=[BATCH, BATCH])

    assert answer["ok"]
    assert 0 < answer["seconds"] < 10


def test_a_file_that_is_no_graph_is_told_in_one_line(
    onnx_worker: subprocess.Popen[str], tmp_path: Path
) -> None:
    """ONNX Runtime's own exceptions are no RuntimeErrors; the worker goes on all the same."""
    (tmp_path / "bad.onnx").write_bytes(b"no protobuf")

    bad = load(onnx_worker, tmp_path / "bad.onnx", pooling=MEAN)
    missing = load(onnx_worker, tmp_path / "none.onnx", pooling=MEAN)

    assert (bad["ok"], missing["ok"]) == (False, False)
    assert "bad.onnx" in bad["error"]
    assert "\n" not in bad["error"]
    assert say(onnx_worker, op="wait")["ok"]


@pytest.mark.parametrize(
    ("architecture", "task", "shape"),
    [
        ("BertModel", "embedding", [2, 32]),
        ("BertForSequenceClassification", "sequence-classification", [2, 3]),
        ("DistilBertForTokenClassification", "token-classification", [2, 4, 3]),
    ],
)
def test_the_baseline_computes_what_transformers_computes(
    torch_worker: subprocess.Popen[str],
    tmp_path: Path,
    architecture: str,
    task: str,
    shape: list[int],
) -> None:
    """Embeddings are the mean of the token vectors; logits are the model's own."""
    import transformers

    folder = write_encoder_checkpoint(tmp_path / "model", architecture)
    model = getattr(transformers, architecture).from_pretrained(folder).eval()
    types = None if architecture.startswith("Distil") else BATCH["token_type_ids"]
    inputs = {
        name: torch.tensor(rows)
        for name, rows in BATCH.items()
        if name in ("input_ids", "attention_mask")
    }
    with torch.no_grad():
        output = model(**inputs)
    if task == "embedding":
        mask = inputs["attention_mask"].unsqueeze(-1)
        want = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
    else:
        want = output.logits

    loaded = load(torch_worker, folder, task, MEAN)
    answer = encode(torch_worker, tmp_path / "x.f32", token_type_ids=types)

    assert (loaded["ok"], loaded["device"]) == (True, "cpu")
    assert answer["shape"] == shape
    np.testing.assert_allclose(read(answer, tmp_path / "x.f32"), want, rtol=1e-4, atol=1e-5)


def test_an_adapter_beside_the_weights_is_refused(
    torch_worker: subprocess.Popen[str], tmp_path: Path
) -> None:
    """Where peft is installed, transformers would apply it unasked."""
    folder = write_encoder_checkpoint(tmp_path / "model")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')

    answer = load(torch_worker, folder, pooling=MEAN)

    assert answer["ok"] is False
    assert "holds an adapter (adapter_config.json): merge it first" in answer["error"]


def test_missing_tensors_are_refused_but_for_the_pooler_that_no_embedding_needs(
    torch_worker: subprocess.Popen[str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_encoder_checkpoint(tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = {name: each for name, each in load_file(file).items() if "pooler" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    without_pooler = load(torch_worker, folder, pooling=MEAN)
    gone = next(name for name in tensors if name.endswith("query.weight"))
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})

    holey = load(torch_worker, folder, pooling=MEAN)
    headless = load(torch_worker, folder, "sequence-classification")

    assert without_pooler["ok"]
    assert gone in holey["error"]
    assert "missing keys" in headless["error"]
