"""A token planted anywhere is in no file, no line and no exception (docs/security.md)."""

from __future__ import annotations

import logging
import os
import queue
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import quantkit
from quantkit.checkpoint.source import resolve_source
from quantkit.cli import main as cli
from quantkit.environments.programs import run_program
from quantkit.errors import CheckpointError, PlanError, QuantkitError, TrackingError
from quantkit.integrations.mlflow_runs import answering, check_answers, plain_uri
from quantkit.judging.worker import WorkerProcess, child_environment
from quantkit.masking import find_secrets, hide_tokens, is_secret, masked_logs
from quantkit.publishing.client import open_hub
from quantkit.serving.records import ServeCommand
from quantkit.serving.starting import running_server
from tests.cli.running import run_here
from tests.hub import (
    COMMIT,
    CREATE_REPO,
    LFS_PUT,
    PREUPLOAD,
    RESOLVE,
    WRITE_TOKEN,
    HubServer,
    cut,
    lose_answer,
    refuse_with,
)
from tests.hub.faults import Fault
from tests.ports import free_port
from tests.publishing.outputs import judge
from tests.security.conftest import PLANTED, SECRETS, OddJob

REPO = "alice/pico-w8"
SAID = (
    f"{WRITE_TOKEN} of {SECRETS['VLLM_API_KEY']} at {SECRETS['PIP_INDEX_URL']}x?Signature=planted"
)
"""What an answer may say again."""
SHOW_ENVIRONMENT = (
    "import os; print(*os.environ.values(), sep='\\n', flush=True); raise SystemExit(7)"
)
"""A program that tells all that it was given."""


def check_clean(*texts: str) -> None:
    """Fail where one of the secrets is in a text."""
    for text in texts:
        assert not [word for word in PLANTED if word in text], text


def tell_chain(error: BaseException) -> list[str]:
    """Return all that an exception carries: texts, attributes, tracebacks, what came before it."""
    found = ["".join(traceback.format_exception(error))]
    current: BaseException | None = error
    while current is not None and not (current is not error and error.__suppress_context__):
        found.append(repr(current) + repr(vars(current)))
        current = current.__cause__ or current.__context__
    return found


def check_files(folder: Path) -> None:
    """Fail where one of the secrets is in a file or its name."""
    for path in folder.rglob("*"):
        check_clean(path.name)
        if path.is_file():
            content = path.read_bytes()
            assert not [word for word in PLANTED if word.encode() in content], path


@pytest.fixture
def hub(planted: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub, and a token for it."""

    with HubServer(multipart_above=500_000, part_bytes=400_000) as hub:
        hub.connect(monkeypatch, planted, WRITE_TOKEN)
        yield hub


@pytest.fixture
def address(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let HF_ENDPOINT have a password, which the client sends in place of the token."""
    from huggingface_hub import constants, hf_api

    address = hub.endpoint.replace("://", "://me:planted-at-the-hub@")
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    return address


@pytest.fixture(scope="module")
def passed(odd_job: OddJob) -> Path:
    """An output that may be published."""
    return judge(odd_job.result, "PASS", odd_job.root / "model").output


def test_the_environment_is_searched_for_secrets() -> None:
    """By the names of variables, in addresses, and in headers; paths and numbers are none."""
    found = find_secrets(
        {**SECRETS, "TOKEN_FILE": "/run/secrets/token", "SSH_KEY_BITS": "40961234"}
    )
    assert set(found) == {
        *(SECRETS[name] for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "VLLM_API_KEY")),
        *("planted%21of-mlflow", "planted!of-mlflow", "planted-password", "planted-of-a-proxy"),
        *("planted-of-a-collector", "planted-tenant", "planted-of-an-index"),
    }
    assert not is_secret("KEYBOARD", "de")
    assert is_secret("HTTP_PROXY", "http://a:b@host")


def test_no_error_of_the_package_says_a_secret(planted: Path) -> None:
    """Whatever it was made of."""
    for secret in (*SECRETS.values(), *find_secrets(SECRETS)):
        error: QuantkitError
        for error in (CheckpointError(f"at {secret}"), PlanError([f"at {secret}"])):
            check_clean(*tell_chain(error))
    check_clean(hide_tokens(f"Authorization: Basic {'bWU6cGxhbnRlZA==' * 2}, {SAID}"))


def test_a_traceback_on_the_terminal_says_no_secret(
    planted: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a defect, which nobody has foreseen."""

    def break_down(arguments: list[str]) -> None:
        try:
            raise ValueError(SAID)
        except ValueError as error:
            raise RuntimeError(f"asked for {SECRETS['MLFLOW_TRACKING_URI']}") from error

    monkeypatch.setattr(cli, "_run", break_down)
    assert cli.main(["doctor", "--json"]) == 1
    printed = capfd.readouterr()
    assert "Traceback" in printed.err
    assert "RuntimeError" in printed.out
    check_clean(printed.out, printed.err)


def test_what_is_logged_of_an_error_says_no_secret(
    planted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its traceback is somebody else's."""
    try:
        raise RuntimeError(SAID)
    except RuntimeError as error:
        with masked_logs():
            logging.getLogger("quantkit").warning("at %s:", SAID, exc_info=error)
    assert "RuntimeError" in caplog.text
    check_clean(caplog.text)


def test_no_file_of_a_job_has_a_secret(odd_job: OddJob) -> None:
    """Its evidence describes the machine, and the environment only as far as it is named."""
    check_files(odd_job.root)


@pytest.mark.parametrize(
    "fault",
    [
        refuse_with(401, COMMIT, message=SAID),
        refuse_with(403, CREATE_REPO, message=SAID),
        refuse_with(500, PREUPLOAD, message=SAID, times=9),
        refuse_with(403, LFS_PUT, message=SAID),
        cut(LFS_PUT, times=9),
        lose_answer(COMMIT, times=9),
        None,
    ],
    ids=["401", "403", "500", "storage", "reset", "lost", "inside"],
)
def test_a_failing_publish_says_no_secret(
    fault: Fault | None,
    hub: HubServer,
    passed: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither what it prints and logs, nor what is raised, nor a file; nor where it succeeds."""
    from quantkit.publishing import sending

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    caplog.set_level(logging.DEBUG)
    if fault is not None:
        hub.fail(fault)
    else:

        def break_down(file: object) -> None:
            raise RuntimeError(f"{SAID} while reading")

        monkeypatch.setattr(sending, "_make_addition", break_down)
    done = run_here("publish", passed, "--repo", REPO)
    assert done.returncode
    printed = capfd.readouterr()
    logs = "".join(f"{record.getMessage()}{record.args}" for record in caplog.records)
    check_clean(done.stdout, done.stderr, printed.out, printed.err, logs)
    if fault is not None:
        hub.recover()
        hub.repos.clear()
        hub.fail(fault)
        with pytest.raises(QuantkitError) as caught:
            quantkit.publish(passed, repo=REPO)
        check_clean(*tell_chain(caught.value))
    check_files(passed)


def test_the_password_of_an_address_is_not_shown(
    address: str, passed: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither by who publishes nor by who downloads."""
    assert address.replace("me:planted-at-the-hub@", "") == open_hub().endpoint
    caplog.set_level(logging.DEBUG)
    calls: tuple[Callable[[], object], ...] = (
        lambda: quantkit.publish(passed, repo=REPO),
        lambda: resolve_source(REPO),
    )
    for call in calls:
        with pytest.raises(QuantkitError) as caught:
            call()
        check_clean(*tell_chain(caught.value))
    printed = capfd.readouterr()
    logs = "".join(f"{record.getMessage()}{record.args}" for record in caplog.records)
    assert "HTTP Request" in logs
    check_clean(printed.out, printed.err, logs)


def test_what_is_published_and_said_of_it_has_no_secret(hub: HubServer, passed: Path) -> None:
    """Neither in the lines of the command nor in any file of the repository."""
    done = run_here("publish", passed, "--repo", REPO)
    assert done.returncode == 0, done.stderr
    check_clean(done.stdout, done.stderr)
    assert f"url      {hub.endpoint}/{REPO}" in done.stdout
    for content in hub.files(REPO).values():
        check_clean(content.decode("latin-1"))


@pytest.mark.parametrize(
    "fault",
    [
        refuse_with(401, r"/api/models/", message=SAID, times=9),
        refuse_with(403, RESOLVE, message=SAID, times=9),
        refuse_with(500, RESOLVE, message=SAID, times=99),
        lose_answer(RESOLVE, times=99),
        Fault(RESOLVE, times=99, cut_answer_after=1),
    ],
    ids=["401", "403", "500", "reset", "broken"],
)
def test_a_failing_download_says_no_secret(
    fault: Fault,
    hub: HubServer,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The client logs what it tries again, with the address."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    caplog.set_level(logging.DEBUG)
    hub.add_repo(REPO, {"config.json": b"{}", "model.safetensors": b"weights"})
    hub.fail(fault)
    done = run_here("estimate", REPO, folder=tmp_path)
    assert done.returncode
    with pytest.raises(QuantkitError) as caught:
        resolve_source(REPO)
    printed = capfd.readouterr()
    logs = "".join(f"{record.getMessage()}{record.args}" for record in caplog.records)
    check_clean(done.stdout, done.stderr, printed.out, printed.err, logs)
    check_clean(*tell_chain(caught.value))


def test_failing_tracking_says_no_secret(planted: Path) -> None:
    """Neither of the server's address nor of what its client says."""
    uri = SECRETS["MLFLOW_TRACKING_URI"]

    def fail() -> None:
        with answering(uri):
            raise RuntimeError(f"403 for {uri}: {SAID}")

    calls: tuple[Callable[[], object], ...] = (lambda: check_answers(uri), fail)
    for call in calls:
        with pytest.raises(TrackingError, match=r"MLflow at http://127.0.0.1:9") as caught:
            call()
        check_clean(*tell_chain(caught.value))
    assert plain_uri(uri) == "http://127.0.0.1:9/mlflow"


def test_a_program_that_tells_its_environment_is_not_quoted(planted: Path, odd_job: OddJob) -> None:
    """Pip, a server: they are given what they need, and may say it again."""
    lines: list[str] = []
    with pytest.raises(QuantkitError) as caught:
        run_program([sys.executable, "-c", SHOW_ENVIRONMENT], "cannot install", lines.append)
    assert any("[token]" in line for line in lines)
    check_clean(*lines, *tell_chain(caught.value))

    serve = make_serve_command(odd_job)
    said: list[str] = []
    with (
        pytest.raises(QuantkitError, match="exit code 7") as died,
        running_server(serve, timeout=60, tell=said.append),
    ):
        pass
    assert any("[token]" in line for line in said)
    check_clean(*said, *tell_chain(died.value), repr(serve))


def make_serve_command(odd_job: OddJob) -> ServeCommand:
    """A command that starts SHOW_ENVIRONMENT in place of a server."""
    from dataclasses import replace

    folder = odd_job.result.output / "compressed-tensors"
    serve = quantkit.serve_command(folder, "vllm", port=free_port(), gpu="H100")
    check_clean(repr(serve), serve.shell())
    return replace(serve, command=(sys.executable, "-c", SHOW_ENVIRONMENT), setup=())


def test_a_worker_is_given_no_secret_and_not_quoted_with_one(planted: Path) -> None:
    """It needs no network; what it finds elsewhere and says is hidden all the same."""
    given = child_environment(os.environ, 1)
    check_clean(*given.values())
    assert not set(SECRETS) & set(given)
    answers: queue.Queue[tuple[str, str | None]] = queue.Queue()
    script = f"import sys; print({SAID!r}, file=sys.stderr); raise SystemExit(7)"
    worker = WorkerProcess("candidate", [sys.executable, "-c", script], answers, 1)
    try:
        assert answers.get(timeout=60) == ("candidate", None)
        check_clean(*tell_chain(worker.death()))
    finally:
        worker.stop()


def test_a_gateway_names_variables_and_no_keys(planted: Path, odd_job: OddJob) -> None:
    """Whoever reads the configuration learns where the keys are."""
    folder = odd_job.result.output / "compressed-tensors"
    done = run_here("gateway", f"small={folder}", folder=odd_job.root)
    check_clean(done.stdout, done.stderr)


@pytest.mark.fuzz
@pytest.mark.skipif(os.environ.get("QUANTKIT_TRUST") != "full", reason="a part of `make fuzz`")
def test_the_doctor_says_no_secret(planted: Path) -> None:
    """It looks at everything, the runtimes too; which takes it a while."""
    done = run_here("doctor", "--json")
    assert done.stdout.startswith("{")
    check_clean(done.stdout, done.stderr)
