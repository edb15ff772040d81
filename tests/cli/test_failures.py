"""What each kind of failure means to the shell."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable

import pytest

from quantkit import errors
from quantkit.cli import main as program
from quantkit.cli.console import Reply


def answer(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object], *arguments: str) -> int:
    """Exit code of the program whose command does `run`."""
    monkeypatch.setattr(program, "_run", lambda _: run())
    return program.main(arguments or ("quantize", "--recipe", "a b.yaml"))


def raiser(error: BaseException) -> Callable[[], object]:
    """A command that fails with `error`."""

    def run() -> object:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "exit_code", "expected"),
    [
        (errors.RecipeError("r.yaml:3: unknown key"), 2, "error: r.yaml:3: unknown key\n"),
        (
            errors.PlanError(["a", "b"]),
            2,
            "error: 2 problems found before any work:\n  - a\n  - b\n",
        ),
        (errors.WorkerError("the worker died"), 3, "error: the worker died\n"),
        (errors.ResourceError("disk"), 5, "error: disk\n"),
        (MemoryError(), 5, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 5, "error: out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 5, "error: no space left"),
        (OSError(errno.EIO, "Input/output error", "x"), 5, "error: the disk has failed at x"),
        (OSError(errno.EMFILE, "Too many open files", "x"), 5, "error: too many open files at x"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300),
            2,
            f"error: '{'x' * 60}'... is longer than names of files are\n",
        ),
        (errors.Interrupted("stopped"), 130, "error: interrupted"),
        (KeyboardInterrupt(), 130, "goes on: quantkit quantize --recipe 'a b.yaml'\n"),
    ],
)
def test_a_foreseen_failure_is_one_message_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    exit_code: int,
    expected: str,
) -> None:
    """And the exit code that the documentation names."""
    assert answer(monkeypatch, raiser(error)) == exit_code
    shown = capsys.readouterr()
    assert expected in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    "error", [KeyError("x"), BrokenPipeError(), RuntimeError("shape"), OSError(errno.EBADF, "fd")]
)
def test_a_defect_shows_its_traceback_and_exits_with_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    """A broken pipe to a worker is a defect too: only our own stdout may close quietly."""
    assert answer(monkeypatch, raiser(error)) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert type(error).__name__ in shown
    assert "this is a defect of quantkit" in shown.splitlines()[-1]


def test_torch_running_out_of_memory_is_a_lack_of_resources(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the GPU it has an exception of its own."""
    import torch

    assert answer(monkeypatch, raiser(torch.OutOfMemoryError("CUDA out of memory"))) == 5
    assert "out of memory" in capsys.readouterr().err


def test_every_failure_is_a_document_with_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a defect, whose traceback goes to stderr."""
    for error, exit_code in ((errors.OutputError("exists"), 2), (KeyError("x"), 1)):
        assert answer(monkeypatch, raiser(error), "plan", "--json") == exit_code
        document = json.loads(capsys.readouterr().out)
        assert document["exit_code"] == exit_code
        assert document["error"]


def test_what_libraries_print_does_not_disturb_the_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes to stderr."""

    def run() -> Reply:
        print("a library says hello")
        return Reply({"done": True}, [])

    assert answer(monkeypatch, run, "plan", "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"done": True}
    assert "hello" in shown.err


def test_termination_is_an_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM, as a batch system sends it, leaves a job that goes on; the handler is put back."""
    before = signal.getsignal(signal.SIGTERM)

    def run() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    assert answer(monkeypatch, run) == 130
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
