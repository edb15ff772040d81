"""An output folder appears whole or not at all: it is filled as `<output>.partial` and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from pathlib import Path

from quantkit.durable import exchange, make_folder, sync, sync_tree
from quantkit.errors import OutputError, ResourceError, writing
from quantkit.locking import CLAIM, LOCK, LOCK_FILES, locked

STATISTICS = "statistics.json"
"""The file that says what a folder of statistics holds."""

PARTS_OF_SAVED = LOCK_FILES | {"model"}
"""What lies in the folder that a model in memory is written into."""

_OUTPUT_MARKS = (
    {"quantkit.json"},
    {"report.json", "report.md", "report.html", "junit.xml"},
    {STATISTICS, "windows.safetensors"},
)
"""Files that together mark a folder as an output of `quantize`, of `gate`, or of `calibrate`."""

_PARTIAL_MARKS = ({LOCK}, {CLAIM}, *_OUTPUT_MARKS)
"""The same for a folder that is being filled."""

_WORKSPACE = "workspace"
_REPLACED = "replaced"
"""In the workspace: an old output that makes room for the new one, and goes with the rest."""

_RESUMED = LOCK_FILES | {_WORKSPACE}
"""What a job goes on with of what another left in the folder that is filled."""


def partial_of(output: Path) -> Path:
    """The folder that is filled before it becomes `output`."""
    return output.with_name(f"{output.name}.partial")


def existing_folder(folder: Path) -> Path:
    """Return the folder, or what there is of it: the nearest of those above it."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def held_bytes(output: Path) -> int:
    """Bytes on the disk that an unfinished job of the output has taken already."""
    total = 0
    for place, _, names in os.walk(partial_of(output)):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


def gate_output(
    artifact: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> Path:
    """Where `gate` puts its reports: `output`, by default `<artifact>.gate`."""
    if output is not None:
        return Path(output)
    folder = Path(artifact)
    if not _has_name(folder):
        folder = folder.resolve()
    return folder.parent / f"{folder.name}.gate"


def _has_name(path: Path) -> bool:
    """Whether a path ends in a name of its own, as `.` and `..` do not."""
    return path.name not in ("", "..")


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists or cannot be made, before any work.

    Of a job that was killed when its output stood in its place, the rest is done here.

    Raises:
        OutputError: it exists and `overwrite` is False; or it, or the folder that is filled before
            it, holds something that quantkit did not write; or no folder can be made there; or the
            job that made it is about to end.
    """
    if not _has_name(output):
        raise OutputError(f"output {str(output)!r} has no name of its own: name a folder to make")
    _put_back(output)
    if not output.is_symlink() and (output / LOCK).is_file() and _is_ours(output, _OUTPUT_MARKS):
        # The job may be at it still; or have done it in the meantime.
        with suppress(FileNotFoundError), locked(output, make=False):
            if _is_ours(partial_of(output), _OUTPUT_MARKS):
                _put_replaced_away(output)
            _finish_commit(output)
    if output.is_symlink() or output.exists():
        if not overwrite:
            raise _existing(output)
        if output.is_symlink() or not _is_ours(output, _OUTPUT_MARKS):
            raise OutputError(
                f"output {output} is not a folder that quantkit wrote: --overwrite leaves it alone"
            )
    partial = partial_of(output)
    if partial.is_symlink() or not _is_ours(partial, _PARTIAL_MARKS):
        raise OutputError(f"{partial} is in the way, and quantkit did not write it: move it")
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"output {output} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"output {output} cannot be made: no permission to write in {parent}")


def _existing(output: Path) -> OutputError:
    return OutputError(f"output {output} exists: choose another --output, or pass --overwrite")


def _is_ours(folder: Path, marks: Sequence[AbstractSet[str]]) -> bool:
    """Whether replacing a folder loses nothing but what quantkit wrote, or nothing at all.

    Looked at twice: a job may replace and remove it while its names are read.
    """
    for _ in range(2):
        try:
            names = set(os.listdir(folder))
        except FileNotFoundError:
            return True
        except NotADirectoryError:
            # A file; or it lies below one, of which more is said elsewhere.
            return not os.path.lexists(folder)
        if not names or any(mark <= names for mark in marks):
            return True
    return False


def clear(partial: Path) -> None:
    """Remove what an earlier job wrote and a later one writes again, or no longer wants.

    Raises:
        OutputError: it cannot be removed.
    """
    with writing(partial):
        for path in sorted(partial.iterdir()):
            if path.name not in _RESUMED:
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def commit(partial: Path, output: Path, *, overwrite: bool) -> None:
    """Make the finished `partial` the output, in place of one that was to be overwritten.

    All of it is on the disk before it gets its name. The workspace goes after that: a job that is
    killed here either has its blocks still or is done.

    Raises:
        ResourceError, OutputError: the rename failed, or an output has appeared that was not to be
            overwritten; `partial` and the old output stay.
    """
    if not overwrite and os.path.lexists(output):
        raise _existing(output)
    with writing(output):
        sync_tree(partial)
        if not output.exists():
            partial.rename(output)
        elif not exchange(partial, output):
            with _moved_aside(output, partial):
                partial.rename(output)
        sync(output.parent)
        _put_replaced_away(output)
        _finish_commit(output)


def _finish_commit(output: Path) -> None:
    """Remove the workspace with what the output has replaced, and the lock, which marks them."""
    rest = output / _WORKSPACE
    shutil.rmtree(rest, ignore_errors=True)
    with suppress(OSError):
        if rest.exists():
            # The next job removes it, by the lock's file, which nobody holds any more then.
            (output / CLAIM).unlink(missing_ok=True)
            return
        _remove_lock(output)
        sync(output)


def _put_replaced_away(output: Path) -> None:
    """Put what the output has changed places with into its workspace, which goes.

    At one stroke: half of what was replaced would be nobody's. A job that has begun in it holds its
    lock, and keeps it; what cannot be put away is the next job's to clear.
    """
    replaced, aside = partial_of(output), output / _WORKSPACE / _REPLACED
    if replaced.is_symlink() or not replaced.is_dir():
        return
    with suppress(OSError, OutputError, ResourceError):
        aside.parent.mkdir(exist_ok=True)
        with locked(replaced):
            replaced.rename(aside)


@contextmanager
def _moved_aside(output: Path, partial: Path) -> Iterator[None]:
    """Make room for a new output; the old one goes only when that stands in its place."""
    aside = partial / _WORKSPACE / _REPLACED
    make_folder(aside.parent)
    output.rename(aside)
    try:
        yield
    except BaseException:
        aside.rename(output)
        raise


def _put_back(output: Path) -> None:
    """Give an old output its name again, whose job was killed between the two renames."""
    partial = partial_of(output)
    aside = partial / _WORKSPACE / _REPLACED
    if aside.is_dir() and not (output.is_symlink() or output.exists()):
        with suppress(FileNotFoundError), locked(partial, make=False), writing(output):
            aside.rename(output)


def discard(partial: Path) -> None:
    """Remove what a refused job left; the lock last, which marks the folder as quantkit's."""
    with suppress(OSError):
        for path in partial.iterdir():
            if path.name not in LOCK_FILES:
                _remove(path)
        _remove_lock(partial)
        partial.rmdir()


def _remove_lock(folder: Path) -> None:
    """Remove the lock, then what stands for it: who made that first would have no lock to show."""
    for name in (LOCK, CLAIM):
        (folder / name).unlink(missing_ok=True)
