"""The original of what is published: where the Hub does not give it, what to do; and its terms."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.checkpoint.source import resolve_source
from quantkit.errors import CheckpointError
from quantkit.report.model_card import read_carried_front_matter
from tests.hub import UNKNOWN_TOKEN, WRITE_TOKEN, HubServer, refuse_with

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"\0\0",
    "README.md": b"---\nlicense: other\nlicense_name: pico\nlicense_link: LICENSE\n---\n",
    "training.log": b"x",
}


@pytest.mark.parametrize("token", [None, WRITE_TOKEN, UNKNOWN_TOKEN])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bob/gated", "is gated: ask for access at .*bob/gated, then log in"),
        ("bob/private", "neither a folder nor a model on the Hub that you may see.*if it is priv"),
        ("bob/absent", "neither a folder nor a model on the Hub that you may see: check the name"),
    ],
)
def test_a_model_that_one_may_not_see_is_explained(
    name: str,
    words: str,
    token: str | None,
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """With a token that is not valid the Hub shows nothing: then that is what is wrong."""
    hub.add_repo("bob/gated", FILES, gated=True)
    hub.add_repo("bob/private", FILES, private=True)
    hub.connect(monkeypatch, tmp_path / "home", token)
    expected = "does not accept the token.*hf auth login" if token == UNKNOWN_TOKEN else words
    with pytest.raises(CheckpointError, match=expected) as caught:
        resolve_source(name)
    assert token is None or token not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("status", "words"),
    [(403, "the right to read it"), (429, "goes on in some minutes"), (500, "goes on later")],
)
def test_a_hub_that_refuses_or_is_busy_is_explained(
    status: int, words: str, hub: HubServer, hurried: list[float]
) -> None:
    """Each with what helps."""
    hub.add_repo("bob/pico", FILES)
    hub.fail(refuse_with(status, ".", times=99))
    with pytest.raises(CheckpointError, match=f"status {status}.*{words}"):
        resolve_source("bob/pico")


def test_the_terms_come_along_with_the_weights(hub: HubServer) -> None:
    """They stand in the original's card, which is no file that a runtime needs."""
    hub.add_repo("bob/pico", FILES)
    folder = resolve_source("bob/pico").folder
    assert read_carried_front_matter(folder / "README.md") == {
        "license": "other",
        "license_name": "pico",
        "license_link": "LICENSE",
    }
    assert not (folder / "training.log").exists()
