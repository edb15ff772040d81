"""Which pre-tokenizer of llama.cpp a tokenizer has, and that a guess is never made."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import CheckpointError, RecipeError
from quantkit.formats.gguf import pre_tokenizers
from quantkit.formats.gguf.pre_tokenizer_digests import CHECK_TEXT, KNOWN_NAMES, NAMES_BY_DIGEST
from quantkit.formats.gguf.pre_tokenizers import (
    find_pre_tokenizer,
    recognise_structure,
)
from tests.formats.gguf.awkward import AWKWARD
from tests.formats.gguf.trained_tokenizers import (
    DEEPSEEK3,
    LLAMA3,
    QWEN2,
    QWEN35,
    write_byte_level,
)
from tests.formats.gguf.vocab_files import find_differences, write_vocabulary
from tests.llama_vocab import tokenize_with_llama

STYLES: dict[str, dict[str, Any]] = {
    "gpt-2": {},
    "starcoder": {"digits": True},
    "llama-bpe": {"patterns": (LLAMA3,), "ignore_merges": True},
    "smaug-bpe": {"patterns": (LLAMA3,)},
    "qwen2": {"patterns": (QWEN2,), "nfc": True},
    "qwen35": {"patterns": (QWEN35,)},
    "deepseek-v3": {"patterns": DEEPSEEK3},
}
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    rf"{CONTRACTIONS}?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    rf"{CONTRACTIONS}?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_tree(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return tree


@pytest.mark.parametrize("name", STYLES)
def test_a_newly_trained_tokenizer_is_recognised_and_llama_cpp_gives_its_ids(
    name: str, tmp_path: Path
) -> None:
    folder = write_byte_level(tmp_path, **STYLES[name])

    assert recognise_structure(read_tree(folder)) == name
    assert find_differences(folder, AWKWARD, 910) == []


@pytest.mark.parametrize(("name", "pattern"), [("tekken", TEKKEN), ("gpt-4o", GPT4O)])
def test_rules_that_llama_cpp_approximates_agree_on_plain_english(
    name: str, pattern: str, tmp_path: Path
) -> None:
    folder = write_byte_level(tmp_path, patterns=(pattern,), ignore_merges=name == "tekken")

    assert recognise_structure(read_tree(folder)) == name
    texts = [text for text in AWKWARD if text.isascii()]
    assert find_differences(folder, texts, 910) == []


def test_keeping_only_the_matches_is_the_same_as_cutting_at_them(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, patterns=(QWEN2,))
    tree = read_tree(folder)
    tree["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed", invert=True)

    assert recognise_structure(tree) == "qwen2"


def test_a_line_break_itself_in_a_pattern_is_the_same_as_its_escape(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, patterns=(QWEN2,))
    tree = read_tree(folder)
    pattern = tree["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace(r"\r", "\r").replace(r"\n", "\n")

    assert recognise_structure(tree) == "qwen2"


def test_ignore_merges_may_differ_only_where_merges_reach_every_word(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, patterns=(QWEN2,), ignore_merges=True)
    tree = read_tree(folder)
    assert recognise_structure(tree) == "qwen2"

    # A word in the vocabulary that no merges lead to is one token in the one way only.
    tree["model"]["vocab"]["\u0120unreachable"] = len(tree["model"]["vocab"])
    assert recognise_structure(tree) is None


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": LLAMA3.replace("{1,3}", "{1,4}")},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                ],
            }
        },
        {"pre_tokenizer": None},
    ],
)
def test_any_other_splitting_is_unknown(change: dict[str, Any], tmp_path: Path) -> None:
    tree = {**read_tree(write_byte_level(tmp_path)), **change}

    assert recognise_structure(tree) is None
    with pytest.raises(CheckpointError, match=r"export: \{pre_tokenizer: NAME\}.*llama-bpe.*qwen2"):
        find_pre_tokenizer(tree, [1, 2, 3], None)


def test_an_unknown_tokenizer_is_written_with_the_name_that_the_user_gives(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, patterns=(r"\w+|\W+",))
    with pytest.raises(CheckpointError, match="no pre-tokenizer that is known"):
        write_vocabulary(folder, 900)

    path = write_vocabulary(folder, 900, pre="gpt-2")

    assert tokenize_with_llama(path, ["a"]) != [[]]


def test_a_misspelt_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"'lama-bpe' is unknown .* mean 'llama-bpe'\?.*starcoder"
    ):
        find_pre_tokenizer({}, [], "lama-bpe")


def test_every_known_name_is_one_that_llama_cpp_loads(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    for name in KNOWN_NAMES[::9]:
        assert tokenize_with_llama(write_vocabulary(folder, 900, pre=name), ["a b"])[0]

    broken = write_vocabulary(folder, 900, pre="gpt-2")
    broken.write_bytes(broken.read_bytes().replace(b"gpt-2", b"gpt-9", 1))
    with pytest.raises(RuntimeError, match="unknown pre-tokenizer"):
        tokenize_with_llama(broken, ["a"])


def test_ids_that_llama_cpps_converter_knows_name_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = read_tree(write_byte_level(tmp_path, patterns=(QWEN2,)))
    ids = [1, 22, 333]
    digest = hashlib.sha256(b"[1, 22, 333]").hexdigest()

    for known, expected in (
        ("deepseek-r1-qwen", "deepseek-r1-qwen"),  # splits by the same rule
        ("gpt-2", "qwen2"),  # has the vocabulary, but another rule
        ("viking", "qwen2"),
    ):
        monkeypatch.setattr(pre_tokenizers, "NAMES_BY_DIGEST", {digest: known})
        assert find_pre_tokenizer(tree, ids, None) == expected
        assert find_pre_tokenizer({**tree, "pre_tokenizer": None}, ids, None) == known


def test_the_table_of_digests_is_whole() -> None:
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in NAMES_BY_DIGEST)
    assert set(NAMES_BY_DIGEST.values()) <= set(KNOWN_NAMES)
    assert hashlib.sha256(CHECK_TEXT.encode()).hexdigest() == CHECK_TEXT_SHA256


CHECK_TEXT_SHA256 = "a36179c1e2b1cfcfbfad1dc779addad2ffc778201e4cf0d538bddeafa2c526da"
"""Of the `chktxt` in llama.cpp's conversion/base.py."""
