"""YAML from elsewhere: what is read, and what is refused before it costs anything."""

from __future__ import annotations

import pytest
import yaml

from quantkit.plain_yaml import parse_yaml

REFUSED = {
    "alias": ("a: &x 1\nb: *x\n", "aliases"),
    "billion laughs": ("a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases"),
    "itself": ("a: &a [*a]\n", "aliases"),
    "code": ("a: !!python/object/apply:os.system ['true']\n", "tags"),
    "plain tag": ("a: !!str 1\n", "tags"),
    "tag that does not fit": ("a: !!bool x\n", "tags"),
    "no tag": ("a: ! x\n", "tags"),
    "depth": ("[" * 200_000, "levels"),
    "depth of keys": ("".join(" " * n + "a:\n" for n in range(99)), "levels"),
    "digits": ("a: 0x" + "f" * 5000 + "\n", "digits"),
    "date": ("a: 2026-02-30\n", "a value that cannot be"),
    "merged word": ("a: {<<: x}\n", "mapping"),
    "list as key": ("{[1]: 2}\n", "unhashable"),
    "two documents": ("a: 1\n---\nb: 2\n", "single document"),
    "escape": ("a: \x1b[2J\n", "special characters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_plain_data_does_not_need_is_refused(name: str) -> None:
    """By one kind of exception, whatever PyYAML would have raised."""
    text, words = REFUSED[name]

    with pytest.raises(yaml.YAMLError, match=words):
        parse_yaml(text)


def test_plain_data_is_read() -> None:
    """With the node that lines are told from."""
    tree, node = parse_yaml("a: [1, 2.5, yes, null, text]\nb: {c: 0x10}\n")

    assert tree == {"a": [1, 2.5, True, None, "text"], "b": {"c": 16}}
    assert isinstance(node, yaml.MappingNode)
    assert parse_yaml("")[0] is None
