"""The local Hub, seen by the real client."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub import (
    COMMIT,
    LFS_BATCH,
    LFS_GET,
    LFS_PUT,
    OTHER_TOKEN,
    READ_TOKEN,
    UNKNOWN_TOKEN,
    WRITE_TOKEN,
    HubServer,
    cut,
    lose_answer,
    rate_limit,
    storage_full,
)
from tests.hub.faults import Fault

REPO = "alice/pico-awq4"
CARD = b"---\nlicense: apache-2.0\nbase_model: alice/pico\n---\n# Pico\n"
WEIGHTS = bytes(range(256)) * 300
"""Three parts of 32 KiB, the last one short."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(multipart_above=40_000, part_bytes=32_768, page_entries=3) as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        yield hub


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi()


def additions(**files: bytes) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(name.replace("_", "."), data) for name, data in files.items()]


def send(api: HfApi, *, repo: str = REPO, pull_request: bool = False, **files: bytes) -> str:
    operations = additions(**files)
    info = api.create_commit(repo, operations, commit_message="m", create_pr=pull_request)
    return info.oid


def test_files_of_all_kinds_go_up_and_come_down(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    """A card, a small object and one in parts, in one commit; downloaded by both functions."""
    assert api.create_repo(REPO, private=True).repo_id == REPO
    small = b"\0" * 1000
    oid = send(api, README_md=CARD, model_safetensors=WEIGHTS, small_bin=small)
    files = {"README.md": CARD, "model.safetensors": WEIGHTS, "small.bin": small}
    assert hub.files(REPO) == hub.files(REPO, oid) == files
    puts = hub.find_requests(LFS_PUT)
    assert sorted(each.received for each in puts) == [1000, 11264, 32768, 32768]
    assert not any("authorization" in each.headers for each in puts)
    folder = Path(snapshot_download(REPO))
    assert {p: (folder / p).read_bytes() for p in files} == files
    assert Path(hf_hub_download(REPO, "small.bin", local_dir=tmp_path)).read_bytes() == small
    fetched = hub.find_requests(LFS_GET)
    assert len(fetched) == 2
    assert not any("authorization" in each.headers for each in fetched)


def test_what_is_listed_has_names_sizes_and_hashes(hub: HubServer, api: HfApi) -> None:
    """By all three ways of asking, over more than one page."""
    hub.add_repo(REPO, {"README.md": CARD, "a.bin": b"1", "gguf/x.gguf": b"\0", "z.txt": b"z"})
    tree = {each.path: each for each in api.list_repo_tree(REPO, recursive=True)}
    assert list(tree) == [".gitattributes", "README.md", "a.bin", "gguf", "gguf/x.gguf", "z.txt"]
    info = api.model_info(REPO, files_metadata=True)
    weights = {each.rfilename: each for each in info.siblings or []}["gguf/x.gguf"]
    assert weights.lfs is not None
    assert weights.lfs.sha256 == hashlib.sha256(b"\0").hexdigest()
    assert info.tags == ["base_model:alice/pico", "license:apache-2.0"]
    [entry] = api.get_paths_info(REPO, ["a.bin", "absent"])
    assert entry.path == "a.bin"
    assert [each.title for each in api.list_repo_commits(REPO)] == [
        "Upload files",
        "initial commit",
    ]


def test_a_cut_connection_is_gone_over_and_known_objects_stay(hub: HubServer, api: HfApi) -> None:
    """The client sends the part again; what is complete is not asked for a second time."""
    api.create_repo(REPO)
    hub.fail(cut(after=20_000, first=2))
    hub.fail(lose_answer(COMMIT))
    with pytest.raises(Exception, match=r"disconnected|closed|reset"):
        send(api, model_safetensors=WEIGHTS)
    assert [each.status for each in hub.find_requests(LFS_PUT)] == [200, None, 200, 200]
    # The commit was done, though nobody was told.
    assert hub.files(REPO) == {"model.safetensors": WEIGHTS}
    send(api, again_safetensors=WEIGHTS)
    assert len(hub.find_requests(LFS_PUT)) == 4
    assert sorted(hub.files(REPO)) == ["again.safetensors", "model.safetensors"]


def test_nothing_is_visible_before_the_commit(hub: HubServer, api: HfApi) -> None:
    """Objects alone show nothing, and a full storage refuses before anything is sent."""
    api.create_repo(REPO)
    api.preupload_lfs_files(REPO, additions(model_safetensors=WEIGHTS))
    assert hub.files(REPO) == {}
    hub.fail(storage_full(LFS_BATCH))
    with pytest.raises(HfHubHTTPError, match="storage limit reached"):
        send(api, other_safetensors=b"\0")


def test_a_rate_limit_and_a_download_that_breaks_off(
    hub: HubServer, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client waits, and goes on where the download broke off."""
    hub.add_repo(REPO, {"w.bin": WEIGHTS})
    # What the client has of a piece of 10 MB that is not whole, it throws away.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    hub.fail(rate_limit(LFS_BATCH))
    hub.fail(Fault(LFS_GET, cut_answer_after=10_000))
    send(api, x_bin=b"x")
    assert [each.status for each in hub.find_requests(LFS_BATCH)] == [429, 200]
    assert Path(hf_hub_download(REPO, "w.bin", local_dir=tmp_path)).read_bytes() == WEIGHTS
    assert hub.find_requests(LFS_GET)[1].headers["range"] == "bytes=8192-"


def test_branches_tags_and_pull_requests(hub: HubServer, api: HfApi) -> None:
    """Refs are made, listed, refused twice and deleted; a pull request leaves main as it is."""
    hub.add_repo(REPO, {"a.txt": b"1"})
    first = api.model_info(REPO).sha or ""
    api.create_branch(REPO, branch="next")
    api.create_commit(REPO, additions(a_txt=b"2"), commit_message="m", revision="next")
    api.create_tag(REPO, tag="v1", revision="next")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1", revision=first)
    assert hub.files(REPO, "v1") == {"a.txt": b"2"}
    assert hub.files(REPO) == {"a.txt": b"1"}
    api.delete_tag(REPO, tag="v1")
    api.create_tag(REPO, tag="v1", revision=first)
    assert hub.files(REPO, "v1") == {"a.txt": b"1"}
    other = HfApi(token=OTHER_TOKEN)
    assert send(other, pull_request=True, b_txt=b"b")
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [each.name for each in refs.branches] == ["main", "next"]
    assert [each.ref for each in refs.pull_requests or []] == ["refs/pr/1"]
    assert hub.files(REPO, "refs/pr/1") == {"a.txt": b"1", "b.txt": b"b"}
    assert api.get_discussion_details(REPO, 1).author == "bob"
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(
            REPO, additions(c_txt=b"c"), commit_message="m", revision="next", parent_commit=first
        )
    api.delete_branch(REPO, branch="next")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="next")


def test_who_may_do_what(hub: HubServer, api: HfApi) -> None:
    """Roles, namespaces, private and gated repositories, each with the client's own error."""
    reader, bob, nobody = HfApi(token=READ_TOKEN), HfApi(token=OTHER_TOKEN), HfApi(token=False)
    assert api.whoami()["auth"]["accessToken"]["role"] == "write"
    assert reader.whoami()["name"] == "alice"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token=UNKNOWN_TOKEN).whoami()
    with pytest.raises(HfHubHTTPError, match="rights to create"):
        reader.create_repo(REPO)
    api.create_repo("acme/pico")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("acme/pico")
    with pytest.raises(HfHubHTTPError, match="write token"):
        send(reader, repo="acme/pico", a_txt=b"a")
    with pytest.raises(HfHubHTTPError, match="create_pr=1"):
        send(bob, repo="acme/pico", a_txt=b"a")
    hub.add_repo("alice/secret", {"a.txt": b"a"}, private=True)
    assert reader.model_info("alice/secret").private
    for stranger in (bob, nobody):
        with pytest.raises(RepositoryNotFoundError):
            stranger.model_info("alice/secret")
    gated = hub.add_repo("meta/llama", {"a.txt": b"a"}, gated=True)
    assert bob.model_info("meta/llama").gated == "manual"
    with pytest.raises(GatedRepoError):
        bob.hf_hub_download("meta/llama", "a.txt")
    gated.accepted.add("bob")
    assert Path(bob.hf_hub_download("meta/llama", "a.txt")).read_bytes() == b"a"
    with pytest.raises(RemoteEntryNotFoundError):
        bob.hf_hub_download("meta/llama", "b.txt")
    assert {each.headers.get("authorization") for each in hub.find_requests("whoami")} == {
        f"Bearer {token}" for token in (WRITE_TOKEN, READ_TOKEN, UNKNOWN_TOKEN)
    }


@pytest.mark.parametrize("line", ["license: llama-7", "base_model: /home/me/pico", "a: [", "- a"])
def test_metadata_that_the_hub_does_not_take_is_refused(api: HfApi, line: str) -> None:
    """Before anything is sent, as the client asks first."""
    api.create_repo(REPO)
    with pytest.raises(ValueError, match="Invalid metadata"):
        send(api, README_md=f"---\n{line}\n---\n".encode())
