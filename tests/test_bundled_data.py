"""The texts and the model that travel in the repository are what their papers say."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = ROOT / "calib_data"
MODEL = ROOT / "models" / "demo-llama"
MAX_MODEL_BYTES = 14_000_000
MAX_TEXT_BYTES = 2_000_000

SOURCE_ROW = re.compile(r"\| `(?P<name>[^`]+)` \| (?P<size>\d+) \| `(?P<sha256>[0-9a-f]{64})` \|")


def read_sources() -> dict[str, tuple[int, str]]:
    """File name -> (bytes, sha256), from the table of SOURCES.md."""
    rows = SOURCE_ROW.finditer((TEXTS / "SOURCES.md").read_text(encoding="utf-8"))
    return {row["name"]: (int(row["size"]), row["sha256"]) for row in rows}


def word_runs(path: Path, length: int) -> set[tuple[str, ...]]:
    words = path.read_text(encoding="utf-8").lower().split()
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_every_text_is_listed_with_its_size_and_hash() -> None:
    """SOURCES.md names exactly the files that are there, and their bytes are those it names."""
    files = {
        path.relative_to(TEXTS).as_posix(): path.read_bytes()
        for path in TEXTS.rglob("*")
        if path.is_file() and path.suffix != ".md"
    }

    found = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}

    assert read_sources() == found


def test_calibration_and_evaluation_share_no_run_of_twelve_words() -> None:
    """What a model is judged on was not seen in calibration."""
    calibration = word_runs(TEXTS / "docs_calibration.txt", 12)
    evaluation = word_runs(TEXTS / "docs_evaluation.txt", 12)

    assert len(calibration) > 100_000
    assert len(evaluation) > 50_000
    assert calibration.isdisjoint(evaluation)


def test_bundled_files_stay_small() -> None:
    """A clone stays quick: the model fits in 14 MB with its tokenizer, the texts in 2 MB."""
    model_bytes = sum(path.stat().st_size for path in MODEL.iterdir())
    text_bytes = sum(path.stat().st_size for path in TEXTS.rglob("*.*"))

    assert model_bytes <= MAX_MODEL_BYTES
    assert text_bytes <= MAX_TEXT_BYTES


def test_demo_model_folder_is_complete_and_holds_no_code() -> None:
    """The folder is a plain Hugging Face checkpoint with a model card and nothing to execute."""
    names = {path.name for path in MODEL.iterdir()}

    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "auto_map" not in json.loads((MODEL / "config.json").read_text())


@pytest.mark.parametrize("line", (TEXTS / "chat.jsonl").read_text(encoding="utf-8").splitlines())
def test_chat_rows_alternate_and_end_with_the_assistant(line: str) -> None:
    """Each conversation goes user, assistant, user, ... and the assistant has the last word."""
    roles = [message["role"] for message in json.loads(line)["messages"]]

    assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert roles
