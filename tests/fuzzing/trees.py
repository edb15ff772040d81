"""Damage to JSON and YAML: values of another kind, missing keys, doubled ones, depth, numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

_RAW = "raw-text-{}-"
"""A string that stands for text which no writer would write."""

_COMMON = (
    *(None, True, False, 0, 1, -1, 3, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30),
    *(0.5, -0.0, 1e-320, 1e308, "", " ", "0", "none", "\0", "\ud800", "\u202e\x1b[2J", "a" * 300),
    *(
        "../../x",
        "/etc/passwd",
        "C:\\x",
        "x\ny",
        "é" * 9,
        "%s{0}{{",
        "model.layers.0",
        "a" * 70_000,
    ),
    *([], {}, [[]], [None], [0] * 2000, {"": None}, {"a": {"a": {}}}, [{}] * 3, {"__class__": 1}),
)
"""Values that readers did not expect."""

_JSON_TEXTS = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 3000, "9" * 5000, "1." + "0" * 5000),
    *("[" * 90 + "]" * 90, "[" * 100_000 + "]" * 100_000, "[" * 5000, '{"a":' * 3000 + "1"),
    *('1, "twice": 2, "twice": 3', "'single'", "undefined", "01", "0x10", '"\t"', '"\\u12"', ","),
    *('"\\ud800"', '"\\u0000"', "/**/ 1", "[1,]", "{,}", '"' + "x" * 200_000 + '"'),
)

_YAML_TEXTS = (
    *(".nan", ".inf", "-.inf", "0x" + "f" * 6000, "9" * 5000, "1e400", "0b1", "1_000", "0o7", "~"),
    *("190:20:30", "2026-02-30", "2026-01-01", "=", "<<", "no", "&a [1]", "&a [*a]", "*a", "!!str"),
    *(
        "!!python/object/apply:os.system ['true']",
        "!!python/name:os.system",
        "!!binary 'x'",
        "!!int x",
    ),
    *(
        "!!float x",
        "!!timestamp x",
        "!!set {a}",
        "!!omap [a: 1]",
        "!!bool x",
        "!!null x",
        "!x y",
        "!",
    ),
    *("{<<: {a: 1}}", "{<<: 1}", "{? [a] : 1}", "{? {a: 1} : 1}", "[" * 90 + "]" * 90, "!!map [1]"),
    *(
        "[" * 3000 + "]" * 3000,
        "[" * 3000,
        "{a: " * 500,
        "- - - - 1",
        "|\n  x",
        ">-\n",
        "'a",
        '"\\x"',
    ),
    *('"\\ud800"', '"\\uD83D"', "@x", "`x", "%YAML 1.1", "--- 1", "...", "\t1", "#", ": :", "\x07"),
)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda some: st.lists(some, max_size=4) | st.dictionaries(st.text(max_size=8), some),
        max_leaves=8,
    )
)
def _tell_value(value: Any) -> None:
    _told.append(value)


_told: list[Any] = []
"""What Hypothesis made of the bytes that it was just given."""


def invent_value(draw: random.Random) -> Any:
    """A value of any kind: one that is known for trouble, or one that Hypothesis makes up."""
    if draw.random() < 0.7:
        return draw.choice(_COMMON)
    _told.clear()
    _tell_value.hypothesis.fuzz_one_input(draw.randbytes(120))
    return _told[0] if _told else None


def damage_json(draw: random.Random, content: bytes) -> bytes:
    """Change one place of a JSON text; a text that is none any more is left as it is."""
    return _damage(draw, content, json.loads, _dump_json, _JSON_TEXTS)


def damage_yaml(draw: random.Random, content: bytes) -> bytes:
    """Change one place of a YAML text; half of the time it is written in flow style."""
    dump = _dump_json if draw.random() < 0.3 else _dump_yaml
    return _damage(draw, content, yaml.safe_load, dump, _YAML_TEXTS)


def replace_values(*values: Any) -> Callable[[random.Random, bytes], bytes]:
    """Make the damage that puts one of `values` in one place of a JSON text."""

    def damage(draw: random.Random, content: bytes) -> bytes:
        try:
            tree = json.loads(content)
            node, key = draw.choice(list(_walk(tree)))
            node[key] = draw.choice(values)
            return _dump_json(tree, []).encode()
        except (ValueError, RecursionError, LookupError):
            return content

    return damage


def _damage(
    draw: random.Random,
    content: bytes,
    load: Callable[[bytes], Any],
    dump: Callable[[Any, list[str]], str],
    texts: tuple[str, ...],
) -> bytes:
    raw: list[str] = []
    try:
        tree = load(content)
        places = list(_walk(tree))
        if not places or draw.random() < 0.03:
            tree = invent_value(draw)
        else:
            _change(draw, places, raw, texts)
        return dump(tree, raw).encode("utf-8", "surrogatepass")
    # What was damaged before may be anything, a tree that holds itself too: it stays as it is.
    except Exception:
        return content


def _change(
    draw: random.Random, places: list[tuple[Any, Any]], raw: list[str], texts: tuple[str, ...]
) -> None:
    """Do one thing to one place of a tree."""
    node, key = draw.choice(places)
    other, other_key = draw.choice(places)
    kind = draw.randrange(10)
    if kind < 4 or kind == 5:
        node[key] = invent_value(draw)
    elif kind == 4:
        node[key] = _RAW.format(len(raw))
        raw.append(draw.choice(texts))
    elif kind == 6:
        del node[key]
    elif kind == 7:
        # A copy: a tree that holds itself cannot be written.
        node[key] = json.loads(json.dumps(other[other_key], default=str))
    elif kind == 8:
        node[key] = draw.choice(([node[key]], {"a": node[key]}, [node[key]] * 3))
    elif isinstance(node, dict):
        name = draw.choice((str(key) + "x", str(key).upper(), "", "\0", "\ud800", "a" * 5000, "0"))
        node[name] = node.pop(key)
    else:
        node.extend([node[key]] * draw.choice((1, 5, 1000)))


def _walk(tree: Any, depth: int = 40) -> Iterator[tuple[Any, Any]]:
    """Yield every place of a tree as what holds it and its key or index."""
    if not isinstance(tree, dict | list) or not depth:
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _walk(value, depth - 1)


def _dump_json(tree: Any, raw: list[str]) -> str:
    text = json.dumps(tree, default=str)
    for number, instead in enumerate(raw):
        text = text.replace(json.dumps(_RAW.format(number)), instead)
    return text


def _dump_yaml(tree: Any, raw: list[str]) -> str:
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    for number, instead in enumerate(raw):
        text = text.replace(_RAW.format(number), instead)
    return text
