r"""The name of a tokenizer's pre-tokenizer in llama.cpp, which splits the text before the merges.

llama.cpp has the splitting rules built in and finds them by the metadata `tokenizer.ggml.pre`; with
a wrong name the model gets other tokens than it was trained on and answers worse without any error.
So a tokenizer is recognised for certain or refused:

1. by the ids of a fixed text, as llama.cpp's own converter does it (`pre_tokenizer_digests`). They
   depend on the vocabulary, so this finds the published models alone;
2. by its structure: the splitting steps of tokenizer.json, compared literally with those for which
   `llm_tokenizer_bpe` in src/llama-vocab.cpp of llama.cpp (build 11549) has the same rule. This
   finds every newly trained tokenizer that keeps a known rule.

Two names with the same rule can differ in `ignore_merges` (a word that is in the vocabulary as a
whole is taken as it is, without going through the merges), so that has to agree too, unless the
merges lead to every such word anyway.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from quantkit.errors import CheckpointError, RecipeError, nearest
from quantkit.formats.gguf.pre_tokenizer_digests import KNOWN_NAMES, NAMES_BY_DIGEST

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _TAIL
)

Step = tuple[str, str]


def _split(*patterns: str) -> tuple[Step, ...]:
    return (*(("split", pattern) for pattern in patterns), ("bytes", ""))


@dataclass(frozen=True)
class _Rule:
    """One way of splitting, and the names that llama.cpp has for it."""

    steps: tuple[Step, ...]
    plain: str | None = None
    """Its name where every word goes through the merges."""
    ignoring: str | None = None
    """Its name where a word of the vocabulary does not (`ignore_merges`)."""
    others: tuple[str, ...] = ()
    """More names with the rule, which the ids can tell apart."""

    def has(self, name: str) -> bool:
        """Whether `name` splits by this rule."""
        return name in (self.plain, self.ignoring, *self.others)


_RULES = (
    _Rule(
        _split(_GPT2),
        "gpt-2",
        others=(
            *("mpt", "olmo", "jais", "trillion", "granite-docling", "phi-2", "jina-es", "jina-de"),
            *("gigachat", "jina-v1-en", "jina-v2-code", "jina-v2-de", "jina-v2-es", "roberta-bpe"),
            *("a.x-4.0", "mellum", "modern-bert", "exaone4"),
        ),
    ),
    _Rule(
        (("digits", ""), *_split(_GPT2)),
        "starcoder",
        others=("refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    _Rule(
        _split(rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_TAIL}"),
        "smaug-bpe",
        "llama-bpe",
        others=(
            *("dbrx", "chatglm-bpe", "glm4", "glm5", "falcon3", "falcon-h1"),
            *("pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "llama3", "llama-v3"),
        ),
    ),
    _Rule(
        _split(rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_MARKS}|{_TAIL}"),
        "qwen2",
        others=(
            *("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2"),
            *("hunyuan", "solar-open", "grok-2"),
        ),
    ),
    _Rule(
        _split(
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
            rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
        ),
        "qwen35",
    ),
    _Rule(_split(rf"{_WORD}|\p{{N}}|{_MARKS}|{_TAIL}"), "ufakzeka"),
    _Rule(
        _split(r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK),
        "deepseek-v3",
        others=("hunyuan-dense", "joyai-llm", "hy_v4"),
    ),
    _Rule(
        _split(
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
            rf"\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
        ),
        ignoring="tekken",
    ),
    _Rule(
        _split(
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|"
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|"
            rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
        ),
        "gpt-4o",
        others=("llama4", "kanana2", "talkie", "minimax-m2"),
    ),
)

APPROXIMATED: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        ("tekken", "gpt-4o"),
        "llama.cpp takes every letter but a-z for upper case and every letter but A-Z for lower "
        "case, so words in mixed case with letters beyond ASCII can be split differently",
    )
)
"""Names whose rule llama.cpp itself only approximates, and how."""


def find_pre_tokenizer(tree: Mapping[str, Any], check_ids: Sequence[int], pre: str | None) -> str:
    """Return the name for `tokenizer.ggml.pre` of a byte-level BPE tokenizer.

    Args:
        tree: tokenizer.json as the loaded tokenizer has it.
        check_ids: the ids of `CHECK_TEXT`, special tokens included.
        pre: the user's choice, which goes before what is recognised.

    Raises:
        RecipeError: `pre` is no name that llama.cpp knows.
        CheckpointError: the pre-tokenizer is not recognised.
    """
    if pre is not None:
        if pre not in KNOWN_NAMES:
            raise RecipeError(
                f"pre_tokenizer {pre!r} is unknown to llama.cpp{nearest(pre, KNOWN_NAMES)}; known: "
                + ", ".join(KNOWN_NAMES)
            )
        return pre
    by_ids, by_structure = recognise_ids(check_ids), recognise_structure(tree)
    name = by_ids or by_structure
    if by_ids and by_structure and not any(r.has(by_ids) and r.has(by_structure) for r in _RULES):
        # Another tokenizer with the same vocabulary: the text does not reach where they differ.
        name = by_structure
    if name is None:
        raise CheckpointError(
            "tokenizer.json: llama.cpp has no pre-tokenizer that is known to split like this one "
            f"({_shorten(json.dumps(tree.get('pre_tokenizer'), ensure_ascii=False))}); if you know "
            "which one it is, say so with `export: {pre_tokenizer: NAME}`; known: "
            + ", ".join(KNOWN_NAMES)
        )
    return name


def recognise_ids(check_ids: Sequence[int]) -> str | None:
    """Return the name that the ids of `CHECK_TEXT` belong to; None for an unknown tokenizer."""
    return NAMES_BY_DIGEST.get(hashlib.sha256(str(list(check_ids)).encode()).hexdigest())


def recognise_structure(tree: Mapping[str, Any]) -> str | None:
    """Return the name whose splitting rule is that of tokenizer.json, or None.

    llama.cpp does not normalise text for BPE, so of the normalizers only NFC passes, as llama.cpp's
    converter lets it pass: text that is composed already, which nearly all text is, stays the same.
    """
    if any(part["type"] != "NFC" for part in normalizers(tree)):
        return None
    steps = _read_steps(tree.get("pre_tokenizer"))
    rule = next((rule for rule in _RULES if rule.steps == steps), None)
    if rule is None:
        return None
    same, other = rule.plain, rule.ignoring
    if tree["model"].get("ignore_merges", False):
        same, other = other, same
    if same is None and other is not None and _merges_reach_all_words(tree):
        return other
    return same


def normalizers(tree: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the normalizers of tokenizer.json in their order."""
    normalizer = tree.get("normalizer")
    if normalizer is None:
        return []
    if normalizer["type"] != "Sequence":
        return [normalizer]
    return [
        part for inner in normalizer["normalizers"] for part in normalizers({"normalizer": inner})
    ]


def _read_steps(pre_tokenizer: Mapping[str, Any] | None) -> tuple[Step, ...] | None:
    """The splitting steps in `_RULES`' terms; None where one has no counterpart."""
    if pre_tokenizer is None:
        return None
    steps: list[Step] = []
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    for part in parts:
        match part:
            case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"} if (
                not part.get("invert", False)
            ):
                steps.append(("split", _escape_breaks(pattern)))
            # Keeping the matches alone is the same for a pattern that matches everything.
            case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Removed"} if (
                part.get("invert", False) and pattern.endswith(r"|\s+")
            ):
                steps.append(("split", _escape_breaks(pattern)))
            case {"type": "Digits", "individual_digits": True}:
                steps.append(("digits", ""))
            case {"type": "ByteLevel", "add_prefix_space": False}:
                if part.get("use_regex", True):
                    steps.append(("split", _GPT2))
                steps.append(("bytes", ""))
            case _:
                return None
    return tuple(steps)


def _escape_breaks(pattern: str) -> str:
    r"""Some files hold a line break itself where others hold `\n`."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n")


def _merges_reach_all_words(tree: Mapping[str, Any]) -> bool:
    """Whether the merges make every token of the vocabulary out of its own text."""
    from tokenizers import Tokenizer

    model = {**tree["model"], "ignore_merges": False}
    merging = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model})).model
    added = {token["content"] for token in tree.get("added_tokens", ())}
    return all(len(merging.tokenize(token)) == 1 for token in model["vocab"] if token not in added)


def _shorten(text: str) -> str:
    return text if len(text) <= 400 else text[:400] + "..."
