"""Every error that quantkit raises on purpose, and the exit code that each one means.

    QuantkitError                 1  a defect of ours unless a subclass says otherwise
    ├── InputError                2  the user's recipe, model, data or arguments
    │   ├── RecipeError              the recipe cannot be read or does not validate
    │   │   └── NotYetError          a known key or value whose feature is not built yet
    │   ├── PlanError                the recipe does not fit the checkpoint; lists every problem
    │   ├── CheckpointError          a model folder or file that is missing, damaged or refused
    │   ├── CalibrationError         calibration or evaluation data that cannot be used
    │   ├── ArtifactError            an artifact that cannot be read
    │   ├── OutputError              an output that exists or cannot be written
    │   ├── PublishError             what must not be published, or a repository that refuses it
    │   └── MissingPackageError      an optional package is absent; carries the install line
    ├── WorkerError               3  a runtime worker died, hung or answered nonsense
    ├── ResourceError             5  not enough memory, disk or open files, or a disk that fails
    ├── HubError                  6  the Hub cannot be reached, is busy or broke off
    ├── TrackingError             6  a tracking server cannot be reached, or refuses what it is sent
    └── Interrupted             130  stopped by the user; the job can go on

A message is one line a problem: what is wrong, where, and what to do about it.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NoReturn

from quantkit.masking import hide_beginning, hide_tokens

LONGEST_LINE = 1500
"""Characters of a line of a message: a file may have a value of any length, which it quotes."""
_LONGEST_WORD = 200
"""Characters of a word that is compared with names: the time grows with their square."""
_MOST_CHOICES = 2000
"""Names that it is compared with."""


class QuantkitError(Exception):
    """Root of the tree; `exit_code` is what the command line returns.

    Whatever a message was made of, no secret is in it, and its lines can be read.
    """

    exit_code = 1

    def __init__(self, *words: object) -> None:
        super().__init__(
            *(clean_message(each) if isinstance(each, str) else each for each in words)
        )


class InputError(QuantkitError):
    """Something that the user gave is wrong and the user can mend it."""

    exit_code = 2


class RecipeError(InputError):
    """The recipe cannot be read, or a key or value in it is wrong."""


class NotYetError(RecipeError):
    """The recipe asks for a feature of the design that is not built yet."""


class PlanError(InputError):
    """The recipe does not fit the checkpoint. `problems` holds one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(map(clean_message, problems))
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} found before any work:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


class CheckpointError(InputError):
    """A model folder or one of its files is missing, damaged or refused."""


class CalibrationError(InputError):
    """Calibration or evaluation data is missing, too small or unfit."""


class ArtifactError(InputError):
    """An artifact cannot be read or is not what it claims to be."""


class OutputError(InputError):
    """The output exists already, or its folder cannot be written."""


class PublishError(InputError):
    """An output that is not to be published, or a repository that it cannot go to."""


class MissingPackageError(InputError):
    """A feature needs a package that is not installed."""

    def __init__(self, package: str, feature: str, install: str) -> None:
        super().__init__(f"{feature} needs the package {package!r}: {install}")
        self.package = package


class WorkerError(QuantkitError):
    """A runtime worker died, hung or answered nonsense: the artifact is not proven."""

    exit_code = 3


class ResourceError(QuantkitError):
    """Memory, disk or open files ran out, or would; or the disk has failed."""

    exit_code = 5


class HubError(QuantkitError):
    """The Hub cannot be reached, is busy or broke off: the same command goes on later."""

    exit_code = 6


class TrackingError(QuantkitError):
    """A tracking server cannot be reached or refuses: what is finished can be logged later."""

    exit_code = 6


class Interrupted(QuantkitError):
    """The user stopped the job; the finished blocks are kept."""

    exit_code = 130


def clean_message(text: str) -> str:
    """Return what a message may show: without secrets, endless lines or what moves a cursor."""
    # All at once: some secrets have several lines.
    lines = hide_tokens("\n".join(map(_begin, text.split("\n")))).split("\n")
    return "\n".join(_shorten(printable(line.replace("\t", " "), keep="")) for line in lines)


def _begin(line: str) -> str:
    """All of a line that has an end in sight: of others there may be a hundred megabytes."""
    longest = 2 * LONGEST_LINE
    return line if len(line) <= longest else f"{hide_beginning(line, longest)}..."


def _shorten(line: str) -> str:
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."


def printable(text: str, keep: str = "\n") -> str:
    """Escape control characters but `keep`: texts quote bytes that strangers wrote."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else ascii(letter)[1:-1] for letter in text
    )


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest of `choices`, or an empty string."""
    if len(word) > _LONGEST_WORD:
        return ""
    short = [each for each in islice(choices, _MOST_CHOICES) if len(each) <= _LONGEST_WORD]
    close = difflib.get_close_matches(word, short, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether Python or torch refused memory; does not import torch."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    # torch's CPU allocator has no exception of its own.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _tell_free(path: Path) -> str:
    """How much its disk has left, which others may have filled; nothing where that is not known."""
    place = next((folder for folder in path.absolute().parents if folder.is_dir()), None)
    return f" ({shutil.disk_usage(place).free:,} bytes are free)" if place else ""


# EFBIG is what a file size limit (ulimit -f) answers with: the same trouble for the user.
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_FILES = {errno.EMFILE, errno.ENFILE}
_OF_MACHINE = _NO_SPACE | _NO_FILES | {errno.EIO}


def machine_trouble(error: BaseException, path: object = None) -> ResourceError | None:
    """Return what to say where the machine is to blame; None for any other error.

    Libraries raise errors of their own with the system's words in them, and ours may have blamed
    the file that could not be read.

    Args:
        path: what was worked on; by default what the system's error names.
    """
    if isinstance(error, InputError):
        return ResourceError(str(error)) if is_of_machine(error) else None
    if isinstance(error, QuantkitError):
        return None
    number = _find_number(error)
    if number not in _OF_MACHINE:
        return None
    if path is None:
        path = getattr(error, "filename", None) or str(error)
    if number in _NO_SPACE:
        free = _tell_free(path) if isinstance(path, Path) else ""
        return ResourceError(
            f"no space left while writing {path}{free}: free some space or choose another --output"
        )
    if number in _NO_FILES:
        return ResourceError(
            f"too many open files at {path}: raise the limit (ulimit -n), then run the same "
            f"command again"
        )
    return ResourceError(
        f"the disk has failed at {path} ({os.strerror(errno.EIO)}): see the system's log, mend the "
        f"disk or choose another, then run the same command again"
    )


def unreadable(
    path: object, error: OSError, kind: type[InputError] = CheckpointError
) -> QuantkitError:
    """Return what to raise where a file cannot be read.

    Those who judge take an error of a file for a finding about it, and must not where the machine
    is to blame: that is a ResourceError.
    """
    trouble = machine_trouble(error, path)
    return trouble or kind(f"cannot read {path}: {error.strerror or error}")


def blame_machine(error: BaseException) -> None:
    """Go no further where the machine is to blame for what would be taken for a finding.

    Raises:
        ResourceError: it is.
    """
    trouble = machine_trouble(error)
    if trouble is not None:
        raise trouble from error


def is_of_machine(error: BaseException) -> bool:
    """Whether the machine is to blame for an error, or for one that it comes from."""
    behind: BaseException | None = error
    while behind is not None and _find_number(behind) not in _OF_MACHINE:
        behind = behind.__cause__ or behind.__context__
    return behind is not None


def _find_number(error: BaseException) -> int | None:
    """The system's number of an error, or of the one whose words a library repeats.

    Other errors quote what a stranger wrote, which may be anything. So may those of libraries, but
    after a quotation mark.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if not _repeats_the_system(error):
        return None
    words = str(error)
    return next((number for number in sorted(_OF_MACHINE) if _tells(words, number)), None)


def _repeats_the_system(error: BaseException) -> bool:
    """Whether a library in C++ or Rust may have made it of a system's error."""
    safetensors = sys.modules.get("safetensors")
    return (
        isinstance(error, OSError | RuntimeError)
        # tokenizers has no class of its own.
        or type(error) is Exception
        or (safetensors is not None and isinstance(error, safetensors.SafetensorError))
    )


def _tells(words: str, number: int) -> bool:
    reason = re.escape(os.strerror(number))
    # As Python, Rust and torch say it; torch after the name of a file, which may have any letters.
    told = rf"(?:\[Errno {number}\] {reason}|{reason} \((?:os error )?{number}\))"
    return bool(re.match(rf"(?:[^'\"`]*?|unable to .*: ){told}", words, re.DOTALL))


def raise_alone(error: Exception) -> NoReturn:
    """Raise an error without what is being handled, even by a `with` further out, as its context.

    The exceptions of the Hub's client carry the request, and so the token; `from None` only hides
    them from tracebacks.

    Raises:
        Exception: `error`.
    """
    try:
        raise error
    finally:
        error.__context__ = None


@contextmanager
def machine_errors() -> Iterator[None]:
    """Turn what the machine is to blame for into the error that the user should see.

    Raises:
        ResourceError: a disk is full or fails, or too many files are open.
    """
    try:
        yield
    except Exception as error:
        trouble = machine_trouble(error)
        if trouble is None:
            raise
        raise trouble from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` raised while `path` is written into the error that the user should see.

    Raises:
        ResourceError: the disk, the quota, the file size limit or the number of open files is
            exhausted, or the disk has failed.
        OutputError: any other refusal of the operating system.
    """
    try:
        yield
    except OSError as error:
        trouble = machine_trouble(error, path)
        if trouble is not None:
            raise trouble from error
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
