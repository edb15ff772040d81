"""Tests of the llama.cpp worker: the real llama.cpp, real GGUF files, transformers to compare."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.errors import ArtifactError, MissingPackageError, WorkerError
from quantkit.judging.evaluate import WORKERS, evaluate
from quantkit.judging.tokens import READERS, collect_texts, compare_tokens
from quantkit.judging.verdict import judge
from quantkit.recipe import GateSpec
from quantkit.records import TokenWindows
from tests.judging.conversation import load, running_worker, say
from tests.judging.gguf_files import write_gguf

DEMO = Path(__file__).parent.parent.parent / "models" / "demo-llama"
WINDOWS = TokenWindows(
    ids=np.random.default_rng(0).integers(3, 4096, (9, 48)),
    weights=np.ones((9, 48), np.float32),
    source="test",
    sha256="0" * 64,
)
Q8_0 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float32."""
    return write_gguf(DEMO, tmp_path_factory.mktemp("exact") / "demo-F32.gguf")


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in Q8_0."""
    return write_gguf(DEMO, tmp_path_factory.mktemp("rounded") / "demo-Q8_0.gguf", kind=Q8_0)


@pytest.fixture(scope="module")
def worker() -> Iterator[subprocess.Popen[str]]:
    """One worker that the tests below talk to."""
    with running_worker("llama.cpp") as process:
        yield process


def reference(ids: list[list[int]]) -> torch.Tensor:
    """Logits of transformers in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(ids)).logits


def test_logits_of_a_float32_file_are_those_of_transformers(
    worker: subprocess.Popen[str], exact: Path, tmp_path: Path
) -> None:
    """At every position, also behind the first 512 tokens, which are computed at a time."""
    ids = np.random.default_rng(1).integers(3, 4096, (2, 530)).tolist()

    loaded = load(worker, exact)
    answer = say(worker, op="logits", ids=ids, file=str(tmp_path / "x.f32"))

    assert (loaded["vocab"], loaded["dtype"], loaded["device"]) == (4096, "all F32", "cpu")
    assert loaded["kv_cache"] == "float16"
    assert loaded["versions"]["xllamacpp"] == "2026.10.11549"
    assert loaded["versions"]["llama.cpp"] == "b11549"
    assert answer == {"ok": True, "shape": [2, 530, 4096], "finite": True}
    got = torch.from_numpy(np.fromfile(tmp_path / "x.f32", np.float32).reshape(2, 530, 4096))
    want = reference(ids).double().log_softmax(-1)
    kl = (want.exp() * (want - got.double().log_softmax(-1))).sum(-1)
    assert kl.mean() < 2e-5
    assert kl[:, 512:].mean() < 2e-5


def test_windows_do_not_see_each_other(
    worker: subprocess.Popen[str], exact: Path, tmp_path: Path
) -> None:
    """The cache is emptied: a window gives the same bits alone and behind others."""
    load(worker, exact)
    files = [tmp_path / name for name in ("all", "last")]
    rows = WINDOWS.ids[:3].tolist()

    say(worker, op="logits", ids=rows, file=str(files[0]))
    say(worker, op="generate", prompt_ids=rows[0][:5], max_new_tokens=3)
    say(worker, op="logits", ids=rows[2:], file=str(files[1]))

    every, last = (np.fromfile(file, np.float32) for file in files)
    np.testing.assert_array_equal(every[-last.size :], last)


def test_generation_is_greedy(worker: subprocess.Popen[str], exact: Path) -> None:
    """The ids are those that transformers picks one by one; nothing is put before the prompt."""
    ids = WINDOWS.ids[0, :6].tolist()
    for _ in range(8):
        ids.append(int(reference([ids])[0, -1].argmax()))

    load(worker, exact)

    assert say(worker, op="generate", prompt_ids=ids[:6], max_new_tokens=8)["ids"] == ids[6:]
    full = [3] * 2048
    assert say(worker, op="generate", prompt_ids=full, max_new_tokens=8)["ids"] == []


def test_a_folder_and_the_first_part_of_a_split_file_are_loaded(
    worker: subprocess.Popen[str], exact: Path, tmp_path: Path
) -> None:
    """Of a split file llama.cpp finds the other parts; later parts and two models are refused."""
    first = write_gguf(DEMO, tmp_path / "split.gguf", kind=Q8_0, part_bytes=3_000_000)
    assert len(list(tmp_path.glob("*.gguf"))) == 3

    assert load(worker, exact.parent)["dtype"] == "all F32"
    assert load(worker, first)["dtype"] == "Q8_0"
    assert load(worker, tmp_path)["dtype"] == "Q8_0"
    later = load(worker, first.with_name(first.name.replace("00001", "00002")))
    assert "name its first part" in later["error"]
    (tmp_path / "other.gguf").touch()
    assert "must hold one GGUF model" in load(worker, tmp_path)["error"]


def test_files_that_llama_cpp_refuses_are_told_in_its_words(
    worker: subprocess.Popen[str], rounded: Path, tmp_path: Path
) -> None:
    """One line each, and the worker goes on with the model that it had."""
    data = rounded.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[:3_000_000])
    text = tmp_path / "text.gguf"
    text.write_text("hello")
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(data.replace(b"blk.3.attn_q.weight", b"blk.3.attn_z.weight"))
    stranger = tmp_path / "stranger.gguf"
    stranger.write_bytes(data.replace(b"llama-bpe", b"llama-bpx"))
    spoilt = tmp_path / "spoilt.gguf"
    tensor = next(t for t in gguf.GGUFReader(rounded).tensors if t.name == "blk.3.ffn_up.weight")
    nan = np.float16("nan").tobytes()
    place = int(tensor.data_offset)
    spoilt.write_bytes(data[:place] + nan + data[place + 2 :])

    load(worker, rounded)
    for path, words in (
        (tmp_path / "none.gguf", "there is no file"),
        (tmp_path, "must hold one GGUF model"),
        (text, "text.gguf is not a GGUF file"),
        (cut, "is not within the file bounds"),
        (renamed, "tensor 'blk.3.attn_q.weight' not found"),
        (stranger, "unknown pre-tokenizer type: 'llama-bpx'"),
        (spoilt, "blk.3.ffn_up.weight"),
    ):
        answer = load(worker, path)
        assert (answer["ok"], answer["kind"]) == (False, "other")
        assert words in answer["error"]
        assert "\n" not in answer["error"]
    full = say(worker, op="logits", ids=[[3] * 600], file="/dev/full")
    assert (full["ok"], full["kind"]) == (False, "disk")
    assert say(worker, op="generate", prompt_ids=[5, 6], max_new_tokens=1)["ok"] is True


def test_a_library_with_another_interface_is_refused(exact: Path) -> None:
    """Of a build whose defaults lie elsewhere nothing is used; one that is missing is named."""
    request = json.dumps({"op": "load", "path": str(exact), "device": "cpu", "threads": 1})

    def answer(prelude: str) -> dict[str, Any]:
        script = WORKERS["llama.cpp"]
        code = f"{prelude}; import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=request,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        found = json.loads(done.stdout)
        assert isinstance(found, dict)
        return found

    folder = str(WORKERS["llama.cpp"].parent)
    moved = answer(
        f"import sys; sys.path.insert(0, {folder!r}); import llamacpp_library as library; "
        "table = library._CONTEXT_PARAMETERS; "
        "library._CONTEXT_PARAMETERS = table.replace('no_perf=1', 'no_perf=0')"
    )
    missing = answer("import importlib.util; importlib.util.find_spec = lambda name: None")

    assert "xllamacpp 2026.10.11549 has another interface" in moved["error"]
    assert "pip install xllamacpp==2026.10.11549" in moved["error"]
    assert (missing["kind"], missing["package"]) == ("package", "xllamacpp")


# --- the gate -----------------------------------------------------------------------------------


def test_a_tokenizer_that_cuts_text_otherwise_fails_the_artifact(tmp_path: Path) -> None:
    """The numbers are those of the right tokenizer, and the verdict is FAIL all the same."""
    wrong = write_gguf(DEMO, tmp_path / "demo.gguf", kind=Q8_0, pre="gpt-2")
    spec = GateSpec(data="test", max_kl=1.0, max_perplexity_increase=1.0, min_top1_agreement=0.5)

    got = evaluate(DEMO, wrong, WINDOWS, timeout_seconds=60, device="cpu", runtime="llama.cpp")
    judgement = judge(got, spec)

    assert (got.runtime, got.versions["kv_cache"]) == ("llama.cpp", "float16")
    assert {"xllamacpp", "llama.cpp", "torch", "transformers"} <= got.versions.keys()
    assert judgement.verdict == "FAIL"
    assert [check.verdict for check in judgement.checks] == ["PASS"] * 3
    assert "llama.cpp's tokenizer gives other ids than the model's own" in judgement.reasons[0]


def test_a_bos_that_is_left_out_and_special_tokens_that_are_text_are_suspicious(
    worker: subprocess.Popen[str], exact: Path, tmp_path: Path
) -> None:
    """The demo model's tokenizer begins every text with a BOS, and has three special tokens."""
    tokenizer, llama = load_tokenizer(DEMO), READERS["llama.cpp"]
    texts = collect_texts(tokenizer, 4096)
    bare = write_gguf(DEMO, tmp_path / "bare.gguf", kind=Q8_0, add_bos=False)
    unmarked = tmp_path / "unmarked.gguf"
    unmarked.write_bytes(exact.read_bytes().replace(b"<|begin|>", b"<|bogus|>"))

    found = []
    for path in (exact, bare, unmarked):
        load(worker, path)
        answer = say(worker, op="tokenize", texts=texts)
        findings = compare_tokens(llama, tokenizer, 4096, answer["plain"], answer["special"])
        found.append(findings.suspicions)

    assert texts[-3:] == ["<|begin|>", "<|end|>", "<|pad|>"]
    assert found[0] == ()
    assert "begins or ends a prompt otherwise than the model's own" in found[1][0]
    assert (
        "does not know 1 of the model's 3 special tokens, for instance '<|begin|>'" in found[2][0]
    )
    assert "no tokenizer" in compare_tokens(llama, tokenizer, 4096, None, None).suspicions[0]
    with pytest.raises(ValueError, match="not those of the texts"):
        compare_tokens(llama, tokenizer, 4096, [[1]], [[1]])
    with pytest.raises(ValueError, match="no token ids"):
        compare_tokens(llama, tokenizer, 4096, [["x"]], 3)


def test_a_padded_vocabulary_is_refused_as_in_other_runtimes(tmp_path: Path) -> None:
    """Distributions over different tokens have no divergence."""
    other = write_gguf(DEMO, tmp_path / "demo.gguf", kind=Q8_0, rows=4100)

    with pytest.raises(ArtifactError, match="a vocabulary of 4100 tokens and its baseline"):
        evaluate(DEMO, other, WINDOWS, timeout_seconds=60, device="cpu", runtime="llama.cpp")


def test_a_file_that_llama_cpp_does_not_load_is_an_error_of_the_worker(
    rounded: Path, tmp_path: Path
) -> None:
    """It says what llama.cpp said, and the gate makes a FAIL of it."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(rounded.read_bytes()[:2_000_000])

    with pytest.raises(WorkerError, match=r"worker failed at 'load'.* file bounds"):
        evaluate(DEMO, cut, WINDOWS, timeout_seconds=60, device="cpu", runtime="llama.cpp")


def test_an_interpreter_without_llama_cpp_is_named(exact: Path, tmp_path: Path) -> None:
    """The candidate's worker may run under another interpreter than the baseline's."""
    python = tmp_path / "python"
    code = "import importlib.util, runpy, sys; importlib.util.find_spec = lambda name: None; "
    code += "runpy.run_path(sys.argv[1], run_name='__main__')"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
    python.chmod(0o755)

    with pytest.raises(MissingPackageError, match=f"'xllamacpp': install it for {python}"):
        evaluate(DEMO, exact, WINDOWS, python=str(python), device="cpu", runtime="llama.cpp")
