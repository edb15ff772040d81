"""Is the tokenizer in a GGUF file one that llama.cpp loads, and that can work?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from quantkit.errors import nearest
from quantkit.formats.gguf.container import GgufFile
from quantkit.formats.gguf.header import Array
from quantkit.formats.gguf.pre_tokenizer_digests import KNOWN_NAMES

_PREFIX = "tokenizer.ggml."
_NONE = ("none", "no_vocab")
_MODELS = (
    *_NONE,
    "bert",
    "gemma4",
    "gpt2",
    "hybriddna",
    "llama",
    "plamo2",
    "rwkv",
    "t5",
    "test",
    "whitespace",
)
_BYTE_PAIRS = "gpt2"
_ID_ENDING = "_token_id"


def check_tokenizer(file: GgufFile) -> Iterator[str]:
    """Yield what llama.cpp refuses, or what makes it read the text wrongly."""
    model = file.find_text(f"{_PREFIX}model")
    tokens = file.find_array(f"{_PREFIX}tokens")
    if model is None:
        yield "there is no tokenizer (tokenizer.ggml.model): llama.cpp refuses the model"
        return
    if model not in _MODELS:
        yield f"llama.cpp knows no tokenizer {model!r}{nearest(model, _MODELS)}"
    if model in _NONE:
        return
    if tokens is None or tokens.kind != "string" or not len(tokens):
        yield "the tokenizer has no tokens: llama.cpp refuses the model"
        return
    words = [str(token) for token in tokens.items]
    yield from _check_words(words)
    yield from _check_lengths(file, len(words))
    yield from _check_ids(file, len(words))
    if model == _BYTE_PAIRS:
        yield from _check_byte_pairs(file)


def note_tokenizer(file: GgufFile) -> Iterator[str]:
    """Yield what should be known of a tokenizer that is no fault."""
    if file.find(f"{_PREFIX}model") is None:
        return
    if not file.find("tokenizer.chat_template"):
        yield "there is no chat template: a server takes one of its own"
    if file.find(f"{_PREFIX}eos_token_id") is None:
        yield "no end token is named (tokenizer.ggml.eos_token_id): llama.cpp takes its default"
    tokens = file.find_array(f"{_PREFIX}tokens")
    if tokens is not None and tokens.kind == "string":
        yield from _note_merges(file, set(map(str, tokens.items)))


def _check_words(words: list[str]) -> Iterator[str]:
    # llama.cpp names empty tokens by their number, so they are no duplicates.
    twice = [word for word, count in Counter(filter(None, words)).items() if count > 1]
    if twice:
        yield (
            f"{len(twice)} tokens are in the vocabulary more than once, on which llama.cpp aborts: "
            f"{_quote(twice)}"
        )


def _check_lengths(file: GgufFile, count: int) -> Iterator[str]:
    for name in ("scores", "token_type"):
        key = f"{_PREFIX}{name}"
        array = file.find_array(key)
        if array is not None and len(array) != count:
            yield f"{key} has {len(array)} items for {count} tokens"
        elif array is None and key in file.metadata:
            yield f"{key} is no array"


def _check_ids(file: GgufFile, count: int) -> Iterator[str]:
    for key in file.metadata:
        if not key.startswith(_PREFIX) or not key.endswith(_ID_ENDING):
            continue
        value = file.metadata[key]
        if value.kind != "uint32" or isinstance(value, Array):
            yield f"{key} is no uint32, on which llama.cpp refuses the model"
        elif not 0 <= int(value.content) < count:
            yield f"{key} is {value.content}, the tokens are 0 to {count - 1}"


def _check_byte_pairs(file: GgufFile) -> Iterator[str]:
    pre = file.find_text(f"{_PREFIX}pre")
    if pre is None:
        yield (
            "no pre-tokenizer is named (tokenizer.ggml.pre): llama.cpp takes its default, which "
            "splits the text of most models wrongly"
        )
    elif pre not in KNOWN_NAMES:
        yield f"llama.cpp knows no pre-tokenizer {pre!r}{nearest(pre, KNOWN_NAMES)}"
    merges = file.find_array(f"{_PREFIX}merges")
    if merges is None or merges.kind != "string":
        yield "a tokenizer of byte pairs has no merges (tokenizer.ggml.merges)"


def _note_merges(file: GgufFile, words: set[str]) -> Iterator[str]:
    merges = file.find_array(f"{_PREFIX}merges")
    if merges is None or merges.kind != "string":
        return
    useless = [pair for pair in map(str, merges.items) if _join(pair) not in words]
    if useless:
        yield (f"{len(useless)} merges make no token of the vocabulary: {_quote(useless)}")


def _join(pair: str) -> str | None:
    # The first part may itself begin with a blank.
    cut = pair.find(" ", 1)
    return None if cut < 0 else pair[:cut] + pair[cut + 1 :]


def _quote(words: list[str]) -> str:
    return ", ".join(repr(word[:40]) for word in words[:3])
