"""Tests of the ONNX Runtime worker: real graphs in the real runtime, transformers to compare."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.errors import ArtifactError, MissingPackageError
from quantkit.judging.evaluate import WORKERS, evaluate
from quantkit.judging.tokens import READERS, collect_texts, compare_tokens
from quantkit.judging.verdict import judge
from quantkit.recipe import GateSpec
from quantkit.records import EvalResult, TokenWindows
from tests.helpers import make_pico_model
from tests.judging.conversation import load, running_worker, say
from tests.judging.onnx_files import round_onnx, write_onnx, write_table

VOCAB = 300
WINDOWS = TokenWindows(
    ids=np.random.default_rng(0).integers(3, VOCAB, (9, 48)),
    weights=np.ones((9, 48), np.float32),
    source="test",
    sha256="0" * 64,
)
LENIENT = GateSpec(data="test", max_kl=1.0, max_perplexity_increase=1.0, min_top1_agreement=0.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks."""
    return make_pico_model(tmp_path_factory.mktemp("checkpoint"), vocab=VOCAB)


@pytest.fixture(scope="module")
def exact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its graph in float32."""
    return write_onnx(checkpoint, tmp_path_factory.mktemp("exact") / "onnx")


@pytest.fixture(scope="module")
def rounded(exact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its graph in eight bits."""
    return round_onnx(exact, tmp_path_factory.mktemp("rounded") / "onnx", bits=8)


@pytest.fixture(scope="module")
def worker() -> Iterator[subprocess.Popen[str]]:
    """One worker that the tests below talk to."""
    with running_worker("onnxruntime") as process:
        yield process


def reference(checkpoint: Path, ids: list[list[int]]) -> np.ndarray:
    """Logits of transformers in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor(ids)).logits.numpy()
    return found


def run_evaluation(baseline: Path, candidate: Path, **options: str) -> EvalResult:
    """`evaluate` in ONNX Runtime on a CPU."""
    return evaluate(
        baseline,
        candidate,
        WINDOWS,
        timeout_seconds=60,
        device="cpu",
        runtime="onnxruntime",
        **options,
    )


def test_logits_of_a_float_graph_are_those_of_transformers(
    worker: subprocess.Popen[str], checkpoint: Path, exact: Path, tmp_path: Path
) -> None:
    """At every position of every row; a row gives the same alone."""
    ids = np.random.default_rng(1).integers(3, VOCAB, (3, 70)).tolist()

    loaded = load(worker, exact)
    answer = say(worker, op="logits", ids=ids, file=str(tmp_path / "all"))
    say(worker, op="generate", prompt_ids=ids[0][:5], max_new_tokens=3)
    say(worker, op="logits", ids=ids[2:], file=str(tmp_path / "last"))

    assert (loaded["vocab"], loaded["dtype"], loaded["device"]) == (VOCAB, "float32", "cpu")
    assert loaded["generator"] is True
    assert {"onnxruntime", "onnxruntime-genai", "python"} == loaded["versions"].keys()
    assert answer == {"ok": True, "shape": [3, 70, VOCAB], "finite": True}
    every, last = (np.fromfile(tmp_path / name, np.float32) for name in ("all", "last"))
    np.testing.assert_allclose(every.reshape(3, 70, VOCAB), reference(checkpoint, ids), atol=1e-4)
    np.testing.assert_allclose(last, every[-last.size :], atol=1e-5)


def test_generation_is_greedy_with_onnxruntime_genai_and_without(
    worker: subprocess.Popen[str], checkpoint: Path, exact: Path, tmp_path: Path
) -> None:
    """The ids are those that transformers picks one by one, within the model's positions."""
    ids = WINDOWS.ids[0, :6].tolist()
    for _ in range(8):
        ids.append(int(reference(checkpoint, [ids])[0, -1].argmax()))
    plain = shutil.copytree(exact, tmp_path / "plain")
    (plain / "genai_config.json").unlink()

    for folder, generator in ((exact, True), (plain, False)):
        assert load(worker, folder)["generator"] is generator
        assert say(worker, op="generate", prompt_ids=ids[:6], max_new_tokens=8)["ids"] == ids[6:]
        full = [3] * 512
        assert say(worker, op="generate", prompt_ids=full, max_new_tokens=8)["ids"] == []
        assert len(say(worker, op="generate", prompt_ids=full[2:], max_new_tokens=8)["ids"]) == 2


def test_a_graph_without_a_cache_reads_everything_again(
    worker: subprocess.Popen[str], tmp_path: Path
) -> None:
    """Its ids are int32, it asks for positions, and says nothing of its vocabulary."""
    table = np.random.default_rng(2).normal(size=(11, 11)).astype(np.float32)
    file = write_table(tmp_path / "bigrams.onnx", table)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": int(table[4].argmax())}))

    loaded = load(worker, file)
    say(worker, op="logits", ids=[[1, 2, 3], [4, 5, 6]], file=str(tmp_path / "x"))

    assert (loaded["vocab"], loaded["generator"]) == (11, False)
    want = table[[1, 2, 3, 4, 5, 6]]
    np.testing.assert_array_equal(np.fromfile(tmp_path / "x", np.float32).reshape(6, 11), want)
    got = say(worker, op="generate", prompt_ids=[1, 4], max_new_tokens=5)["ids"]
    assert got == [int(table[4].argmax())]
    tokens = say(worker, op="tokenize", texts=["a"])
    assert (tokens["plain"], tokens["special"]) == (None, None)


def test_a_graph_in_float16_answers_in_float32(
    worker: subprocess.Popen[str], checkpoint: Path, tmp_path: Path
) -> None:
    """Its cache and its logits are float16."""
    folder = write_onnx(checkpoint, tmp_path / "half", float16=True)
    ids = WINDOWS.ids[:2].tolist()

    loaded = load(worker, folder)
    answer = say(worker, op="logits", ids=ids, file=str(tmp_path / "x"))

    assert (loaded["dtype"], answer["finite"]) == ("float16", True)
    got = np.fromfile(tmp_path / "x", np.float32).reshape(2, 48, VOCAB)
    np.testing.assert_allclose(got, reference(checkpoint, ids), atol=0.05)


def test_both_ways_of_generation_are_timed(worker: subprocess.Popen[str], exact: Path) -> None:
    """Of several rows too."""
    load(worker, exact)
    first = say(worker, op="time", ids=[[5] * 20] * 2, new_tokens=4, generator=True)
    load(worker, exact)
    second = say(worker, op="time", ids=[[5] * 20] * 2, new_tokens=4, generator=False)

    for answer in (first, second):
        assert 0 < answer["prefill"] < 10
        assert 0 < answer["decoding"] < 10


def test_what_cannot_be_run_is_told_in_one_line(
    worker: subprocess.Popen[str], exact: Path, tmp_path: Path
) -> None:
    """The worker goes on behind each."""
    table = np.zeros((5, 5), np.float32)
    (tmp_path / "empty").mkdir()
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.onnx", "b.onnx"):
        write_table(two / name, table)
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes((exact / "model.onnx").read_bytes()[:1000])
    bare = shutil.copytree(exact, tmp_path / "bare")
    (bare / "model.onnx.data").unlink()
    cut = shutil.copytree(exact, tmp_path / "cut")
    os.truncate(cut / "model.onnx.data", 1000)
    library = shutil.copytree(exact, tmp_path / "library")
    config = json.loads((library / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = "evil.so"
    (library / "genai_config.json").write_text(json.dumps(config))
    torn = shutil.copytree(exact, tmp_path / "torn")
    (torn / "genai_config.json").write_text("[1]")

    for path, words in (
        (tmp_path / "none.onnx", "there is no file"),
        (tmp_path / "empty", "must hold model.onnx or one ONNX file, and holds none"),
        (two, "and holds a.onnx, b.onnx"),
        (damaged, "does not run damaged.onnx"),
        (bare, "model.onnx.data"),
        (cut, "does not run model.onnx"),
        (write_table(tmp_path / "hidden.onnx", table, output="hidden"), "it gives hidden tensor"),
        (write_table(tmp_path / "strange.onnx", table, extra="image"), "not what the gate expects"),
        (library, "programs of artifacts are not run"),
        (torn, "genai_config.json is not a JSON object"),
    ):
        answer = load(worker, path)
        assert (answer["ok"], answer["kind"]) == (False, "other"), path
        assert words in answer["error"]
        assert "\n" not in answer["error"]
    load(worker, exact)
    wrong = say(worker, op="logits", ids=[[5, VOCAB + 7]], file=str(tmp_path / "x"))
    assert "ONNX Runtime does not run model.onnx" in wrong["error"]
    full = say(worker, op="logits", ids=[[3] * 200], file="/dev/full")
    assert (full["ok"], full["kind"]) == (False, "disk")
    assert say(worker, op="generate", prompt_ids=[5, 6], max_new_tokens=1)["ok"] is True


def test_nothing_is_told_to_the_makers_of_the_runtime(exact: Path, tmp_path: Path) -> None:
    """ONNX Runtime and onnxruntime-genai collect usage data in the home folder by default."""
    environment = {
        key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"
    }
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    requests = [
        {"op": "load", "path": str(exact), "device": "cpu", "threads": 1},
        {"op": "generate", "prompt_ids": [5, 6], "max_new_tokens": 2},
    ]

    done = subprocess.run(
        [sys.executable, str(WORKERS["onnxruntime"])],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=True,
    )

    assert [json.loads(line)["ok"] for line in done.stdout.splitlines()] == [True, True]
    assert list(tmp_path.iterdir()) == []


# --- the gate -----------------------------------------------------------------------------------


def test_an_unquantized_export_passes_and_is_no_copy(checkpoint: Path, exact: Path) -> None:
    """Another runtime rounds otherwise: its divergence is tiny and not exactly zero."""
    got = run_evaluation(checkpoint, exact)
    judgement = judge(got, LENIENT)

    assert got.runtime == "onnxruntime"
    assert {"onnxruntime", "onnxruntime-genai", "torch", "transformers"} <= got.versions.keys()
    assert got.versions["dtype"] == "float32"
    assert 0 < got.kl_max < 1e-8
    assert got.agreement == (1.0,) * 9
    assert (got.suspicions, judgement.verdict, judgement.reasons) == ((), "PASS", ())
    (note,) = judgement.notes
    assert note.startswith("onnxruntime-genai puts nothing before or behind a prompt")


def test_a_tokenizer_that_cuts_text_otherwise_fails_the_artifact(
    checkpoint: Path, rounded: Path, tmp_path: Path
) -> None:
    """The numbers are those of the right tokenizer, and the verdict is FAIL all the same; the file
    alone is as good as its folder."""
    wrong = shutil.copytree(rounded, tmp_path / "wrong")
    tree = json.loads((wrong / "tokenizer.json").read_text())
    del tree["model"]["merges"][0]
    (wrong / "tokenizer.json").write_text(json.dumps(tree))

    got = run_evaluation(checkpoint, wrong / "model.onnx")
    judgement = judge(got, LENIENT)

    assert 1e-7 < got.kl_max < 1e-2
    assert judgement.verdict == "FAIL"
    assert [check.verdict for check in judgement.checks] == ["PASS"] * 3
    assert "onnxruntime-genai's tokenizer gives other ids than the model's" in judgement.reasons[0]


def test_what_onnxruntime_genai_adds_to_a_prompt_is_a_note(
    worker: subprocess.Popen[str], checkpoint: Path, exact: Path, tmp_path: Path
) -> None:
    """It adds nothing unless it is asked to, and then by rules of its own."""
    reader, tokenizer = READERS["onnxruntime"], load_tokenizer(checkpoint)
    texts = collect_texts(tokenizer, VOCAB)
    marked = shutil.copytree(exact, tmp_path / "marked")
    file = marked / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_eos_token": True}))

    found = []
    for folder in (exact, marked):
        load(worker, folder)
        answer = say(worker, op="tokenize", texts=texts)
        plain, special = answer["plain"], answer["special"]
        found.append(compare_tokens(reader, tokenizer, VOCAB, plain, special))
    without = compare_tokens(reader, tokenizer, VOCAB, None, None)

    assert [findings.suspicions for findings in (*found, without)] == [()] * 3
    assert 'update_options(add_special_tokens="true"), or let the prompt hold' in found[0].notes[0]
    assert "let the prompt hold what is missing; add_special_tokens gives 0 " in found[1].notes[0]
    assert "its tokenizer was not compared" in without.notes[0]


def test_another_vocabulary_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Distributions over different tokens have no divergence."""
    other = write_table(tmp_path / "table.onnx", np.zeros((310, 310), np.float32))

    with pytest.raises(ArtifactError, match="a vocabulary of 310 tokens and its baseline"):
        run_evaluation(checkpoint, other)


def test_an_interpreter_without_onnxruntime_is_named(
    checkpoint: Path, exact: Path, tmp_path: Path
) -> None:
    """The candidate's worker may run under another interpreter than the baseline's."""
    python = tmp_path / "python"
    code = "import runpy, sys; sys.modules['onnxruntime'] = None; "
    code += "runpy.run_path(sys.argv[1], run_name='__main__')"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
    python.chmod(0o755)

    with pytest.raises(MissingPackageError, match=f"'onnxruntime': install it for {python}"):
        run_evaluation(checkpoint, exact, python=str(python))
