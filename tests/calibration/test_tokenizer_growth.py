"""Rules that make a text longer out of proportion are refused before the library applies them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.calibration.tokenizer_growth import MAX_GROWTH, find_growth
from quantkit.errors import CheckpointError
from tests.helpers import write_pico_tokenizer

DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}


def table(longest: int) -> str:
    """A table of SentencePiece with an empty trie."""
    return base64.b64encode(bytes(4) + b"x\0" + b"a" * longest + b"\0").decode()


def in_a_row(rule: object, count: int, key: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", key: [rule] * count}


def nested(depth: int) -> dict[str, Any]:
    rule: dict[str, Any] = {"type": "Sequence", "normalizers": [DOUBLE, DOUBLE]}
    for _ in range(depth):
        rule = {"type": "Sequence", "normalizers": [rule, DOUBLE]}
    return rule


@pytest.mark.parametrize(
    "tree",
    [
        {"normalizer": in_a_row(DOUBLE, 8)},
        {"normalizer": nested(50)},
        {"normalizer": in_a_row({key: DOUBLE[key] for key in ("pattern", "content")}, 8)},
        {"normalizer": [[[{"String": "a"}, "aa"]]]},
        {"normalizer": in_a_row({**DOUBLE, "pattern": {"Regex": "(?=a)"}, "content": "a"}, 8)},
        {"normalizer": in_a_row({**DOUBLE, "content": "\ufdfa"}, 2)},
        {"normalizer": {"type": "Prepend", "prepend": "a" * MAX_GROWTH}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": table(1000)}},
        {"pre_tokenizer": in_a_row(BYTE_LEVEL, 3, "pretokenizers")},
        {
            "normalizer": in_a_row(DOUBLE, 4),
            "pre_tokenizer": in_a_row(METASPACE, 4, "pretokenizers"),
        },
        {"decoder": in_a_row(DOUBLE, 8, "decoders")},
        {"decoder": in_a_row({"type": "BPEDecoder", "suffix": ""}, 8, "decoders")},
    ],
)
def test_what_multiplies_is_found(tree: dict[str, Any]) -> None:
    """By whatever rule, in sequences of sequences, with its type or without."""
    assert find_growth(tree) > MAX_GROWTH


@pytest.mark.parametrize(
    "normalizers",
    [
        # T5 and XLNet, Llama, CLIP, and a list of other characters for the same ones.
        [
            {"type": "Replace", "pattern": {"String": "``"}, "content": '"'},
            {"type": "NFKD"},
            {"type": "Lowercase"},
            {"type": "Precompiled", "precompiled_charsmap": table(18)},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"},
        ],
        [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
        [{"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}],
        [{"type": "Replace", "pattern": {"String": "\u201c"}, "content": '"'}] * 300,
    ],
)
def test_the_rules_of_known_models_are_within_the_bound(normalizers: list[object]) -> None:
    """With what goes before the words of each."""
    tree = {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": METASPACE,
        "decoder": {"type": "ByteLevel", "trim_offsets": True},
    }
    assert find_growth(tree) <= MAX_GROWTH


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.4.0.0.json"])
def test_it_is_refused_in_every_file_that_may_be_loaded(tmp_path: Path, name: str) -> None:
    """transformers takes another file where tokenizer_config.json lists one."""
    write_pico_tokenizer(tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / name).write_text(json.dumps(tree | {"normalizer": in_a_row(DOUBLE, 33)}))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["fast_tokenizer_files"] = [name]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{name} may make 6.87e\+10 characters of one"):
        load_tokenizer(tmp_path)
