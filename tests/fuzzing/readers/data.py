"""Calibration and evaluation data: JSON lines and parquet, read into windows of tokens."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from quantkit.calibration.data import load_windows
from quantkit.calibration.tokenizer import load_tokenizer
from tests.fuzzing.corpus import pico_model
from tests.fuzzing.damage import BYTES, set_number
from tests.fuzzing.reader import Reader
from tests.fuzzing.trees import damage_json, invent_value
from tests.helpers import pico_text

_LINES = (
    *(
        b"[" * 200_000,
        b'{"a":' * 50_000,
        b"9" * 6000,
        b'{"text": ' + b"9" * 6000 + b"}",
        b"\xff\xfe",
    ),
    *(
        b'{"text": "\\ud800"}',
        b'{"text": "\\u0000"}',
        b'{"text": "\0"}',
        b'{"text": 1e999}',
        b"NaN",
    ),
    *(
        b'{"text": "' + b"ab " * 300_000 + b'"}',
        b'{"text": "' + b"x" * 500_000 + b'"}',
        b"{}",
        b"[]",
    ),
    *(
        b'{"text": null}',
        b'{"messages": []}',
        b'{"messages": [[]]}',
        b'{"messages": [{"role": 1}]}',
    ),
    *(b'{"messages": [{"role": "user"}]}', b'{"messages": [{"role": "\\ud800", "content": "a"}]}'),
    *(b'{"messages": [{"role": "user", "content": ["a"]}]}', b'{"text": "a", "text": "b"}', b"\r"),
    *(
        b'{"text": [{"role": "user", "content": {"a": {}}}]}',
        b"[[],[]," * 9000,
        b'{"text": ""}',
        b"\0",
    ),
)


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return load_tokenizer(pico_model())


def _load(data: Path) -> None:
    """As calibration reads data, and as an evaluation of kinds of text does."""
    common = {"split": "train", "text_column": "text", "tokenizer": _tokenizer(), "seed": 0}
    load_windows(data, **common, samples=4, sequence_length=16)
    load_windows(
        data, **common, samples=2, sequence_length=8, order="sequential", domain_column="kind"
    )


def _rows() -> list[dict[str, Any]]:
    texts = [{"text": pico_text(30, seed), "kind": "ab"[seed % 2]} for seed in range(6)]
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    return [*texts, *({"messages": turns * 3, "kind": "c"} for _ in range(3))]


def _build_lines(folder: Path) -> None:
    (folder / "rows").mkdir()
    lines = "".join(f"{json.dumps(row)}\n" for row in _rows())
    (folder / "rows" / "rows.jsonl").write_text(lines)


def _in_line(damage: Callable[[random.Random, bytes], bytes]) -> Any:
    """Make the damage that changes one line."""

    def change(draw: random.Random, content: bytes) -> bytes:
        lines = content.split(b"\n")
        at = draw.randrange(len(lines))
        return b"\n".join([*lines[:at], damage(draw, lines[at]), *lines[at + 1 :]])

    return change


def _other_line(draw: random.Random, line: bytes) -> bytes:
    return draw.choice(_LINES)


def _write(rows: list[dict[str, Any]] | pa.Table, **options: Any) -> bytes:
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, **options)
    return buffer.getvalue()


def _build_parquet(folder: Path) -> None:
    columns = ("text", "messages", "kind")
    rows = [{column: row.get(column) for column in columns} for row in _rows()]
    for name, options in (
        ("dictionary", {}),
        ("plain", {"use_dictionary": False, "compression": "none", "data_page_version": "2.0"}),
        ("zstd", {"compression": "zstd", "row_group_size": 2, "write_page_index": True}),
    ):
        (folder / name).mkdir()
        (folder / name / "rows.parquet").write_bytes(_write(rows, **options))


def _other_table(draw: random.Random, content: bytes) -> bytes:
    """A table whose columns hold something else, or far more than the file."""
    text = draw.choice(("x" * draw.choice((0, 1, 100_000, 3_000_000)), pico_text(20, 0)))
    many = draw.choice((1, 3, 1000, 200_000))
    column = draw.choice(
        (
            lambda: pa.DictionaryArray.from_arrays(np.zeros(many, np.int32), pa.array([text])),
            lambda: pa.array([text] * min(many, 1000, 1 + 2_000_000 // (len(text) + 1))),
            lambda: pa.array([[{"role": "user", "content": text[:1000]}] * min(many, 2000)] * 3),
            lambda: (
                pa.array([b"\xff\xfe" * 10] * 3, pa.binary()).cast(pa.string(), safe=False)
                if draw.random() < 0.5
                else pa.array([b"a"], pa.binary())
            ),
            lambda: pa.array([_no_surrogates(invent_value(draw))]),
            lambda: pa.array([2**62] * 3, pa.timestamp("s")),
            lambda: pa.array([[["a"]]] * many),
            lambda: pa.array([None] * many),
        )
    )
    options = draw.choice(
        (
            {"compression": "zstd"},
            {"use_dictionary": False, "compression": "zstd"},
            {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"},
            {"compression": "gzip", "data_page_size": 100, "row_group_size": 1 + many // 3},
        )
    )
    name = draw.choice(("text", "messages", "kind", "tex", ""))
    try:
        made = column()
        columns = {name: made} | ({} if name == "text" else {"text": pa.array(["a b"] * len(made))})
        return _write(pa.table(columns), **options)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, OSError):
        return content


def _no_surrogates(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _in_footer(damage: Any) -> Any:
    """Make the damage that changes the metadata at the end, whose length stays right."""

    def change(draw: random.Random, content: bytes) -> bytes:
        length = int.from_bytes(content[-8:-4], "little")
        if length > len(content) - 12:
            return content
        footer = damage(draw, content[-8 - length : -8])
        tail = len(footer).to_bytes(4, "little") + content[-4:]
        return content[: -8 - length] + footer + tail

    return change


_THRIFT = set_number(within=10_000, widths=(1, 1, 2, 5))

_CHILD = frozenset({"os.fork"})
"""Chat templates run in a child."""

READERS = (
    Reader(
        name="jsonl",
        build=_build_lines,
        damages={
            "rows.jsonl": (
                *(_in_line(damage_json),) * 4,
                _in_line(_other_line),
                _in_line(_other_line),
                *BYTES,
            )
        },
        read=lambda folder: _load(folder / "rows.jsonl"),
        starts=_CHILD,
    ),
    Reader(
        name="parquet",
        build=_build_parquet,
        damages={
            "rows.parquet": (
                *(_in_footer(_THRIFT), _in_footer(_THRIFT), _other_table, _other_table, _THRIFT),
                *BYTES,
            )
        },
        read=lambda folder: _load(folder / "rows.parquet"),
        starts=_CHILD,
    ),
)
