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
    ├── ResourceError             5  not enough memory or disk
    ├── HubError                  6  the Hub cannot be reached, is busy or broke off
    ├── TrackingError             6  a tracking server cannot be reached, or refuses what it is sent
    └── Interrupted             130  stopped by the user; the job can go on

A message is one line a problem: what is wrong, where, and what to do about it.
"""

from __future__ import annotations

import difflib
import errno
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class QuantkitError(Exception):
    """Root of the tree; `exit_code` is what the command line returns."""

    exit_code = 1


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
        self.problems = tuple(problems)
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
    """Memory or disk ran out, or would."""

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


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest of `choices`, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` raised while `path` is written into the error that the user should see.

    Raises:
        ResourceError: the disk, the quota or the file size limit is exhausted.
        OutputError: any other refusal of the operating system.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise ResourceError(
                f"no space left while writing {path}{_tell_free(path)}: free some space or choose "
                f"another --output"
            ) from error
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
