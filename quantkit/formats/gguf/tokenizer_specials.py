"""The special tokens of a checkpoint: their ids, what is added to a text, where generation ends.

The ids come from the files in the order of llama.cpp's converter (`SpecialVocab` of gguf-py 0.19):
tokenizer_config.json, then config.json; special_tokens_map.json and generation_config.json fill
what these leave open.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.calibration.tokenizer import read_json_object
from quantkit.formats.gguf.tokenizer_vocabulary import TokenKind, Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
}
"""Role of a special token -> its key under `tokenizer.ggml.`; GGUF misspells the separator."""

STOPPING_TEXTS = frozenset(
    [
        *(
            "<|eot_id|>",
            "<|im_end|>",
            "<|end|>",
            "<|return|>",
            "<|call|>",
            "<|flush|>",
            "<|calls|>",
        ),
        *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]"),
        *("[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>"),
        *("<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["),
    ]
)
"""Tokens at which llama.cpp stops by their text (`special_eog_ids` in src/llama-vocab.cpp)."""


def find_special_ids(folder: Path, vocabulary: Vocabulary) -> dict[str, int]:
    """Return the ids of the roles bos, eos, unk, sep, pad, cls and mask that the files name.

    The token for unknown text is also known by its kind.

    Raises:
        CheckpointError: a file is damaged.
    """
    rows = {token.text: row for row, token in enumerate(vocabulary.tokens)}
    texts = [read_json_object(folder / "tokenizer_config.json")]
    more_texts = [read_json_object(folder / "special_tokens_map.json")]
    config = read_json_object(folder / "config.json")
    numbers = [config, config.get("text_config") or {}]
    more_numbers = [read_json_object(folder / "generation_config.json")]
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        candidates = [
            *(rows.get(_text_of(tree.get(f"{role}_token"))) for tree in texts),
            *(_first(tree.get(f"{role}_token_id")) for tree in numbers),
            *(rows.get(_text_of(tree.get(f"{role}_token"))) for tree in more_texts),
            *(_first(tree.get(f"{role}_token_id")) for tree in more_numbers),
        ]
        for id_ in candidates:
            if isinstance(id_, int) and 0 <= id_ < len(vocabulary.tokens):
                ids[role] = id_
                break
    for row, token in enumerate(vocabulary.tokens):
        if token.kind is TokenKind.UNKNOWN:
            ids.setdefault("unk", row)
    return ids


def _text_of(entry: object) -> str:
    """The text of a special token, which files write as it is or as a record."""
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else ""


def _first(entry: object) -> object:
    return entry[0] if isinstance(entry, list) and entry else entry


def find_added(
    tokenizer: PreTrainedTokenizerBase, ids: dict[str, int]
) -> tuple[dict[str, bool], tuple[str, ...]]:
    """Whether BOS and EOS are added, by what the tokenizer does with a text.

    A BOS that no file names is known from here.
    """
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    start = next(
        i for i in range(len(whole) + 1) if whole[i : i + len(plain)] == plain or i == len(whole)
    )
    before, after = whole[:start], whole[start + len(plain) :]
    if len(before) == 1:
        ids.setdefault("bos", before[0])
    added = {"bos": before == [ids.get("bos")], "eos": after == [ids.get("eos")]}
    notes = tuple(
        f"the Hugging Face tokenizer puts {tokenizer.convert_ids_to_tokens(others)} {where} a "
        "text; llama.cpp cannot, and puts nothing there"
        for others, is_known, where in (
            (before, added["bos"], "before"),
            (after, added["eos"], "after"),
        )
        if others and not is_known
    )
    return added, notes


def find_configured(
    folder: Path, vocabulary: Vocabulary, ids: Mapping[str, int]
) -> dict[str, bool]:
    """Whether BOS and EOS are added, by tokenizer_config.json and the kind of the model."""
    config = read_json_object(folder / "tokenizer_config.json")
    unigram = vocabulary.model == "t5"
    return {
        "bos": bool(config.get("add_bos_token", not unigram)) and "bos" in ids,
        "eos": bool(config.get("add_eos_token", unigram)) and "eos" in ids,
    }


def find_stops(
    folder: Path, vocabulary: Vocabulary, ids: Mapping[str, int]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The roles eot and eom for end tokens that llama.cpp would not stop at by itself."""
    ends = end_tokens(folder, ids.get("eos"), len(vocabulary.tokens))
    unknown = [
        id_
        for id_ in ends
        if id_ != ids.get("eos") and vocabulary.tokens[id_].text not in STOPPING_TEXTS
    ]
    stops = dict(zip(("eot", "eom"), unknown, strict=False))
    lost = [vocabulary.tokens[id_].text for id_ in unknown[2:]]
    notes = (f"llama.cpp will not stop at {', '.join(map(repr, lost))}",) if lost else ()
    return stops, notes


def end_tokens(folder: Path, eos: int | None, vocab_size: int) -> list[int]:
    """Return the ids at which generation ends: the EOS, then those that the configs list."""
    named = read_json_object(folder / "generation_config.json").get("eos_token_id")
    if named is None:
        named = read_json_object(folder / "config.json").get("eos_token_id")
    listed = named if isinstance(named, list) else [named]
    ends = [eos, *(id_ for id_ in listed if isinstance(id_, int) and 0 <= id_ < vocab_size)]
    return list(dict.fromkeys(id_ for id_ in ends if id_ is not None))
