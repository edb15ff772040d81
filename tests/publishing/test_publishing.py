"""An output on a local Hub, through the real client: what arrives, and what a second run sends."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import quantkit
from quantkit.errors import HubError, PublishError
from quantkit.records import Event
from tests.helpers import make_pico_model
from tests.hub import (
    COMMIT,
    CREATE_TAG,
    LFS_BATCH,
    LFS_PUT,
    PREUPLOAD,
    HubServer,
    cut,
    lose_answer,
    rate_limit,
)
from tests.publishing.outputs import edit_evidence, make_output, read_evidence

REPO = "alice/pico-w8"
SHARDS = tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
WRITING = "^(POST|PUT|DELETE) "


def sent(hub: HubServer) -> list[str]:
    """The hashes of the large files whose last byte has arrived, in order."""
    done = [each for each in hub.find_requests(LFS_PUT) if each.status == 200]
    return list(dict.fromkeys(each.path.split("?")[0].rpartition("/")[2] for each in done))


def front_matter(card: bytes) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.decode().split("---\n")[1])
    return found


def test_an_output_becomes_one_commit_of_a_private_repository(hub: HubServer, passed: Path) -> None:
    """At the root, where runtimes look for it, with its card, its evidence and its report."""
    events: list[Event] = []
    found = quantkit.publish(passed, repo=REPO, progress=events.append)

    repo = hub.repos[REPO]
    assert repo.private
    assert [commit.title for commit in repo.history(repo.find("main"))] == [
        "Publish a quantized model with quantkit",
        "initial commit",
    ]
    files = hub.files(REPO)
    assert set(files) == {file.path for file in found.files}
    for path in (passed / "compressed-tensors").iterdir():
        assert path.name == "README.md" or files[path.name] == path.read_bytes()
    assert {"README.md", "quantkit.json", "report/report.html", *SHARDS} <= set(files)
    assert found.commit == repo.refs["refs/heads/main"]
    assert found.serve == f"vllm serve {REPO}"
    assert found.url == f"{hub.endpoint}/{REPO}"
    told = [event.message for event in events if event.stage == "publish"]
    assert told[0].startswith(SHARDS[0])
    assert events[-1].done == events[-1].total


def test_the_card_names_the_repository_and_the_terms(hub: HubServer, passed: Path) -> None:
    """With the recipe and the measured table, and nothing of this machine."""
    quantkit.publish(passed, repo=REPO)

    card = hub.files(REPO)["README.md"]
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["quantkit", "compressed-tensors", "w8a16"],
        "license": "apache-2.0",
        "language": "en",
    }
    for text in (f"vllm serve {REPO}", f'from_pretrained("{REPO}"', "| KL divergence |", "w8a16"):
        assert text in card.decode()


def test_no_path_of_this_machine_goes_along(hub: HubServer, passed: Path) -> None:
    """The recipe, the evidence and the reports name folders by their last part."""
    assert str(passed.parent) in (passed / "quantkit.json").read_text()
    quantkit.publish(passed, repo=REPO)

    for path, content in hub.files(REPO).items():
        assert str(passed.parent).encode() not in content, path
    evidence = json.loads(hub.files(REPO)["quantkit.json"])
    assert evidence["recipe"]["resolved"]["output"] == "out"
    assert evidence["model"]["name"] == "model"
    assert evidence == json.loads(hub.files(REPO)["report/report.json"])["evidence"]


def test_what_was_published_verifies_where_it_is_downloaded(
    hub: HubServer, passed: Path, tmp_path: Path
) -> None:
    """The evidence lies beside the files there, and its hashes are theirs."""
    from huggingface_hub import snapshot_download

    quantkit.publish(passed, repo=REPO)
    quantkit.publish(passed, repo=REPO, variant="copy")
    folder = Path(snapshot_download(REPO, local_dir=tmp_path / "down"))
    assert quantkit.verify(folder).problems == ()
    assert quantkit.inspect(folder).verdict == "PASS"
    with (folder / "config.json").open("a") as file:
        file.write("\n")
    assert "config.json" in quantkit.verify(folder).problems[0]


def test_a_dry_run_names_what_the_run_sends(hub: HubServer, passed: Path) -> None:
    """Files, sizes and hashes are the same, and nothing is written."""
    planned = quantkit.publish(passed, repo=REPO, dry_run=True)
    assert not hub.find_requests(WRITING)
    assert REPO not in hub.repos
    assert planned.commit is None
    assert "it would be made, private" in planned.notes[0]
    done = quantkit.publish(passed, repo=REPO)
    assert [(file.path, file.sha256, file.large) for file in planned.files] == [
        (file.path, file.sha256, file.large) for file in done.files
    ]
    stored = hub.repos[REPO].find("main").files
    assert {path: stored[path].lfs for path in hub.files(REPO)} == {
        file.path: file.large for file in done.files
    }


def test_a_second_run_has_nothing_to_send(hub: HubServer, passed: Path) -> None:
    """No file, no commit; a tag is still set."""
    first = quantkit.publish(passed, repo=REPO)
    uploads = len(hub.find_requests(LFS_PUT))
    again = quantkit.publish(passed, repo=REPO, tag="v1")
    assert again.commit == first.commit
    assert again.sent_bytes == 0
    assert "there is nothing to send" in again.notes[0]
    assert len(hub.find_requests(LFS_PUT)) == uploads
    assert len(hub.find_requests(COMMIT)) == 1
    assert hub.repos[REPO].refs["refs/tags/v1"] == first.commit


def test_a_cut_connection_is_taken_up_again(
    hub: HubServer, passed: Path, hurried: list[float]
) -> None:
    """A run dies in the second of three large files; the next one sends only what is missing."""
    hub.fail(cut(LFS_PUT, after=200_000, first=5, times=6))
    with pytest.raises(HubError, match=f"could not send {SHARDS[1]}.*goes on") as caught:
        quantkit.publish(passed, repo=REPO)
    assert caught.value.exit_code == 6
    assert hub.files(REPO) == {}
    finished = set(hub.repos[REPO].objects)
    assert len(finished) == 1

    hub.recover()
    hub.requests.clear()
    quantkit.publish(passed, repo=REPO)
    assert len(sent(hub)) == 2
    assert not finished & set(sent(hub))
    assert set(SHARDS) <= set(hub.files(REPO))


def test_a_connection_that_comes_back_is_enough(
    hub: HubServer, passed: Path, hurried: list[float]
) -> None:
    """The client tries again by itself, and says so."""
    told: list[str] = []
    hub.fail(cut(LFS_PUT, after=1000, times=2))
    quantkit.publish(passed, repo=REPO, progress=lambda event: told.append(event.message))
    assert set(SHARDS) <= set(hub.files(REPO))
    assert [words for words in told if "trying again in" in words]


@pytest.mark.parametrize("request_kind", [LFS_BATCH, PREUPLOAD, COMMIT, CREATE_TAG])
def test_a_rate_limit_is_waited_for(
    request_kind: str, hub: HubServer, passed: Path, hurried: list[float]
) -> None:
    """As long as the Hub says, for each kind of request."""
    hub.fail(rate_limit(request_kind, seconds=7))
    quantkit.publish(passed, repo=REPO, tag="v1")
    assert 8.0 in hurried
    assert hub.repos[REPO].refs["refs/tags/v1"] == hub.repos[REPO].refs["refs/heads/main"]


def test_a_rate_limit_without_end_is_an_error_that_can_go_on(
    hub: HubServer, passed: Path, hurried: list[float]
) -> None:
    """After some turns of waiting."""
    hub.fail(rate_limit(COMMIT, times=50))
    with pytest.raises(HubError, match="the Hub is busy: too many requests"):
        quantkit.publish(passed, repo=REPO)
    assert hub.files(REPO) == {}


def test_an_answer_that_is_lost_costs_nothing(hub: HubServer, passed: Path) -> None:
    """The commit is made, and the next run sees it."""
    hub.fail(lose_answer(COMMIT))
    with pytest.raises(HubError, match="could not commit"):
        quantkit.publish(passed, repo=REPO)
    again = quantkit.publish(passed, repo=REPO)
    assert again.commit == hub.repos[REPO].refs["refs/heads/main"]
    assert len(hub.find_requests(COMMIT)) == 1


def test_nothing_is_seen_before_the_commit(hub: HubServer, passed: Path) -> None:
    """While large files are under way, the repository has none of them."""
    seen: list[set[str]] = []
    quantkit.publish(
        passed,
        repo=REPO,
        progress=lambda event: (
            seen.append(set(hub.files(REPO)))
            if event.stage == "publish" and event.message != "committed"
            else None
        ),
    )
    assert len(seen) == 4
    assert set.union(*seen) == set()


def test_a_commit_of_somebody_else_in_between_is_noticed(hub: HubServer, passed: Path) -> None:
    """Nothing is committed on top of what was not looked at."""
    hub.add_repo(REPO, {"figure.png": b"\x89PNG"})

    def interfere(event: Event) -> None:
        if event.message == "the small files and the commit":
            repo = hub.repos[REPO]
            repo.commit("refs/heads/main", repo.find("main").files, title="x", author="bob")

    with pytest.raises(PublishError, match="somebody has changed alice/pico-w8 in the meantime"):
        quantkit.publish(passed, repo=REPO, progress=interfere)
    assert set(hub.files(REPO)) == {"figure.png"}


def test_a_file_that_changes_meanwhile_is_not_committed(hub: HubServer, output: Path) -> None:
    """The bytes that are sent are the ones that were hashed."""

    def spoil(event: Event) -> None:
        if event.stage == "publish" and event.message.startswith(SHARDS[1]):
            path = output / "compressed-tensors" / SHARDS[2]
            path.write_bytes(path.read_bytes()[:-1] + b"\0")

    with pytest.raises(PublishError, match=f"{SHARDS[2]} was changed while it was published"):
        quantkit.publish(output, repo=REPO, progress=spoil)
    assert hub.files(REPO) == {}


def test_what_has_not_arrived_is_noticed(hub: HubServer, passed: Path) -> None:
    """The Hub's word that it has committed is not taken for the commit."""

    def spoil(event: Event) -> None:
        if event.message == "committed":
            repo = hub.repos[REPO]
            commit = repo.find("main")
            files = {name: file for name, file in commit.files.items() if name != "config.json"}
            repo.commits[commit.oid] = replace(commit, files=files)

    with pytest.raises(HubError, match=r"has not what was sent: config\.json; do not use it"):
        quantkit.publish(passed, repo=REPO, tag="v1", progress=spoil)
    assert "refs/tags/v1" not in hub.repos[REPO].refs


def test_a_branch_a_tag_and_an_alias_name_the_commit(hub: HubServer, passed: Path) -> None:
    """The branch is made of the main one, which stays as it is."""
    hub.add_repo(REPO, {"LICENSE": b"terms"})
    found = quantkit.publish(passed, repo=REPO, revision="next", tag="v2", alias="stable")
    refs = hub.repos[REPO].refs
    assert refs["refs/heads/next"] == refs["refs/tags/v2"] == refs["refs/tags/stable"]
    assert set(hub.files(REPO, "main")) == {"LICENSE"}
    assert {"LICENSE", *SHARDS} <= set(hub.files(REPO, "next"))
    assert found.serve == f"vllm serve {REPO} --revision next"
    assert "--revision next" in hub.files(REPO, "next")["README.md"].decode()
    assert found.moved_from is None


def test_a_tag_stays_where_it_is(hub: HubServer, passed: Path, gguf: Path) -> None:
    """Refused before anything is sent."""
    quantkit.publish(passed, repo=REPO, tag="v1")
    hub.requests.clear()
    with pytest.raises(PublishError, match=r"has this tag already.*--alias"):
        quantkit.publish(gguf, repo=REPO, tag="v1")
    head = hub.repos[REPO].find("main").oid
    hub.repos[REPO].refs |= {"refs/heads/both": head, "refs/tags/both": head}
    with pytest.raises(PublishError, match=r"--alias both is a tag and a branch"):
        quantkit.publish(gguf, repo=REPO, variant="file", alias="both")
    assert not hub.find_requests(LFS_PUT)


def test_a_pull_request_proposes_the_commit(hub: HubServer, passed: Path) -> None:
    """To a repository of somebody else too, which stays as it is."""
    hub.add_repo("bob/pico", {"LICENSE": b"terms"})
    found = quantkit.publish(passed, repo="bob/pico", pull_request=True)
    assert found.pull_request == f"{hub.endpoint}/bob/pico/discussions/1" == found.url
    assert set(hub.files("bob/pico")) == {"LICENSE"}
    assert set(SHARDS) <= set(hub.files("bob/pico", "refs/pr/1"))


def test_variants_lie_side_by_side_and_the_card_lists_them(
    hub: HubServer, passed: Path, gguf: Path
) -> None:
    """Each keeps what the others have; llama.cpp finds a type in any folder."""
    quantkit.publish(passed, repo=REPO)
    found = quantkit.publish(gguf, repo=REPO, variant="Q8_0")
    files = hub.files(REPO)
    assert {"Q8_0/quantkit.json", "Q8_0/README.md", "Q8_0/model-Q8_0.gguf", *SHARDS} <= set(files)
    assert found.deleted == ()
    assert found.serve == f"llama-server -hf {REPO}:Q8_0"
    card = files["README.md"].decode()
    assert f"vllm serve {REPO}" in card
    assert f"[Q8\\_0](Q8_0/README.md): `llama-server -hf {REPO}:Q8_0`" in card.replace(
        "Q8_0]", "Q8\\_0]"
    )
    assert front_matter(files["README.md"])["license"] == "apache-2.0"

    again = quantkit.publish(passed, repo=REPO)
    assert again.sent_bytes == 0


def test_a_repository_of_variants_alone_has_a_card_of_its_own(
    hub: HubServer, passed: Path, gguf: Path
) -> None:
    """It has the tags of all, and no artifact at its root."""
    quantkit.publish(passed, repo=REPO, variant="w8a16")
    quantkit.publish(gguf, repo=REPO, variant="Q8_0")
    card = hub.files(REPO)["README.md"]
    assert {"w8a16", "gguf", "Q8_0"} <= set(front_matter(card)["tags"])
    assert "## Variants" in card.decode()
    assert "config.json" not in hub.files(REPO)


def test_the_parts_of_a_split_file_stay_together(hub: HubServer, tmp_path: Path) -> None:
    """At the root, by the names that llama.cpp looks for; a copy verifies."""
    from huggingface_hub import snapshot_download

    split = {"format": "gguf", "type": "F16", "max_shard_bytes": 2_000_000}
    quantkit.publish(make_output(tmp_path, split), repo=REPO)
    parts = sorted(name for name in hub.files(REPO) if name.startswith("model-F16"))
    assert len(parts) > 1
    assert parts == [
        f"model-F16-{number + 1:05}-of-{len(parts):05}.gguf" for number in range(len(parts))
    ]
    folder = Path(snapshot_download(REPO, local_dir=tmp_path / "down"))
    assert quantkit.verify(folder / parts[0]).problems == ()


def test_several_artifacts_keep_their_folders(hub: HubServer, tmp_path: Path) -> None:
    """Each with a card, and one at the root that lists them; a copy verifies."""
    from huggingface_hub import snapshot_download

    make_pico_model(tmp_path / "model")
    both = make_output(
        tmp_path, {"format": "compressed-tensors"}, {"format": "gguf", "type": "F16"}
    )
    found = quantkit.publish(both, repo=REPO)
    files = hub.files(REPO)
    assert {"quantkit.json", "compressed-tensors/README.md", "gguf/model-F16.gguf"} <= set(files)
    assert f"llama-server -hf {REPO}:F16" in files["README.md"].decode()
    assert found.serve.endswith("vllm serve pico-w8/compressed-tensors")
    folder = Path(snapshot_download(REPO, local_dir=tmp_path / "down"))
    for name in ("compressed-tensors", "gguf"):
        assert quantkit.verify(folder / name).problems == ()
        assert quantkit.inspect(folder / name).verdict == "PASS"


def test_a_name_that_publishing_writes_is_not_taken_from_an_artifact(
    hub: HubServer, output: Path
) -> None:
    """One of the two would be lost."""
    path = output / "compressed-tensors" / "quantkit.json"
    path.write_text("{}")
    rows = read_evidence(output)["artifacts"]
    rows[0]["files"]["quantkit.json"] = hashlib.sha256(b"{}").hexdigest()
    edit_evidence(output, artifacts=rows)
    with pytest.raises(PublishError, match=r"names quantkit\.json, which publishing writes"):
        quantkit.publish(output, repo=REPO)


def test_a_report_that_cannot_be_shown_is_refused(hub: HubServer, output: Path) -> None:
    """In one line, although its figures pass."""
    path = output / "report" / "report.json"
    document = json.loads(path.read_text())
    document["layers"][0]["relative_error"] = "large"
    path.write_text(json.dumps(document))
    with pytest.raises(PublishError, match=r"not a report of a job \(.*relative_error is 'large'"):
        quantkit.publish(output, repo=REPO)
