"""Loading tokenizers, and ids of long texts."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quantkit.calibration.tokenizer import (
    PIECE,
    encode_row,
    encode_text,
    find_bos,
    load_tokenizer,
)
from quantkit.errors import CalibrationError, CheckpointError
from tests.cli.running import ROOT
from tests.helpers import pico_text, write_pico_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pico_tokenizer(tmp_path)
    return tmp_path


def test_a_tokenizer_loads_from_its_own_file_alone(folder: Path) -> None:
    """tokenizer.json is enough; no config is asked for."""
    (folder / "tokenizer_config.json").unlink()

    assert load_tokenizer(folder)("ba ce", add_special_tokens=False).input_ids


def test_a_folder_without_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    """A configuration without vocabulary is no tokenizer."""
    (tmp_path / "tokenizer_config.json").write_text("{}")

    with pytest.raises(CheckpointError, match=r"no tokenizer in .*tokenizer\.json, .*; copy the"):
        load_tokenizer(tmp_path)


_HELD = """
import ctypes, sys
from pathlib import Path
from quantkit.calibration.tokenizer import load_tokenizer

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
text = Path(sys.argv[2]).read_text(encoding="utf-8")[:300_000]
held = []
for _ in range(8):
    load_tokenizer(Path(sys.argv[1])).backend_tokenizer.encode(text)
    held.append(libc.mallinfo2().h)
print(held[-1] - held[2])
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="NOT TESTED: not glibc")
def test_a_tokenizer_that_is_dropped_leaves_nothing() -> None:
    """With the Rust library's memory of words each left a megabyte and a half of this text."""
    done = subprocess.run(
        [sys.executable, "-c", _HELD, "models/demo-llama", "calib_data/docs_calibration.txt"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 500_000


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "reason"), [('{"a":', "not valid JSON"), ("[]", "a JSON list"), ("\xff", "not val")]
)
def test_damaged_files_are_named(folder: Path, name: str, content: str, reason: str) -> None:
    """Broken JSON is found before transformers trips over it."""
    (folder / name).write_text(content, encoding="latin-1")

    with pytest.raises(CheckpointError, match=rf"{name} .*{reason}"):
        load_tokenizer(folder)


@pytest.mark.parametrize("model", [{"type": "Nope"}, None])
def test_a_file_that_is_no_tokenizer_is_refused(folder: Path, model: object) -> None:
    """The Rust library's bare exception becomes one line."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": model}))

    with pytest.raises(CheckpointError, match="cannot load the tokenizer in"):
        load_tokenizer(folder)


def test_custom_code_is_not_run(folder: Path) -> None:
    """A tokenizer that needs code from the checkpoint is refused, and the code stays untouched."""
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Mine: pass\n")

    with pytest.raises(CheckpointError, match="custom code from the checkpoint, which is not run"):
        load_tokenizer(folder)
    assert not (folder / "ran").exists()


def test_bos_is_what_the_tokenizer_itself_adds(tokenizer: Any, plain_tokenizer: Any) -> None:
    """A BOS that is only named, and not added, is none."""
    assert find_bos(tokenizer) == 0
    assert find_bos(plain_tokenizer) is None


def _train(kind: str) -> Any:
    """A tokenizer of one of the three ways in which models split text."""
    special = ["<unk>"]
    if kind == "byte-level":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
    elif kind == "whole-text BPE":
        # As in Llama 2: no words, merges may cross everything, and the start of a text is marked.
        inner = Tokenizer(models.BPE(unk_token="<unk>"))
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    else:
        inner = Tokenizer(models.Unigram())
        inner.normalizer = normalizers.NFKC()
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    texts = [line for seed in range(3) for line in pico_text(300, seed).splitlines()]
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.fixture(scope="module", params=["byte-level", "whole-text BPE", "unigram"])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    return _train(request.param)


@pytest.mark.parametrize(("piece", "overlap"), [(1000, 128), (777, 256), (300, 200)])
def test_pieces_give_the_ids_of_the_whole_text(
    any_tokenizer: Any, piece: int, overlap: int
) -> None:
    """Joined pieces equal one call, wherever the cuts fall."""
    text = pico_text(1500, 5) + "日本語のテキスト 🎉 naïve ﬁne\t\n\n\n   x" * 30 + pico_text(500, 6)
    want = any_tokenizer(text, add_special_tokens=False).input_ids

    got = encode_text(any_tokenizer, text, where="text", piece_length=piece, overlap=overlap)

    assert got.tolist() == want


def test_a_text_without_a_place_to_join_is_tokenised_at_once(any_tokenizer: Any) -> None:
    """One endless word has no cut that both pieces agree on; the ids are right all the same."""
    text = "".join(pico_text(900, 7).split()) + "a" * 997
    want = any_tokenizer(text, add_special_tokens=False).input_ids

    got = encode_text(any_tokenizer, text, where="text", piece_length=300, overlap=16)

    assert got.tolist() == want


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=400), piece=st.integers(40, 120))
def test_any_text_in_pieces_is_the_whole_text(any_tokenizer: Any, text: str, piece: int) -> None:
    """Neither controls nor combining characters at a cut change an id."""
    want = any_tokenizer(text, add_special_tokens=False).input_ids

    got = encode_text(any_tokenizer, text, where="text", piece_length=piece, overlap=36)

    assert got.tolist() == want


def test_an_early_stop_keeps_the_beginning(any_tokenizer: Any) -> None:
    """`at_least` returns a prefix of the whole, long enough, and not the whole."""
    text = pico_text(3000, 8)
    want = any_tokenizer(text, add_special_tokens=False).input_ids

    got = encode_text(
        any_tokenizer, text, where="text", at_least=500, piece_length=1000, overlap=128
    ).tolist()

    assert 500 <= len(got) < len(want)
    assert got == want[: len(got)]


def test_a_long_row_is_tokenised_as_at_once(any_tokenizer: Any) -> None:
    """With what the tokenizer puts before and behind it."""
    text = " ".join(f"word{number} and {number * 7919 % 101}." for number in range(6000))
    assert len(text) > 1.5 * PIECE
    assert encode_row(any_tokenizer, text, where="row 1").tolist() == any_tokenizer(text).input_ids


def test_a_row_that_cannot_be_cut_into_pieces_takes_no_memory_without_end(
    any_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two pieces find different tokens, all of it would be tokenised at once."""
    monkeypatch.setattr("quantkit.calibration.tokenizer.MOST_AT_ONCE", 500)
    text = pico_text(600, seed=1).replace(" ", "")
    with pytest.raises(CalibrationError, match=r"row 1: a text of [0-9,]+ characters that must"):
        encode_text(any_tokenizer, text, where="row 1", piece_length=40, overlap=4, bounded=True)
