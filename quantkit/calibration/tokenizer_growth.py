"""How far the rules of a tokenizer.json may lengthen a text, known before one is given to them.

A rule that writes `aa` for every `a` is harmless, and thirty of them make 2**30 letters of one:
loading alone would take all of the memory, since the library normalises the added tokens.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

MAX_GROWTH = 128
"""Characters that one may become. The rules of T5 and XLNet come to about seventy, counted as they
are here; most tokenizers to less than ten."""

_CHAINS = (("normalizer", "pre_tokenizer"), ("decoder",))
"""What goes through one after the other. The rules of a post-processor only ever add."""
_MEMBERS = ("normalizers", "pretokenizers", "decoders")

_TAKES_SOMETHING = re.compile(
    r"((\\[sSdDwWrnt]|\\[pP]\{\w+\}|\[[^\[\]]+\]|[^\\\[\](){}*+?|^$])(\+|\{[1-9]\d*(,\d*)?\})?)+"
)
"""Expressions that match no place between two characters, as far as that is plain to see."""
_BYTES = 8
"""Of a rule that writes each byte as a character, of which a normalizer may make several."""


def find_growth(tree: Mapping[str, Any]) -> float:
    """Return the most characters that the rules of a tokenizer.json make of one.

    Infinite where rules are written as nothing that the library writes.
    """
    return max(_multiply(tree, chain) for chain in _CHAINS)


def _multiply(tree: Mapping[str, Any], chain: tuple[str, ...]) -> float:
    total = 1.0
    for key in chain:
        for rule in _list_rules(tree.get(key)):
            total *= _measure(rule)
    return total


def _list_rules(value: object) -> Iterator[object]:
    """Yield the rules in a rule, those of sequences in sequences too, in any order."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if each is None:
            continue
        yield each
        if isinstance(each, dict):
            for key in _MEMBERS:
                inner = each.get(key)
                waiting += inner if isinstance(inner, list) else []


def _measure(rule: object) -> float:
    """Return what a rule makes of a character; its keys tell more than its type, which may lack."""
    if not isinstance(rule, dict):
        # The library takes a list for a rule without names.
        return float("inf")
    kind = rule.get("type")
    growth = 1.0
    if "pattern" in rule and "content" in rule:
        growth *= _measure_replacing(rule["pattern"], rule["content"])
    if "prepend" in rule:
        growth *= 1 + _length(rule["prepend"])
    if "precompiled_charsmap" in rule:
        growth *= _measure_table(rule["precompiled_charsmap"])
    if "replacement" in rule:
        # Metaspace begins each word with it.
        growth *= 2
    if kind == "ByteLevel" or (kind is None and "trim_offsets" in rule):
        growth *= _BYTES
    if rule.get("suffix") == "" or rule.get("word_delimiter_token") == "":
        # An empty text is found between all characters.
        growth *= 2
    return growth


def _measure_replacing(pattern: object, content: object) -> float:
    named = pattern if isinstance(pattern, dict) else {}
    text, expression = named.get("String"), named.get("Regex")
    if isinstance(text, str) and text:
        return max(1.0, _length(content) / len(text))
    if isinstance(expression, str) and _TAKES_SOMETHING.fullmatch(expression):
        return max(1.0, _length(content))
    # What is found between two characters takes none away.
    return 1 + _length(content)


def _measure_table(table: object) -> float:
    """Return the longest text in a table of SentencePiece: bytes of a trie, the trie, the texts."""
    if not isinstance(table, str):
        return 1.0
    try:
        content = base64.b64decode(table, validate=True)
    except ValueError:
        return float("inf")
    texts = content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")
    return max(1.0, *(_length(text.decode("utf-8", errors="replace")) for text in texts))


def _length(text: object) -> float:
    """Return the characters of a text after whatever normalizer comes behind it."""
    if not isinstance(text, str):
        return 1.0
    found = unicodedata.normalize("NFKD", text).lower()
    # Those of BERT put blanks around the characters of Chinese.
    padded = sum("\u3400" <= each <= "\u9fff" or each >= "\uf900" for each in found)
    return float(len(found) + 2 * padded)
