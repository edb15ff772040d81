from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from quantkit.checkpoint.source import resolve_source
from quantkit.errors import CheckpointError

COMMIT, OLDER = "a" * 40, "b" * 40

RESOLVE = """
import json, sys
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import QuantkitError

answers = []
for model in sys.argv[1:]:
    try:
        source = resolve_source(model)
        answers.append([str(source.folder), source.revision])
    except QuantkitError as error:
        answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""


def resolve_elsewhere(cache: Path, *models: str, **variables: str) -> list[Any]:
    """Resolve in a process of its own: the Hub's client reads its settings when imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, *models],
        env={**kept, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout)
    return answers


# --- folders ----------------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    """A folder has no revision, and its name is what the user wrote."""
    source = resolve_source(str(tmp_path))

    assert (source.name, source.folder, source.revision) == (str(tmp_path), tmp_path, None)


def test_a_folder_wins_over_a_hub_id_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`models/demo` is the folder where there is one."""
    (tmp_path / "models/demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert resolve_source("models/demo").revision is None


@pytest.mark.parametrize(
    "model",
    ["", " ", "/no/such/folder", "./missing", "../missing", "a/b/c", "~nobody-here/x", "x" * 5000],
)
def test_what_is_neither_folder_nor_hub_id_is_refused(model: str) -> None:
    """The line shows what was asked for; no network is touched."""
    with pytest.raises(CheckpointError) as caught:
        resolve_source(model)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    """A likely slip: the weights' file rather than its folder."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")

    with pytest.raises(CheckpointError, match="is a file: name the folder"):
        resolve_source(str(path))


# --- the Hub's cache, offline -----------------------------------------------------------------


def fill_cache(cache: Path, repo: str, commit: str, files: dict[str, bytes], ref: str) -> Path:
    """Lay files out as the Hub's client does and return the snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    for name, data in files.items():
        blob = hashlib.sha256(data).hexdigest()
        (root / "blobs" / blob).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def test_a_cached_model_is_found_offline_and_others_are_explained(tmp_path: Path) -> None:
    """By id, by branch and by commit; what is not there gives one line with what to do."""
    files = {"config.json": b"{}", "model.safetensors": b"x"}
    newer = fill_cache(tmp_path, "org/pico", COMMIT, files, "main")
    older = fill_cache(tmp_path, "org/pico", OLDER, files, "v1")

    answers = resolve_elsewhere(
        tmp_path,
        "org/pico",
        "org/pico@v1",
        f"org/pico@{OLDER}",
        "org/pico@v2",
        "org/other",
        HF_HUB_OFFLINE="1",
    )

    assert answers[:3] == [[str(newer), COMMIT], [str(older), OLDER], [str(older), OLDER]]
    for model, answer in zip(["org/pico@v2", "org/other"], answers[3:], strict=True):
        assert answer == (
            f"CheckpointError: model {model!r} is neither a folder nor in the local Hub cache, and "
            f"the Hub cannot be reached: check the name, the connection and HF_HUB_OFFLINE"
        )


# --- a Hub of our own -------------------------------------------------------------------------

REFUSALS = {
    "org/private": (401, "RepoNotFound"),
    "org/gated": (403, "GatedRepo"),
    "org/forbidden": (403, ""),
}


class FakeHub(BaseHTTPRequestHandler):
    """The part of the Hub's protocol that a snapshot needs, over a dict of files."""

    files: dict[str, bytes] = {}  # noqa: RUF012 (set once by the fixture)
    served: set[str] = set()  # noqa: RUF012

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        repo = next((name for name in REFUSALS if name in self.path), None)
        if repo is not None:
            status, code = REFUSALS[repo]
            self._answer(status, b"{}", {"X-Error-Code": code} if code else {})
        elif re.search(r"/api/models/org/pico/revision/main", self.path):
            self._answer(200, json.dumps({"id": "org/pico", "sha": COMMIT}).encode())
        elif "/api/models/org/pico/tree/" in self.path:
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": self._tag(data)}
                for name, data in self.files.items()
            ]
            self._answer(200, json.dumps(rows).encode())
        elif match := re.fullmatch(r"/org/pico/resolve/\w+/(.+)", self.path):
            data = self.files[match[1]]
            if self.command == "GET":
                self.served.add(match[1])
            headers = {"ETag": f'"{self._tag(data)}"', "X-Repo-Commit": COMMIT}
            self._answer(200, data, headers)
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    @staticmethod
    def _tag(data: bytes) -> str:
        return hashlib.sha1(data).hexdigest()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def hub() -> Iterator[tuple[type[FakeHub], str]]:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    FakeHub.files = {
        "config.json": b"{}",
        "tokenizer.json": b'{"version": "1.0"}',
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1.safetensors": b"1",
        "model-2.safetensors": b"2",
        "model-3.safetensors": b"in no index",
        "consolidated.safetensors": b"the same weights again",
        "pytorch_model.bin": b"the same weights as a pickle",
        "modeling_pico.py": b"code",
        "original/config.json": b"{}",
    }
    FakeHub.served = set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield FakeHub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_only_what_is_needed_is_downloaded(tmp_path: Path, hub: tuple[type[FakeHub], str]) -> None:
    """Config, tokenizer, index and its shards: no second copy of the weights, no code."""
    server, url = hub

    (answer,) = resolve_elsewhere(tmp_path, "org/pico", HF_ENDPOINT=url)

    assert answer[1] == COMMIT
    assert server.served == {
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model-1.safetensors",
        "model-2.safetensors",
    }
    assert (Path(answer[0]) / "model-2.safetensors").read_bytes() == b"2"


def test_a_pickle_is_downloaded_only_where_there_is_nothing_else(
    tmp_path: Path, hub: tuple[type[FakeHub], str]
) -> None:
    """Old repositories hold pytorch_model.bin alone."""
    server, url = hub
    server.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle", "x.py": b"code"}

    (answer,) = resolve_elsewhere(tmp_path, "org/pico", HF_ENDPOINT=url)

    assert server.served == {"config.json", "pytorch_model.bin"}
    assert (Path(answer[0]) / "pytorch_model.bin").read_bytes() == b"pickle"


def test_refusals_of_the_hub_are_explained_without_the_token(
    tmp_path: Path, hub: tuple[type[FakeHub], str]
) -> None:
    """Each says what to do in one line; the token never shows."""
    answers = resolve_elsewhere(
        tmp_path,
        "org/private",
        "org/gated",
        "org/forbidden",
        "org/pico@nowhere",
        HF_ENDPOINT=hub[1],
        HF_TOKEN="hf_secret",
    )

    words = ["neither a folder nor a model", "is gated", "status 403", "no revision 'nowhere'"]
    for answer, expected in zip(answers, words, strict=True):
        assert answer.startswith("CheckpointError: model ")
        assert expected in answer
        assert "hf_secret" not in answer
        assert "\n" not in answer


def test_unreachable_hub_is_explained(tmp_path: Path) -> None:
    """A refused connection is not a missing model."""
    (answer,) = resolve_elsewhere(tmp_path, "org/pico", HF_ENDPOINT="http://127.0.0.1:9")

    assert "the Hub cannot be reached" in answer
