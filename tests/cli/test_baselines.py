"""Tests of `quantkit baselines`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from quantkit.cli.baselines import baselines
from quantkit.cli.console import Reply, render_reply
from quantkit.judging.baseline.store import open_store


def text_of(reply: Reply) -> str:
    return render_reply(reply, as_json=False, stdout=sys.stdout)


@pytest.fixture
def filled() -> None:
    """One answer is kept."""
    store = open_store(True)
    assert store is not None
    draft = store.start("0" * 64, {"ok": True})
    assert draft is not None
    store.finish(draft)


@pytest.mark.usefixtures("filled")
def test_it_shows_what_is_kept_and_clears_it(own_store: Path) -> None:
    """The document names the folder, the number of answers, their bytes and the bound."""
    shown = baselines()
    document = dict(shown.document)  # type: ignore[arg-type]
    assert document["folder"] == str(own_store / "baselines")
    assert (document["entries"], document["cleared"]) == (1, False)
    assert 0 < document["bytes"] < document["bound"]
    assert "kept     1 answer, " in text_of(shown)

    cleared = baselines(clear=True)
    assert "removed  1 answer, " in text_of(cleared)
    assert dict(baselines().document)["entries"] == 0  # type: ignore[arg-type]


def test_it_says_that_nothing_is_to_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE_BYTES", "0")

    assert "nothing: it is switched off" in text_of(baselines())
