"""A name that moves to what passed, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import quantkit
from quantkit.errors import HubError, PublishError
from quantkit.records import Event
from tests.hub import CREATE_TAG, HubServer, refuse_with
from tests.hub.repos import StoredFile

REPO = "alice/pico-w8"
SHARD = "model-00001-of-00003.safetensors"


@pytest.fixture
def commits(hub: HubServer, passed: Path, gguf: Path) -> tuple[str, str]:
    """Two publications, one after the other."""
    first = quantkit.publish(passed, repo=REPO, tag="v1")
    second = quantkit.publish(gguf, repo=REPO)
    assert first.commit
    assert second.commit
    return first.commit, second.commit


def test_an_alias_goes_forward_and_back(hub: HubServer, commits: tuple[str, str]) -> None:
    """By a tag or by a commit; what it moved from is said."""
    first, second = commits
    refs = hub.repos[REPO].refs

    made = quantkit.promote(REPO, alias="stable", at="v1")
    assert (made.before, made.after, made.kind) == (None, first, "tag")
    assert made.serve == f"vllm serve {REPO} --revision stable"
    assert refs["refs/tags/stable"] == first

    moved = quantkit.promote(REPO, alias="stable")
    assert (moved.before, moved.after) == (first, second)
    assert moved.serve.startswith(f"hf download {REPO} --revision stable")
    assert refs["refs/tags/stable"] == second

    back = quantkit.promote(REPO, alias="stable", at=first)
    assert (back.before, back.after) == (second, first)
    assert refs["refs/tags/stable"] == first

    hub.requests.clear()
    assert quantkit.promote(REPO, alias="stable", at=first).before == first
    assert quantkit.promote(REPO, alias="stable", dry_run=True).after == second
    assert refs["refs/tags/stable"] == first
    assert not hub.find_requests("^(POST|DELETE) /api/models/alice/pico-w8/tag")


def test_a_branch_gets_the_files_in_one_commit(hub: HubServer, commits: tuple[str, str]) -> None:
    """Its history stays, and there is no moment without it."""
    first, second = commits
    hub.repos[REPO].refs["refs/heads/stable"] = first
    moved = quantkit.promote(REPO, alias="stable")
    assert moved.kind == "branch"
    assert hub.files(REPO, "stable") == hub.files(REPO, second)
    repo = hub.repos[REPO]
    assert repo.find("stable").parent == first
    quantkit.promote(REPO, alias="stable", at="v1")
    assert hub.files(REPO, "stable") == hub.files(REPO, first)


def test_a_tag_that_is_lost_on_the_way_can_be_set_again(
    hub: HubServer, commits: tuple[str, str]
) -> None:
    """The Hub has no request that moves one."""
    first, second = commits
    quantkit.promote(REPO, alias="stable", at=first)
    hub.fail(refuse_with(500, CREATE_TAG))
    with pytest.raises(HubError, match=f"was at {first[:12]}.*--alias stable --at {second}"):
        quantkit.promote(REPO, alias="stable")
    hub.recover()
    assert quantkit.promote(REPO, alias="stable", at=second).before is None


def test_names_that_are_not_set_do_not_hide_the_commit(
    hub: HubServer, passed: Path, gguf: Path
) -> None:
    """A branch that moves while files are sent, and a tag that the Hub does not take."""
    quantkit.publish(passed, repo=REPO)
    repo = hub.repos[REPO]
    repo.refs["refs/heads/stable"] = repo.find("main").oid

    def move(event: Event) -> None:
        if event.message == "committed":
            repo.commit("refs/heads/stable", repo.find("stable").files, title="x", author="bob")

    with pytest.raises(PublishError, match=r"has the files, in commit .* move stable.*was not don"):
        quantkit.publish(gguf, repo=REPO, variant="file", alias="stable", progress=move)
    head = repo.find("main").oid
    hub.fail(refuse_with(500, CREATE_TAG))
    with pytest.raises(HubError, match=rf"commit {head[:12]}, but not all .* set the tag v1.*goes"):
        quantkit.publish(gguf, repo=REPO, variant="file", tag="v1")
    hub.recover()
    assert quantkit.publish(gguf, repo=REPO, variant="file", tag="v1").commit == head
    assert repo.refs["refs/tags/v1"] == head


def put(hub: HubServer, path: str, content: bytes, lfs: bool = False) -> None:
    """Commit a file as anybody could."""
    repo = hub.repos[REPO]
    files = {**repo.find("main").files, path: StoredFile(content, lfs)}
    repo.commit("refs/heads/main", files, title="x", author="alice")


def fail_it(content: bytes) -> bytes:
    return json.dumps(json.loads(content) | {"verdict": "FAIL"}).encode()


def widen_an_interval(hub: HubServer) -> None:
    """Of the report that is there: its verdict stays."""
    document = json.loads(hub.files(REPO)["report/report.json"])
    document["artifacts"][0]["checks"][0]["high"] = 1e6
    put(hub, "report/report.json", json.dumps(document).encode())


SPOILERS: dict[str, tuple[Callable[[HubServer], None], str]] = {
    "other weights": (
        lambda hub: put(hub, SHARD, b"other", lfs=True),
        f"main of alice/pico-w8: {SHARD} is not the file that was judged",
    ),
    "another config": (
        lambda hub: put(hub, "config.json", b"{}"),
        "config.json is not the file that was judged",
    ),
    "weights beside": (
        lambda hub: put(hub, "pytorch_model.bin", b"x", lfs=True),
        "has pytorch_model.bin, which nobody has judged",
    ),
    "another verdict": (
        lambda hub: put(hub, "quantkit.json", fail_it(hub.files(REPO)["quantkit.json"])),
        "quantkit.json does not fit report/report.json",
    ),
    "figures that do not pass": (widen_an_interval, "does not follow from the checks"),
    "no evidence": (lambda hub: put(hub, "quantkit.json", b"[]"), "has no quantkit.json"),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_a_revision_that_is_not_what_passed_is_not_promoted(
    name: str, hub: HubServer, passed: Path
) -> None:
    """The hashes of large files are the Hub's, those of small ones are taken again."""
    spoil, words = SPOILERS[name]
    quantkit.publish(passed, repo=REPO, alias="stable")
    before = hub.repos[REPO].refs["refs/tags/stable"]
    spoil(hub)
    with pytest.raises(PublishError, match=words):
        quantkit.promote(REPO, alias="stable")
    assert hub.repos[REPO].refs["refs/tags/stable"] == before


@pytest.mark.parametrize(
    ("at", "words"), [("v9", "its revision is not there"), ("a b", "is no name of a branch")]
)
def test_a_revision_that_is_not_there_is_refused(
    at: str, words: str, hub: HubServer, passed: Path
) -> None:
    """Before anything moves."""
    quantkit.publish(passed, repo=REPO)
    with pytest.raises(PublishError, match=words):
        quantkit.promote(REPO, alias="stable", at=at)
    with pytest.raises(PublishError, match="is not there"):
        quantkit.promote("alice/nothing", alias="stable")
