"""The tree of errors: exit codes, messages, and what the operating system's refusals become."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from safetensors import SafetensorError

from quantkit import errors
from quantkit.errors import (
    CheckpointError,
    OutputError,
    PlanError,
    ResourceError,
    is_out_of_memory,
    machine_errors,
    nearest,
    writing,
)

EXIT_CODES = {
    "QuantkitError": 1,
    "InputError": 2,
    "RecipeError": 2,
    "NotYetError": 2,
    "PlanError": 2,
    "CheckpointError": 2,
    "CalibrationError": 2,
    "ArtifactError": 2,
    "OutputError": 2,
    "PublishError": 2,
    "MissingPackageError": 2,
    "WorkerError": 3,
    "ResourceError": 5,
    "HubError": 6,
    "TrackingError": 6,
    "Interrupted": 130,
}


def error_classes() -> dict[str, type[errors.QuantkitError]]:
    """All classes of the tree by name."""
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.QuantkitError)
    }


def test_every_error_has_its_exit_code() -> None:
    """Scripts rely on these numbers."""
    assert {name: value.exit_code for name, value in error_classes().items()} == EXIT_CODES


def test_the_drawn_tree_names_every_error() -> None:
    """The docstring is the map that readers use."""
    drawn = set(
        re.findall(r"\b[A-Z]\w+(?:Error|Interrupted)\b|\bInterrupted\b", errors.__doc__ or "")
    )
    assert drawn == set(error_classes())


def test_a_plan_error_lists_each_problem_on_a_line_of_its_own() -> None:
    """One look shows all that has to be mended."""
    error = PlanError(["q_proj: 65 columns", "no such layer"])
    assert error.problems == ("q_proj: 65 columns", "no such layer")
    assert str(error).splitlines() == [
        "2 problems found before any work:",
        "  - q_proj: 65 columns",
        "  - no such layer",
    ]


def test_one_problem_is_not_called_problems() -> None:
    """Small, and read by everybody."""
    assert str(PlanError(["x"])).startswith("1 problem found")


@pytest.mark.parametrize(
    ("word", "expected"),
    [("shceme", "; did you mean 'scheme'?"), ("qqqq", ""), ("", "")],
)
def test_only_a_near_name_is_suggested(word: str, expected: str) -> None:
    """A far-fetched suggestion would mislead."""
    assert nearest(word, ["scheme", "method"]) == expected


def test_a_message_is_lines_that_can_be_read() -> None:
    """Whatever a file has for a value: no endless line, nothing that moves a cursor."""
    error = errors.InputError(f"key {'x' * 100_000}\n\x1b[2J\ud800\ttab")

    first, second = str(error).split("\n")
    assert len(first) < 2000
    assert second == r"\x1b[2J\ud800 tab"


def test_endless_names_are_not_compared() -> None:
    """The time would grow with the square of their length."""
    assert nearest("a" * 1_000_000, ["b" * 1_000_000, "scheme"]) == ""
    assert nearest("shceme", ["b" * 1_000_000, "scheme"]) == "; did you mean 'scheme'?"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_lack_of_resources(number: int) -> None:
    """Exit code 5, not the user's mistake."""
    with (
        pytest.raises(ResourceError, match=r"no space left while writing out/x \([0-9,]+ bytes"),
        writing(Path("out/x")),
    ):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EMFILE, "too many open files at out/x: raise the limit"),
        (errno.ENFILE, "too many open files at out/x: raise the limit"),
        (errno.EIO, "the disk has failed at out/x"),
    ],
)
def test_a_machine_that_fails_is_not_the_mistake_of_the_user(number: int, words: str) -> None:
    """Exit code 5 too."""
    with pytest.raises(ResourceError, match=words), writing(Path("out/x")):
        raise OSError(number, os.strerror(number))


def test_what_libraries_make_of_a_failing_machine_is_known_again() -> None:
    """torch and safetensors repeat the system's words; our own errors have it as their cause."""
    words = "unable to open file <weights> in read-only mode: Too many open files (24)"
    with (
        pytest.raises(ResourceError, match=r"too many open files at .*<weights>"),
        machine_errors(),
    ):
        raise RuntimeError(words)
    cause = OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(ResourceError, match=r"^cannot read config\.json$"), machine_errors():
        raise CheckpointError("cannot read config.json") from cause
    with pytest.raises(CheckpointError), machine_errors():
        raise CheckpointError("config.json is missing")
    with pytest.raises(PermissionError), machine_errors():
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize(
    "behind",
    [
        ValueError("unknown key 'No space left on device'"),
        ValueError("[Errno 28] No space left on device"),
        CheckpointError("x: No space left on device (os error 28)"),
        OSError("unknown key 'No space left on device'"),
        RuntimeError("unknown key '[Errno 28] No space left on device'"),
        SafetensorError("unknown variant `No space left on device (os error 28)`, expected `F32`"),
    ],
    ids=repr,
)
def test_what_a_stranger_wrote_is_no_failure_of_the_machine(behind: Exception) -> None:
    """It is in the words of libraries that quote a file: exit code 2 then."""
    with pytest.raises(CheckpointError), machine_errors():
        raise CheckpointError(f"config.json does not validate: {behind}") from behind


@pytest.mark.parametrize(
    "behind",
    [
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("unable to write to file </it's/x>: No space left on device (28)"),
        RuntimeError("Data processing error: No space left on device (os error 28)"),
        OSError("cannot load: [Errno 28] No space left on device: 'x'"),
        Exception("No space left on device (os error 28)"),
    ],
    ids=repr,
)
def test_the_system_s_words_are_known_in_those_of_libraries(behind: Exception) -> None:
    """With its number, and before anything that is quoted."""
    with pytest.raises(ResourceError), machine_errors():
        raise CheckpointError("cannot be read") from behind


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_any_other_refusal_names_the_path_and_the_reason(number: int) -> None:
    """Exit code 2 with the system's own words."""
    with (
        pytest.raises(OutputError, match=f"cannot write out/x: {os.strerror(number)}"),
        writing(Path("out/x")),
    ):
        raise OSError(number, os.strerror(number))


def test_what_is_no_system_error_passes_through() -> None:
    """A defect is not dressed up as trouble with the disk."""
    with pytest.raises(KeyError), writing(Path("out/x")):
        raise KeyError("x")


def test_memory_that_ran_out_is_recognised() -> None:
    """Python and torch have three ways to say it; another RuntimeError is none of them."""
    import torch

    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 50)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shape"))
