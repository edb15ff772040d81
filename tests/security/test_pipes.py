"""Nobody waits for a pipe in place of a file, or reads a file by a link out of its folder."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from quantkit.calibration.stored import open_statistics
from quantkit.checkpoint.headers import read_json
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import CalibrationError, CheckpointError, PublishError
from quantkit.integrations.figures import read_told
from quantkit.judging.side_files import _describe_modules, find_ends
from quantkit.publishing.checking import CheckedArtifact, _list_strangers
from quantkit.report.model_card import read_carried_front_matter, write_model_card
from tests.helpers import make_pico_model
from tests.report.sample import make_report

DIGEST = "0" * 64
CARD = "---\nlicense: what only the file outside says\n---\n"


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """Raise a TimeoutError in what waits for a pipe that nobody writes to."""

    def wake(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, wake)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=["pipe", "link"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def put(path: Path, kind: str, content: str) -> None:
    """Make a pipe, or a link to a file beside the folder."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
        return
    outside = path.parent.parent / f"outside-{path.name}"
    outside.write_text(content)
    path.symlink_to(outside)


def write_manifest(folder: Path, **holds: object) -> None:
    """A manifest that lacks nothing; its windows have another hash."""
    manifest = {
        "schema": 1,
        "model": {"name": "m", "files": {}},
        "calibration": {"source": "s", "sha256": DIGEST, "notes": []},
        "spec": {},
        "compute": {},
        "holds": {"key_value": False, "fisher": False, **holds},
        "blocks": {},
        "windows_sha256": DIGEST,
    }
    (folder / "statistics.json").write_text(json.dumps(manifest))


def test_statistics(folder: Path, kind: str) -> None:
    """The manifest, and the windows that it names."""
    put(folder / "statistics.json", kind, "{}")
    with pytest.raises(CalibrationError, match=r"is a pipe|links to"):
        open_statistics(folder)
    (folder / "statistics.json").unlink()
    write_manifest(folder, no_key_value="nobody looked")
    put(folder / "windows.safetensors", kind, "x")
    with pytest.raises(CalibrationError, match=r"is a pipe|links to"):
        open_statistics(folder)


def test_a_manifest_says_why_it_holds_no_keys_and_values(folder: Path) -> None:
    """Whoever needs them is told the reason."""
    for holds in ({}, {"no_key_value": None}, {"key_value": True, "no_key_value": "why"}):
        write_manifest(folder, **holds)
        with pytest.raises(CalibrationError, match=r"is damaged \(holds\)"):
            open_statistics(folder)


def test_modules(folder: Path, kind: str) -> None:
    """A list that lies elsewhere is none."""
    content = json.dumps([{"type": "models.Transformer", "path": ""}])
    put(folder / "modules.json", kind, content)
    assert _describe_modules(folder) is None


def test_ends(folder: Path, kind: str) -> None:
    """What lies elsewhere ends nothing."""
    put(folder / "generation_config.json", kind, '{"eos_token_id": 3}')
    with pytest.raises(CheckpointError, match=r"is a pipe|links to"):
        find_ends(folder)


def test_the_card_of_a_model(folder: Path, kind: str) -> None:
    """Refused before any work; and whoever writes the artifact's card does not wait."""
    model = make_pico_model(folder / "model", hidden=32, layers=1)
    put(model / "README.md", kind, CARD)
    with pytest.raises(CheckpointError, match=r"is a pipe|links to"):
        open_checkpoint(resolve_source(str(model)))
    report = make_report("PASS")
    card = write_model_card(report, report.artifacts[0], folder, model)
    assert "file outside" not in card.read_text()
    if kind == "pipe":
        assert read_carried_front_matter(model / "README.md") == {}


def test_the_card_of_what_is_published(folder: Path, kind: str) -> None:
    """Its terms would go along."""
    artifact = CheckedArtifact("x", "gguf", "x", folder, ())
    assert _list_strangers(artifact, [artifact]) == []
    put(folder / "README.md", kind, CARD)
    with pytest.raises(PublishError, match=r"README\.md is a link or no file"):
        _list_strangers(artifact, [artifact])


def test_the_report_that_is_tracked(folder: Path) -> None:
    """All of it goes to a server."""
    (folder / "report").mkdir()
    (folder.parent / "outside").write_text("{}")
    for place in (folder / "report", folder):
        (place / "report.json").symlink_to(folder.parent / "outside")
        with pytest.raises(CheckpointError, match="links to"):
            read_told(folder)
        (place / "report.json").unlink()


def test_any_json(folder: Path) -> None:
    """Whoever asks for it."""
    put(folder / "any.json", "pipe", "")
    with pytest.raises(CheckpointError, match="it is not a file"):
        read_json(folder / "any.json")
