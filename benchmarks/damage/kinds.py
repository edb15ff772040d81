"""What a kind of damage is, and what the kinds share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LAYER = 2
"""The block that is broken where one is."""


@dataclass(frozen=True)
class Damage:
    """One way to break an artifact."""

    name: str
    words: str
    """What was done."""
    artifact: str
    """Which sound artifact it is done to."""
    apply: Callable[[Path, Path], None]
    """Takes the folder of a copy, to be broken in place, and the folder of the baseline."""


@contextmanager
def edit_json(path: Path) -> Iterator[dict[str, Any]]:
    """Read an object, let it be changed, write it."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    yield tree
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False), encoding="utf-8")


def swap_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Put the upper half of each byte below the lower one."""
    return ((codes << 4) | (codes >> 4)).astype(np.uint8)


def order_permuted(rows: int, heads: int) -> NDArray[np.int64]:
    """Rows in the order that llama.cpp's rotary embedding wants; [rows]."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def permute_vocabulary(path: Path) -> None:
    """Give each of two hundred tokens of a tokenizer.json the id of the next one."""
    with edit_json(path) as tree:
        vocabulary: dict[str, int] = tree["model"]["vocab"]
        special = {token["content"] for token in tree["added_tokens"]}
        names = sorted(vocabulary, key=vocabulary.__getitem__)
        chosen = [name for name in names if name not in special][300:500]
        ids = [vocabulary[name] for name in chosen]
        tree["model"]["vocab"] = vocabulary | dict(zip(chosen, [*ids[1:], ids[0]], strict=True))


def reverse_merges(path: Path) -> None:
    """Give the last merges of a tokenizer.json the first ranks."""
    with edit_json(path) as tree:
        tree["model"]["merges"].reverse()


def truncate(path: Path, kept: float = 0.7) -> None:
    """Cut a file off."""
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])


def find_end(baseline: Path) -> int:
    """The id that ends a sequence."""
    config: Mapping[str, Any] = json.loads((baseline / "config.json").read_text(encoding="utf-8"))
    return int(config["eos_token_id"])
