"""YAML from elsewhere -> plain data: no tags, no aliases, no depth that a reader trips over."""

from __future__ import annotations

from typing import Any

import yaml

MAX_YAML_BYTES = 1 << 18
"""Recipes and tasks take a hundredth of it; PyYAML needs two seconds for so much."""
_MOST_DEPTH = 40
"""Levels of a file: readers recurse, and a recipe has five."""
_MOST_DIGITS = 300
"""Of a whole number: more is beyond float64, and Python refuses to print 4300."""


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's loader of plain data, less what plain data does not need."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse a node before PyYAML makes it."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refuse("aliases (*name) are not allowed", event.start_mark)
        # A tag can name any class, and PyYAML trips over what does not fit the plain ones.
        if getattr(event, "tag", None) is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"tags ({event.tag[:80]!r}) are not allowed", event.start_mark
            )
        if self.depth >= _MOST_DEPTH:
            raise _refuse(f"more than {_MOST_DEPTH} levels are nested", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int"):
            _check_digits(node)
        return node


def _check_digits(node: yaml.ScalarNode) -> None:
    if len(node.value) > _MOST_DIGITS:
        words = f"a number of {len(node.value)} digits is no number for a computer"
        raise _refuse(words, node.start_mark)


def _refuse(words: str, mark: Any) -> yaml.YAMLError:
    return yaml.composer.ComposerError(None, None, words, mark)


def parse_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """Return what a YAML document holds, and its node, from which lines can be told.

    Args:
        text: of at most `MAX_YAML_BYTES`, which the caller sees to before it reads them.

    Raises:
        yaml.YAMLError: it is no YAML, or has aliases, tags, more than `_MOST_DEPTH` levels, or a
            value that cannot be; a tag is a `yaml.constructor.ConstructorError`.
    """
    loader = _PlainLoader(text)
    try:
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    # A date of no calendar, or a mapping that is merged with a word.
    except (ValueError, TypeError, ArithmeticError) as error:
        raise yaml.YAMLError(f"a value that cannot be: {error}") from None
    finally:
        loader.dispose()
