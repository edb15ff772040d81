"""Tokenizers that the tests of calibration data share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.calibration.data import load_tokenizer, load_windows
from quantkit.records import TokenWindows
from tests.helpers import write_pico_tokenizer

Load = Callable[..., TokenWindows]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer that starts a text with BOS, id 0."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_pico_tokenizer(folder, vocab=300)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    """The tokenizer of `tokenizer_folder`, fresh for each test."""
    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def plain_tokenizer(tokenizer_folder: Path) -> Any:
    """The same vocabulary, but no BOS is added to a text."""
    from tokenizers import processors

    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


@pytest.fixture
def load(tokenizer: Any) -> Load:
    """`load_windows` with small defaults."""

    def call(data: str | Path, **changes: Any) -> TokenWindows:
        arguments = {
            "split": "train",
            "text_column": "text",
            "tokenizer": tokenizer,
            "samples": 4,
            "sequence_length": 16,
            "seed": 0,
        }
        return load_windows(data, **(arguments | changes))

    return call
