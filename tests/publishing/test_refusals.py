"""What the Hub refuses is said with what to do about it, and without anything secret."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

import quantkit
from quantkit.cli.main import main
from quantkit.errors import HubError, PublishError, QuantkitError
from tests.hub import (
    COMMIT,
    CREATE_REPO,
    IDLE_TOKEN,
    LFS_BATCH,
    LFS_PUT,
    OTHER_TOKEN,
    PREUPLOAD,
    READ_TOKEN,
    UNKNOWN_TOKEN,
    WRITE_TOKEN,
    HubServer,
    refuse_with,
    storage_full,
)
from tests.hub.faults import Fault
from tests.publishing.outputs import edit_evidence, read_evidence

REPO = "alice/pico-w8"


def connect(hub: HubServer, patch: pytest.MonkeyPatch, folder: Path, token: str | None) -> None:
    """Let this process have another token than alice's."""
    hub.connect(patch, folder / "home", token)


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("hf_tokenOfÅlice", "the token holds characters that no token has; log in with `hf auth"),
        (None, "there is no token; log in with `hf auth login`, or set HF_TOKEN"),
        (UNKNOWN_TOKEN, "does not accept the token: it was revoked or has expired.*hf auth login"),
        (READ_TOKEN, "the token may only read; take one with the right to write"),
        (IDLE_TOKEN, "is no account that the token may make it in|the token may not do that"),
        (OTHER_TOKEN, "alice is no account that the token may make it in.*may in: bob"),
    ],
)
def test_a_token_without_the_right_is_refused_before_anything_is_sent(
    token: str | None,
    words: str,
    hub: HubServer,
    passed: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """And the message says which token would do."""
    connect(hub, monkeypatch, tmp_path, token)
    with pytest.raises(PublishError, match=words):
        quantkit.publish(passed, repo=REPO)
    assert not hub.find_requests(f"{LFS_PUT}|{COMMIT}|{PREUPLOAD}")


def test_a_repository_of_others_is_not_written_to(hub: HubServer, passed: Path) -> None:
    """One may see it, and propose a change."""
    hub.add_repo("bob/pico")
    with pytest.raises(PublishError, match=r"the token may not do that.*may write to bob/pico"):
        quantkit.publish(passed, repo="bob/pico")


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (refuse_with(401, COMMIT), PublishError, "could not commit.*does not accept the token"),
        (refuse_with(403, CREATE_REPO), PublishError, "could not make .*the token may not do that"),
        (refuse_with(404, PREUPLOAD), PublishError, "could not send .* is not there"),
        (refuse_with(409, COMMIT), PublishError, "could not commit.*it is there already"),
        (refuse_with(500, COMMIT), HubError, "could not commit.*status 500.*goes on"),
        (storage_full(LFS_BATCH), PublishError, "could not send .*storage limit reached"),
        (refuse_with(403, LFS_PUT), HubError, "the Hub's storage answered with status 403"),
    ],
    ids=["401", "403", "404", "409", "500", "full", "storage"],
)
def test_a_refusal_on_the_way_leaves_nothing_to_see(
    fault: Fault, kind: type[QuantkitError], words: str, hub: HubServer, passed: Path
) -> None:
    """Whatever step it meets."""
    hub.fail(fault)
    with pytest.raises(kind, match=words) as caught:
        quantkit.publish(passed, repo=REPO)
    assert "\n" not in str(caught.value)
    assert hub.files(REPO) == {}


@pytest.mark.parametrize(
    ("request_kind", "words"),
    [
        ({"repo": "pico"}, "OWNER/NAME"),
        ({"repo": "alice/../bob"}, "OWNER/NAME"),
        ({"repo": "https://huggingface.co/alice/pico"}, "OWNER/NAME"),
        ({"repo": REPO, "variant": "a/b"}, "--variant 'a/b' is no name"),
        ({"repo": REPO, "variant": "report"}, "--variant 'report' is no name"),
        ({"repo": REPO, "revision": "../x"}, "--revision '../x' is no name"),
        ({"repo": REPO, "alias": "main"}, "--alias main"),
        ({"repo": REPO, "tag": "v1", "pull_request": True}, "--pull-request goes without --tag"),
        ({"repo": REPO, "tag": "v1", "alias": "v1"}, "must be different names"),
    ],
)
def test_wrong_names_are_refused_at_once(
    request_kind: dict[str, object], words: str, hub: HubServer, passed: Path
) -> None:
    """Without a question to the Hub."""
    with pytest.raises(PublishError, match=words):
        quantkit.publish(passed, **request_kind)  # type: ignore[arg-type]
    assert not hub.requests


def test_the_token_is_in_no_file_log_or_exception(
    hub: HubServer,
    passed: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    hurried: list[float],
) -> None:
    """Even where the Hub repeats it in its answer, and with every log on."""
    caplog.set_level(logging.DEBUG)
    said = f"the token {WRITE_TOKEN} of Bearer {WRITE_TOKEN} is not good for https://x?sig=abc"
    hub.fail(refuse_with(500, LFS_PUT, times=3))
    hub.fail(refuse_with(403, COMMIT, message=said))
    with pytest.raises(PublishError, match="the token may not do that") as caught:
        quantkit.publish(passed, repo=REPO)
    told = "".join(traceback.format_exception(caught.value))
    chain = []
    error: BaseException | None = caught.value
    while error is not None:
        chain.append(repr(error) + repr(vars(error)))
        error = error.__cause__ or error.__context__
    printed = capfd.readouterr()
    logs = "".join(f"{record.getMessage()}{record.args}" for record in caplog.records)
    for text in (told, *chain, printed.out, printed.err, logs):
        assert WRITE_TOKEN not in text
        assert "signature=" not in text
    assert len(chain) == 1

    hub.recover()
    quantkit.publish(passed, repo=REPO)
    for content in hub.files(REPO).values():
        assert WRITE_TOKEN.encode() not in content


def test_a_token_in_the_recipe_does_not_go_along(hub: HubServer, output: Path) -> None:
    """It has no business there; once published it would be everybody's."""
    recipe = read_evidence(output)["recipe"]
    edit_evidence(output, recipe={**recipe, "text": f"# HF_TOKEN={WRITE_TOKEN}\nversion: 1\n"})
    quantkit.publish(output, repo=REPO)
    for path, content in hub.files(REPO).items():
        assert WRITE_TOKEN.encode() not in content, path
    assert b"HF_TOKEN=[token]" in hub.files(REPO)["README.md"]


def test_the_command_says_where_it_went_and_nothing_secret(
    hub: HubServer, passed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A dry run, a refusal, a publication and a move."""

    def run(*words: str) -> tuple[int, list[str], list[str]]:
        code = main(["publish", "--repo", REPO, *words])
        printed = capfd.readouterr()
        assert WRITE_TOKEN not in printed.out + printed.err
        return code, printed.out.splitlines(), printed.err.splitlines()

    code, lines, told = run(str(passed), "--dry-run", "--quiet")
    assert (code, told) == (0, [])
    assert any(line.split()[0] == "README.md" for line in lines if line)
    assert any(line.endswith("large file (LFS)") for line in lines)
    assert lines[-1] == "nothing was sent: this was a dry run"

    hub.fail(refuse_with(403, COMMIT))
    code, lines, told = run(str(passed))
    assert (code, lines) == (2, [])
    assert "the token may not do that" in told[-1]

    hub.recover()
    code, lines, told = run(str(passed), "--alias", "stable")
    assert code == 0, told
    assert lines[-2:] == [f"url      {hub.endpoint}/{REPO}", f"serve    vllm serve {REPO}"]
    assert any(line.startswith("alias    stable  new → ") for line in lines)

    code, lines, _ = run("--alias", "stable", "--at", "main", "--json", "--quiet")
    assert code == 0
    moved = json.loads("\n".join(lines))
    assert moved["before"] == moved["after"] == hub.repos[REPO].refs["refs/heads/main"]

    code, _, told = run("--tag", "v1")
    assert (code, told[-1]) == (
        2,
        "error: name the OUTPUT to publish, or the --alias to move",
    )


def test_publishing_needs_no_torch(passed: Path) -> None:
    """A machine that uploads need not be one that computes."""
    probe = (
        "import sys; from quantkit.cli.main import main;"
        f"code = main(['publish', {str(passed)!r}, '--repo', 'a/b', '--dry-run', '--json']);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "HF_HUB_OFFLINE is set" in json.loads(done.stdout)["notes"][0]
