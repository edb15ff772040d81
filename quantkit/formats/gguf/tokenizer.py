"""A checkpoint's tokenizer as the metadata of a GGUF file, which llama.cpp tokenizes with.

The tokenizer that transformers loads is what the model was trained with and what the 16-bit
baseline is judged with, so it is described as loaded and not as one of its files has it: its
tokenizer.json, what it puts before and after a text.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.calibration.tokenizer import load_tokenizer, read_json_object
from quantkit.errors import CheckpointError, RecipeError
from quantkit.formats.gguf.header import Array, MetadataValue, Value
from quantkit.formats.gguf.pre_tokenizer_digests import CHECK_TEXT
from quantkit.formats.gguf.tokenizer_bpe import is_byte_level, read_byte_level
from quantkit.formats.gguf.tokenizer_files import read_templates
from quantkit.formats.gguf.tokenizer_model_file import read_model_vocabulary, read_piece_model
from quantkit.formats.gguf.tokenizer_specials import (
    SPECIAL_KEYS,
    find_added,
    find_configured,
    find_special_ids,
    find_stops,
)
from quantkit.formats.gguf.tokenizer_spm import read_pieces
from quantkit.formats.gguf.tokenizer_unigram import read_unigram
from quantkit.formats.gguf.tokenizer_vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_CHARSMAP = 4 << 20
"""Bytes of a precompiled normalization: that of nmt_nfkc has a quarter of a million."""

MODEL_FILES = ("tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class TokenizerMetadata:
    """What a GGUF file says of its tokenizer, and what people should know about it."""

    values: Mapping[str, MetadataValue]
    notes: tuple[str, ...]
    """Where llama.cpp is known to differ from the Hugging Face tokenizer, a sentence each."""


def read_tokenizer(folder: Path, vocab_size: int, pre: str | None = None) -> TokenizerMetadata:
    """Return the metadata of a checkpoint's tokenizer.

    Args:
        folder: the checkpoint.
        vocab_size: rows of the embedding; rows without a token become `[PADn]`.
        pre: name of llama.cpp's pre-tokenizer, for tokenizers that are not recognised.

    Raises:
        CheckpointError: no tokenizer, or one that llama.cpp would not run in the same way.
        RecipeError: `pre` is no name that llama.cpp knows, or the tokenizer has no use for one.
    """
    templates = read_templates(folder)
    model_file = next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)
    if (folder / "tokenizer.json").is_file() or model_file is None:
        tokenizer = load_tokenizer(folder)
        vocabulary = _read_loaded(tokenizer, vocab_size, pre)
        ids = find_special_ids(folder, vocabulary)
        added, added_notes = find_added(tokenizer, ids)
    else:
        _refuse_pre(pre)
        vocabulary = read_model_vocabulary(
            read_piece_model(model_file),
            read_json_object(folder / "tokenizer_config.json"),
            read_json_object(folder / "added_tokens.json"),
            vocab_size,
        )
        ids = find_special_ids(folder, vocabulary)
        added, added_notes = find_configured(folder, vocabulary, ids), ()
    stops, stop_notes = find_stops(folder, vocabulary, ids)
    values = _vocabulary_values(vocabulary)
    for role, id_ in {**ids, **stops}.items():
        values[f"tokenizer.ggml.{SPECIAL_KEYS[role]}"] = Value("uint32", id_)
    for role, adds in added.items():
        values[f"tokenizer.ggml.add_{role}_token"] = Value("bool", adds)
    values.update(_template_values(templates))
    notes = vocabulary.notes + added_notes + stop_notes
    if "eos" not in ids:
        notes += ("the checkpoint names no EOS token: llama.cpp takes a default of its own",)
    if added["bos"] and _writes_bos(templates, vocabulary.tokens[ids["bos"]].text):
        notes += (
            "the tokenizer adds a BOS and so does the chat template: text that is rendered by the "
            "template must be tokenized without special tokens, as transformers and llama.cpp's "
            "server do, else the BOS is there twice",
        )
    return TokenizerMetadata(values, notes)


def _read_loaded(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, pre: str | None
) -> Vocabulary:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"the tokenizer ({type(tokenizer).__name__}) runs in Python; a GGUF file needs one "
            "with a tokenizer.json or a tokenizer.model"
        )
    tree = json.loads(backend.to_str())
    check_ids: Sequence[int] = tokenizer.encode(CHECK_TEXT)
    if is_byte_level(tree):
        return read_byte_level(tree, check_ids, vocab_size, pre)
    _refuse_pre(pre)
    if tree["model"]["type"] == "BPE":
        return read_pieces(tree, check_ids, vocab_size)
    if tree["model"]["type"] == "Unigram":
        return read_unigram(tree, vocab_size)
    raise CheckpointError(
        f"tokenizer.json: a tokenizer of the kind {tree['model']['type']} cannot be written to "
        "GGUF; byte-level BPE and SentencePiece's BPE and Unigram can"
    )


def _refuse_pre(pre: str | None) -> None:
    if pre is not None:
        raise RecipeError(
            f"pre_tokenizer {pre!r}: only byte-level tokenizers have one, and this is another kind"
        )


def _vocabulary_values(vocabulary: Vocabulary) -> dict[str, MetadataValue]:
    tokens = vocabulary.tokens
    values: dict[str, MetadataValue] = {
        "model": Value("string", vocabulary.model),
        "pre": Value("string", vocabulary.pre),
        "tokens": Array("string", [token.text for token in tokens]),
        "token_type": Array("int32", [token.kind.value for token in tokens]),
    }
    if vocabulary.has_scores:
        values["scores"] = Array("float32", [token.score for token in tokens])
    if vocabulary.merges:
        values["merges"] = Array("string", vocabulary.merges)
    if vocabulary.add_space_prefix is not None:
        values["add_space_prefix"] = Value("bool", vocabulary.add_space_prefix)
    if vocabulary.remove_extra_whitespaces is not None:
        values["remove_extra_whitespaces"] = Value("bool", vocabulary.remove_extra_whitespaces)
    if vocabulary.charsmap:
        if len(vocabulary.charsmap) > _MOST_CHARSMAP:
            raise CheckpointError(
                f"the tokenizer's precompiled normalization takes {len(vocabulary.charsmap):,} "
                f"bytes, and none takes more than {_MOST_CHARSMAP:,}: the tokenizer is damaged"
            )
        values["precompiled_charsmap"] = Array("uint8", list(vocabulary.charsmap))
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def _template_values(templates: Mapping[str, str]) -> dict[str, MetadataValue]:
    """Several templates go in as gguf-py writes them, with the names of all but the default."""
    values: dict[str, MetadataValue] = {}
    names = []
    for name, template in templates.items():
        if name == "default":
            values["tokenizer.chat_template"] = Value("string", template)
            continue
        plain = "".join(c if c in string.ascii_letters + string.digits else "_" for c in name)
        values[f"tokenizer.chat_template.{plain}"] = Value("string", template)
        names.append(plain)
    if names:
        values["tokenizer.chat_templates"] = Array("string", names)
    return values


def _writes_bos(templates: Mapping[str, str], bos: str) -> bool:
    template = templates.get("default", "")
    return "bos_token" in template or bos in template
