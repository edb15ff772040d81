"""A plan for a model on the Hub, of which no weight is downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import quantkit
from quantkit.checkpoint.outline import Outline, outline_source
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import CheckpointError
from quantkit.records import Source
from tests.helpers import make_pico_model
from tests.hub import LFS_GET, OTHER_TOKEN, HubServer, rate_limit

REPO = "alice/pico"


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_model(tmp_path_factory.mktemp("pico") / "model", shards=3)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        yield hub


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_headers_are_those_of_the_files_and_no_weight_comes(hub: HubServer, pico: Path) -> None:
    """Names, shapes, lengths, side files and the commit; afterwards nothing is left of it."""
    hub.add_repo(REPO, read_files(pico), private=True)
    real = open_checkpoint(Source("pico", pico, None))
    with outline_source(REPO) as outline:
        source = outline.source
        seen = open_checkpoint(source)
        folder = source.folder
        for shard in folder.glob("*.safetensors"):
            assert shard.stat().st_size == (pico / shard.name).stat().st_size
            assert shard.stat().st_blocks * 512 < 100_000

    def described(checkpoint: object) -> list[tuple[object, ...]]:
        return [
            (name, info.dtype, info.shape, info.file.name, info.start, info.size)
            for name, info in checkpoint.tensors.items()  # type: ignore[attr-defined]
        ]

    assert described(seen) == described(real)
    assert [path.name for path in seen.side_files] == [path.name for path in real.side_files]
    assert source.revision == hub.repos[REPO].refs["refs/heads/main"]
    assert not folder.exists()
    assert outline.absent_bytes == sum(each.stat().st_size for each in pico.glob("*.safetensors"))
    ranges = [each.headers["range"] for each in hub.find_requests(LFS_GET)]
    assert ranges == ["bytes=0-99999"] * 3
    assert not any("authorization" in each.headers for each in hub.find_requests(LFS_GET))


def test_a_long_header_is_asked_for_in_a_second_piece(
    hub: HubServer, pico: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the first piece holds; a busy Hub is waited for."""
    monkeypatch.setattr("quantkit.checkpoint.outline._FIRST_BYTES", 100)
    hub.add_repo(REPO, read_files(pico))
    hub.fail(rate_limit(LFS_GET))
    with outline_source(REPO) as outline:
        assert len(open_checkpoint(outline.source).tensors) > 10
    assert len(hub.find_requests(LFS_GET)) == 7


def test_weights_that_are_here_are_used(hub: HubServer, pico: Path) -> None:
    """A folder as it is; a model that was downloaded before, with no question to the storage."""
    with outline_source(str(pico)) as outline:
        assert outline == Outline(Source(str(pico), pico, None))
    hub.add_repo(REPO, read_files(pico))
    whole = resolve_source(REPO)
    asked = len(hub.find_requests(LFS_GET))
    with outline_source(REPO) as outline:
        assert outline == Outline(whole)
    assert len(hub.find_requests(LFS_GET)) == asked


def test_pickled_weights_are_downloaded(hub: HubServer, pico: Path, tmp_path: Path) -> None:
    """They have no headers."""
    folder = shutil.copytree(pico, tmp_path / "pickled")
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    hub.add_repo(REPO, read_files(folder))
    with outline_source(REPO) as outline:
        assert (outline.source.folder / "pytorch_model.bin").read_bytes() == b"not looked at"


def test_what_is_wrong_is_said_as_by_a_download(
    hub: HubServer, pico: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A shard that is missing or no name of one, a file that is cut short, a gated model."""
    files = read_files(pico)
    shard = next(name for name in files if name.startswith("model-00002"))
    hub.add_repo("alice/lacking", {name: files[name] for name in files if name != shard})
    with pytest.raises(CheckpointError, match="does not have"), outline_source("alice/lacking"):
        pass
    hub.add_repo("alice/short", {**files, shard: files[shard][:-1]})
    # The folder of the outline is gone by then: the model's name stands in its place.
    cut_short = pytest.raises(CheckpointError, match=f"alice/short/{shard}.*cut short")
    with cut_short, outline_source("alice/short") as outline:
        open_checkpoint(outline.source)
    index = files["model.safetensors.index.json"].replace(shard.encode(), b"../../x.safetensors")
    hub.add_repo("alice/climbing", {**files, "model.safetensors.index.json": index})
    with pytest.raises(CheckpointError, match="climbs out"), outline_source("alice/climbing"):
        pass
    assert not hub.find_requests(r"x\.safetensors")
    hub.add_repo("alice/gated", files, gated=True)
    hub.connect(monkeypatch, tmp_path / "home", OTHER_TOKEN)
    with pytest.raises(CheckpointError, match="is gated"), outline_source("alice/gated"):
        pass


def test_a_plan_for_a_model_on_the_hub_is_that_for_its_folder(hub: HubServer, pico: Path) -> None:
    """But for the name and a note of what the job will download."""
    hub.add_repo(REPO, read_files(pico))
    options = ["quantize.group_size=32", "output=null"]
    far = quantkit.plan("rtn4", model=REPO, overrides=options)
    near = quantkit.plan("rtn4", model=pico, overrides=options)

    assert isinstance(near, quantkit.Plan)
    assert replace(near, model=REPO) == replace(far, notes=far.notes[:-1])
    size = sum(each.stat().st_size for each in pico.glob("*.safetensors"))
    assert f"downloads their {size:,} bytes first" in far.notes[-1]
