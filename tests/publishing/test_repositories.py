"""What a repository holds already: what gives way, what stays, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import quantkit
from quantkit.errors import PublishError
from tests.hub import LFS_PUT, HubServer
from tests.publishing.outputs import edit_evidence
from tests.publishing.test_publishing import REPO, SHARDS, WRITING


def test_a_new_publication_takes_the_place_of_the_old_one(
    hub: HubServer, passed: Path, gguf: Path
) -> None:
    """What is not of it goes in the same commit; pictures and terms stay."""
    hub.add_repo(REPO, {"figure.png": b"\x89PNG", "LICENSE": b"terms"})
    quantkit.publish(passed, repo=REPO)
    found = quantkit.publish(gguf, repo=REPO)
    assert set(SHARDS) <= set(found.deleted)
    assert set(hub.files(REPO)) == {file.path for file in found.files} | {"figure.png", "LICENSE"}


def test_other_files_are_left_alone_until_somebody_says_otherwise(
    hub: HubServer, passed: Path
) -> None:
    """Weights of nobody knows what would be loaded beside ours."""
    hub.add_repo(REPO, {"pytorch_model.bin": b"x", "config.json": b"{}", "README.md": b"# mine"})
    with pytest.raises(PublishError, match=r"config.json, pytorch_model.bin.*--replace"):
        quantkit.publish(passed, repo=REPO)
    assert not hub.find_requests(WRITING)
    found = quantkit.publish(passed, repo=REPO, replace=True)
    assert found.deleted == ("pytorch_model.bin",)
    assert set(hub.files(REPO)) == {file.path for file in found.files}
    assert "the history keeps it" in " ".join(found.notes)


def test_another_original_needs_another_repository(
    hub: HubServer, output: Path, passed: Path, tmp_path: Path
) -> None:
    """Two models in one repository are a mistake, unless the first is to go."""

    def make_of(name: str) -> Path:
        shutil.copytree(passed, tmp_path / name)
        model = json.loads((passed / "quantkit.json").read_text())["model"]
        edit_evidence(tmp_path / name, model={**model, "name": f"org/{name}", "revision": "0" * 40})
        return tmp_path / name

    quantkit.publish(make_of("one"), repo=REPO)
    with pytest.raises(PublishError, match="holds a quantized org/one, and this is one of org/two"):
        quantkit.publish(make_of("two"), repo=REPO, variant="second")
    found = quantkit.publish(tmp_path / "two", repo=REPO, variant="second", replace=True)
    assert set(SHARDS) <= set(found.deleted)


def test_a_repository_is_as_public_as_was_asked(hub: HubServer, passed: Path) -> None:
    """Nothing private becomes public by the way, nor the other way round."""
    quantkit.publish(passed, repo=REPO, private=False)
    assert not hub.repos[REPO].private
    with pytest.raises(PublishError, match="is public, and --private was asked for"):
        quantkit.publish(passed, repo=REPO, private=True)
    assert "everybody can see this" in quantkit.publish(passed, repo=REPO).notes[0]


def test_a_list_of_ignored_files_is_not_fallen_for(hub: HubServer, passed: Path) -> None:
    """The Hub would leave them out of the commit without a word."""
    hub.add_repo(REPO, {".gitignore": b"*.json\n"})
    with pytest.raises(PublishError, match=r"has a \.gitignore"):
        quantkit.publish(passed, repo=REPO, replace=True)


def test_a_card_that_the_hub_refuses_is_noticed_before_the_weights_go(
    hub: HubServer, output: Path
) -> None:
    """Licences have names of their own there."""
    card = output / "compressed-tensors" / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: mine"))
    with pytest.raises(PublishError, match=r"could not have the model card accepted.*license"):
        quantkit.publish(output, repo=REPO)
    assert not hub.find_requests(LFS_PUT)
