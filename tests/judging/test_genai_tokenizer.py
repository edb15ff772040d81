"""What onnxruntime-genai's reader of tokenizer.json makes of other families' tokenizers: the facts
in docs/gate.md, "Suspicions"."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.judging.tokens import (
    READERS,
    TokenizerFindings,
    collect_texts,
    compare_tokens,
)
from tests.formats.gguf.trained_tokenizers import (
    DEEPSEEK3,
    LLAMA3,
    QWEN2,
    USER_DEFINED,
    change_json,
    convert_sentencepiece,
    write_byte_level,
    write_sentencepiece,
)
from tests.helpers import make_pico_model
from tests.judging.conversation import load, running_worker, say
from tests.judging.onnx_files import write_onnx


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph that onnxruntime-genai runs; its tokenizer is to be replaced."""
    model = make_pico_model(tmp_path_factory.mktemp("model"), hidden=32, layers=1)
    return write_onnx(model, tmp_path_factory.mktemp("graph") / "onnx")


@pytest.fixture(scope="module")
def worker() -> Iterator[subprocess.Popen[str]]:
    """One worker for all of them."""
    with running_worker("onnxruntime") as process:
        yield process


def compare(
    worker: subprocess.Popen[str], graph: Path, tokenizer: Path, folder: Path
) -> TokenizerFindings:
    """Let onnxruntime-genai and transformers read with the tokenizer in a folder."""
    both = shutil.copytree(graph, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, both)
    own = load_tokenizer(tokenizer)
    load(worker, both)
    answer = say(worker, op="tokenize", texts=collect_texts(own, len(own)))
    reader = READERS["onnxruntime"]
    return compare_tokens(reader, own, len(own), answer["plain"], answer["special"])


@pytest.mark.parametrize(
    ("patterns", "options"),
    [
        ((), {}),
        ((LLAMA3,), {"ignore_merges": True}),
        ((QWEN2,), {"nfc": True, "bos": False}),
        (DEEPSEEK3, {}),
    ],
    ids=["gpt2", "llama3", "qwen2", "deepseek3"],
)
def test_byte_level_tokenizers_are_read_alike(
    worker: subprocess.Popen[str],
    graph: Path,
    tmp_path: Path,
    patterns: tuple[str, ...],
    options: dict[str, bool],
) -> None:
    """Every text and every special token."""
    source = write_byte_level(tmp_path / "source", patterns, **options)  # type: ignore[arg-type]

    assert compare(worker, graph, source, tmp_path / "both").suspicions == ()


def test_a_blank_before_the_text_is_left_out(
    worker: subprocess.Popen[str], graph: Path, tmp_path: Path
) -> None:
    """Where a byte-level tokenizer puts one."""
    source = write_byte_level(tmp_path / "source", add_prefix_space=True)

    (found,) = compare(worker, graph, source, tmp_path / "both").suspicions

    assert "gives other ids than the model's own in 9 of 9 texts" in found
    assert "is tokenizer.json the model's own" in found


def test_gemmas_pieces_are_read_alike_and_llama_2s_are_not(
    worker: subprocess.Popen[str], graph: Path, tmp_path: Path
) -> None:
    """A `Strip` in the decoder tells the blank before a text; runs of blanks stay apart."""
    pieces = write_sentencepiece(tmp_path / "gemma", dummy_prefix=False, user_defined=USER_DEFINED)
    gemma = convert_sentencepiece(pieces, tmp_path / "a", prefix="none", user_defined=USER_DEFINED)
    pieces = write_sentencepiece(tmp_path / "llama")
    bare = convert_sentencepiece(pieces, tmp_path / "b", prefix="normalizer")
    stripped = convert_sentencepiece(pieces, tmp_path / "c", prefix="normalizer")
    decoder = json.loads((stripped / "tokenizer.json").read_text())["decoder"]
    decoder["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    change_json(stripped / "tokenizer.json", decoder=decoder)

    found = [
        compare(worker, graph, source, tmp_path / f"both-{number}").suspicions
        for number, source in enumerate((gemma, bare, stripped))
    ]

    assert found[0] == ()
    assert "in 9 of 9 texts" in found[1][0]
    assert "in 2 of 9 texts, for instance for 'Two  spaces" in found[2][0]
