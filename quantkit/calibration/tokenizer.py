"""The checkpoint's tokenizer: loading it, its BOS, and the ids of a long text.

Letters of shapes: L tokens.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.calibration.tokenizer_growth import MAX_GROWTH, find_growth
from quantkit.checkpoint.mistaken import recognise_file
from quantkit.checkpoint.paths import join_inside
from quantkit.checkpoint.source import list_side_files
from quantkit.errors import CalibrationError, CheckpointError, unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
)
"""Files any of which can hold a vocabulary that transformers reads without custom code."""

_OPENED = ("vocab", "merges", "gguf_file", "tokenizer_object")
"""Keys of tokenizer_config.json that transformers 5 takes for paths where they hold a text."""
_LIBRARY_OPTIONS = ("sp_model_kwargs", "mecab_kwargs", "sudachi_kwargs", "jumanpp_kwargs")
"""Keys whose objects become arguments of other libraries: a `model_file` among them is read."""

MAX_TOKEN_ID = 1 << 22
"""The largest vocabularies have a tenth of it. Rust's tokenizers take memory for every id below the
largest one, whether it has a token or not: one of 2**31 ends the process."""

PIECE = 1 << 16
"""Characters tokenised at once: about 12 MB of the tokenizer's working memory."""

MOST_AT_ONCE = 3 << 19
"""Characters of a row that are tokenised at once, at most: 450 MB where each is a token."""

OVERLAP = 1 << 12
"""Characters that neighbouring pieces share, so that they can be joined where they agree."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def check_tokenizer_there(folder: Path) -> None:
    """Look for the files of a tokenizer, and read none.

    Raises:
        CheckpointError: there is none.
    """
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"no tokenizer in {folder}: looked for {', '.join(VOCABULARY_FILES)}; copy the "
            "tokenizer files of the original model there"
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint folder, from its files alone and without custom code.

    Raises:
        CheckpointError: there is no tokenizer, or its files are damaged or need custom code.
    """
    check_tokenizer_there(folder)
    _check_names(folder)
    for name in _list_trees(folder):
        _check_numbers(folder, name)
        _check_growth(folder, name)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), use_fast=True, trust_remote_code=False, local_files_only=True
        )
        _forget_words(tokenizer)
        # What its constructor believed may be of no use.
        tokenizer("a")
        return tokenizer
    # The Rust library raises bare `Exception` for a file that it cannot use, and its panics are
    # none.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = _first_line(error)
        if "custom code" in reason:
            reason = "it needs custom code from the checkpoint, which is not run"
        raise CheckpointError(f"cannot load the tokenizer in {folder}: {reason}") from error


def _forget_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the Rust library remember no words.

    Its memory of them belongs to the thread and outlives the tokenizer: 4 MB stayed of each that
    had read a megabyte. To do without took no longer: 0.54 s for that text, and 0.60 s with it.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    resize = getattr(model, "_resize_cache", None)
    if resize is not None:
        resize(0)


def _check_names(folder: Path) -> None:
    """Refuse files and settings by which transformers would read what lies elsewhere.

    Its constructors take the keys of tokenizer_config.json as arguments. What is named by
    `vocab_file` and the like it looks up in the folder itself, whatever stands there.

    Raises:
        CheckpointError: there is one, or a file is damaged.
    """
    for name in list_side_files(folder):
        join_inside(folder, name)
    read_json_object(folder / "tokenizer.json")
    config = read_json_object(folder / "tokenizer_config.json")
    named = [key for key in _OPENED if isinstance(config.get(key), str)]
    named += [
        f"{key}.{option}"
        for key in _LIBRARY_OPTIONS
        if isinstance(options := config.get(key), dict)
        for option, value in options.items()
        if isinstance(value, str)
    ]
    if named:
        raise CheckpointError(
            f"{folder}/tokenizer_config.json names a file to be opened ({named[0]}), which is "
            f"refused: remove the key"
        )
    for name in _list_trees(folder):
        join_inside(folder, name)


def _list_trees(folder: Path) -> tuple[str, ...]:
    """Return tokenizer.json and those that transformers may read in its place."""
    versions = read_json_object(folder / "tokenizer_config.json").get("fast_tokenizer_files")
    return ("tokenizer.json", *map(str, versions if isinstance(versions, list) else ()))


def _check_growth(folder: Path, name: str) -> None:
    """Refuse rules that lengthen a text out of proportion, before the library applies them.

    Raises:
        CheckpointError: there are some, or a file is damaged.
    """
    growth = find_growth(read_json_object(folder / name))
    if math.isinf(growth):
        raise CheckpointError(
            f"the rules in {folder / name} are not written as tokenizers writes them: download its "
            f"files again"
        )
    if growth > MAX_GROWTH:
        raise CheckpointError(
            f"the rules in {folder / name} may make {growth:.3g} characters of one, and no "
            f"tokenizer makes more than {MAX_GROWTH}: download its files again"
        )


def _check_numbers(folder: Path, name: str) -> None:
    """Refuse ids beyond all vocabularies, and a length that is no number.

    Raises:
        CheckpointError: there is one, or a file is damaged.
    """
    tree = read_json_object(folder / name)
    config = read_json_object(folder / "tokenizer_config.json")
    model = tree.get("model")
    added = tree["added_tokens"] if isinstance(tree.get("added_tokens"), list) else []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    decoder = config.get("added_tokens_decoder")
    ids: list[object] = [
        *(vocabulary.values() if isinstance(vocabulary, dict) else ()),
        *(each.get("id") for each in added if isinstance(each, dict)),
        *(map(_as_number, decoder) if isinstance(decoder, dict) else ()),
        *read_json_object(folder / "vocab.json").values(),
        *read_json_object(folder / "added_tokens.json").values(),
    ]
    numbers = [each for each in ids if isinstance(each, int | float)]
    if numbers and not max(numbers) <= MAX_TOKEN_ID:
        raise CheckpointError(
            f"the tokenizer in {folder} has a token with the id {max(numbers)}: no vocabulary has "
            f"more than {MAX_TOKEN_ID:,} tokens; download its files again"
        )
    length = config.get("model_max_length")
    if length is not None and not isinstance(length, int | float):
        raise CheckpointError(
            f"{folder}/tokenizer_config.json: model_max_length is {length!r:.60}, which is no "
            f"number"
        )


def _as_number(key: str) -> int | None:
    return int(key) if key.isdecimal() and len(key) < 20 else None


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file beside a tokenizer; an empty one where there is no file.

    Raises:
        CheckpointError: the file is damaged or holds something else.
    """
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = recognise_file(path) or _first_line(error)
        raise CheckpointError(f"{path} is not valid JSON: {reason}") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds a JSON {type(tree).__name__} instead of an object")
    return tree


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def find_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of BOS if the tokenizer itself starts a text with it, else None."""
    ids = tokenizer("a").input_ids
    bos = tokenizer.bos_token_id
    return bos if bos is not None and ids and ids[0] == bos else None


@dataclass(frozen=True)
class Encoded:
    """Token ids int64 [L], and the characters [start, end) that each came from, int64 [L, 2].

    `spans` is None where the tokenizer does not tell.
    """

    ids: np.ndarray
    spans: np.ndarray | None


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    special: bool,
    where: str,
    with_spans: bool = True,
) -> Encoded:
    """Tokenise `text` at once; `special` lets the tokenizer add its BOS (and EOS).

    Args:
        with_spans: ask where each token comes from, which takes 150 bytes a token meanwhile.

    Raises:
        CalibrationError: the text has half of a surrogate pair, which no encoding can hold.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where}: character {error.start} is half of a surrogate pair; remove it"
        ) from None
    fast = with_spans and bool(tokenizer.is_fast)
    encoding = tokenizer(
        text,
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=fast,
        verbose=False,
    )
    ids = np.array(encoding["input_ids"], dtype=np.int64)
    spans = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2) if fast else None
    return Encoded(ids, spans)


def refuse_long(text: str, where: str) -> None:
    """Refuse a text of a row that is too long to be tokenised at once.

    Raises:
        CalibrationError: it is.
    """
    if len(text) > MOST_AT_ONCE:
        raise CalibrationError(
            f"{where}: a text of {len(text):,} characters that must be cut into tokens at once; "
            f"more than {MOST_AT_ONCE:,} take too much memory: divide it into several rows"
        )


def encode_row(tokenizer: PreTrainedTokenizerBase, text: str, *, where: str) -> np.ndarray:
    """Return the ids of a row's text with the tokenizer's BOS and EOS, int64 [L].

    Raises:
        CalibrationError: it is long, and cannot be tokenised in pieces.
    """
    if len(text) <= PIECE or not tokenizer.is_fast:
        return encode(tokenizer, text, special=True, where=where, with_spans=False).ids
    ids = encode_text(tokenizer, text, where=where, bounded=True)
    plain, whole = (
        list(tokenizer("a", add_special_tokens=each).input_ids) for each in (False, True)
    )
    begin = next(at for at in range(len(whole) + 1) if whole[at : at + len(plain)] == plain)
    return np.concatenate([whole[:begin], ids, whole[begin + len(plain) :]]).astype(np.int64)


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    where: str,
    at_least: int | None = None,
    bounded: bool = False,
    piece_length: int = PIECE,
    overlap: int = OVERLAP,
) -> np.ndarray:
    """Return the ids of a whole text, int64 [L], as `tokenizer(text, add_special_tokens=False)`.

    A long text goes through in pieces of `piece_length` characters that share `overlap` of them,
    so that memory stays bounded. Two pieces are joined only where both cut the middle of what
    they share into the same tokens; where they do not, the whole text is tokenised at once. With
    `at_least`, the ids may stop early, but not before that many.

    Raises:
        CalibrationError: it has half of a surrogate pair; or it would be tokenised at once and is
            `bounded` and longer than `MOST_AT_ONCE`.
    """
    if not tokenizer.is_fast:
        return encode(tokenizer, text, special=False, where=where).ids
    parts: list[np.ndarray] = []
    total = 0
    start, keep_from = 0, 0
    previous: _Piece | None = None
    while True:
        end = min(start + piece_length, len(text))
        piece = _encode_piece(tokenizer, text, start, end, where)
        if previous and not _agree(previous, piece, keep_from, start + overlap * 3 // 4):
            if bounded:
                refuse_long(text, where)
            return encode(tokenizer, text, special=False, where=where).ids
        # Only now that this piece agrees are the ids of those before it certain.
        if at_least is not None and total >= at_least:
            return np.concatenate(parts)
        join = end - overlap * 3 // 4 if end < len(text) else end + 1
        kept = piece.ids[(piece.begins >= keep_from) & (piece.begins < join)]
        parts.append(kept)
        total += len(kept)
        if end == len(text):
            return np.concatenate(parts)
        previous = piece
        start, keep_from = end - overlap, join


@dataclass(frozen=True)
class _Piece:
    """Ids of a piece of a text and the character of the whole text at which each begins."""

    ids: np.ndarray
    begins: np.ndarray


def _encode_piece(
    tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int, where: str
) -> _Piece:
    encoded = encode(tokenizer, text[start:end], special=False, where=where)
    spans = encoded.spans
    if spans is None:
        raise CalibrationError(f"{where}: the tokenizer tells no character offsets")
    return _Piece(encoded.ids, spans[:, 0] + start)


def _agree(left: _Piece, right: _Piece, low: int, high: int) -> bool:
    """Whether two pieces have the same tokens, at least one, in the characters [low, high)."""
    left_mask = (left.begins >= low) & (left.begins < high)
    right_mask = (right.begins >= low) & (right.begins < high)
    return (
        bool(left_mask.any())
        and np.array_equal(left.ids[left_mask], right.ids[right_mask])
        and np.array_equal(left.begins[left_mask], right.begins[right_mask])
    )
