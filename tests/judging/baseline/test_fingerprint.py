"""Tests of quantkit.judging.baseline.fingerprint."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from quantkit.judging.baseline import entries
from quantkit.judging.baseline.fingerprint import describe_worker, hash_files, look_at_files
from quantkit.judging.baseline.store import AnswerStore, describe_store, open_store


@pytest.fixture
def store() -> AnswerStore:
    found = open_store(True)
    assert found is not None
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a file that is large enough for its hash to be remembered."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x" * (1 << 21))
    return folder


def hash_now(folder: Path, store: AnswerStore) -> str:
    return hash_files(folder, look_at_files(folder), store)


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files count as old at once."""
    monkeypatch.setattr("quantkit.judging.baseline.fingerprint._SETTLED_SECONDS", -1.0)


def test_every_file_that_could_be_read_counts(model: Path, store: AnswerStore) -> None:
    """By name and content, in folders too; prose and hidden files do not."""
    first = hash_now(model, store)
    (model / "README.md").write_text("words")
    (model / ".git").mkdir()
    (model / ".git" / "HEAD").write_text("main")
    assert hash_now(model, store) == first

    seen = {first}
    for change in ("generation_config.json", "sub/model-2.safetensors"):
        (model / change).parent.mkdir(exist_ok=True)
        (model / change).write_text("{}")
        seen.add(hash_now(model, store))
    (model / "config.json").rename(model / "config2.json")
    seen.add(hash_now(model, store))
    assert len(seen) == 4


def test_a_link_to_a_file_counts_as_the_file(model: Path, store: AnswerStore) -> None:
    """The Hub's snapshots are made of links."""
    linked = model.with_name("linked")
    linked.mkdir()
    for path in model.iterdir():
        (linked / path.name).symlink_to(path)

    assert hash_now(linked, store) == hash_now(model, store)


def test_a_large_file_is_hashed_once_and_again_when_it_changed(
    model: Path, store: AnswerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a change that keeps its size and puts back its time."""
    settle(monkeypatch)
    weights = model / "model.safetensors"
    first = hash_now(model, store)
    [entry] = entries.list_entries(describe_store().folder)
    store.forget(entry.key)
    draft = store.start(entry.key, {"ok": True, "sha256": "remembered"})
    assert draft is not None
    store.finish(draft)
    assert hash_now(model, store) != first

    before = weights.stat()
    weights.write_bytes(b"x" * (1 << 21))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hash_now(model, store) == first


def test_the_hash_of_a_file_that_was_just_written_is_not_remembered(
    model: Path, store: AnswerStore
) -> None:
    """Its times may not show the next change."""
    hash_now(model, store)

    assert describe_store().entries == 0


def test_only_settings_of_arithmetic_count_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never a secret."""
    script = tmp_path / "worker.py"
    script.touch()
    for name in ("CUBLAS_WORKSPACE_CONFIG", "VLLM_ATTENTION_BACKEND", "TORCHDYNAMO_DISABLE"):
        monkeypatch.setenv(name, "x")
    for name in ("HOME_SWEET", "CUDA_API_KEY", "ORTHODOX", "EDITOR"):
        monkeypatch.setenv(name, "x")

    found = describe_worker([sys.executable, str(script)], 3, {"python": "3"})

    chosen = found["environment"]
    assert chosen["OMP_NUM_THREADS"] == "3"
    assert sorted(name for name, value in chosen.items() if value == "x") == [
        "CUBLAS_WORKSPACE_CONFIG",
        "TORCHDYNAMO_DISABLE",
        "VLLM_ATTENTION_BACKEND",
    ]
    assert found["machine"]["architecture"]


def test_what_is_no_folder_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        look_at_files(tmp_path / "nowhere")
