"""An output folder appears whole or not at all: it is filled as `<output>.partial` and renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from pathlib import Path

from quantkit.durable import exchange, sync, sync_tree
from quantkit.errors import OutputError, writing

STATISTICS = "statistics.json"
"""The file that says what a folder of statistics holds."""

PARTS_OF_SAVED = frozenset({"lock", "model"})
"""What lies in the folder that a model in memory is written into."""

_OUTPUT_MARKS = (
    {"quantkit.json"},
    {"report.json", "report.md", "report.html", "junit.xml"},
    {STATISTICS, "windows.safetensors"},
)
"""Files that together mark a folder as an output of `quantize`, of `gate`, or of `calibrate`."""

_PARTIAL_MARKS = ({"lock"}, *_OUTPUT_MARKS)
"""The same for a folder that is being filled."""

_RESUMED = frozenset({"lock", "workspace"})
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
            it, holds something that quantkit did not write; or no folder can be made there.
    """
    if not _has_name(output):
        raise OutputError(f"output {str(output)!r} has no name of its own: name a folder to make")
    if not output.is_symlink() and (output / "lock").is_file() and _is_ours(output, _OUTPUT_MARKS):
        _finish_commit(output)
    if output.is_symlink() or output.exists():
        if not overwrite:
            raise OutputError(
                f"output {output} exists: choose another --output, or pass --overwrite"
            )
        if output.is_symlink() or not _is_ours(output, _OUTPUT_MARKS):
            raise OutputError(
                f"output {output} is not a folder that quantkit wrote: --overwrite leaves it alone"
            )
    partial = partial_of(output)
    if partial.is_symlink() or (partial.exists() and not _is_ours(partial, _PARTIAL_MARKS)):
        raise OutputError(f"{partial} is in the way, and quantkit did not write it: move it")
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"output {output} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"output {output} cannot be made: no permission to write in {parent}")


def _is_ours(folder: Path, marks: Sequence[AbstractSet[str]]) -> bool:
    """Whether replacing a folder loses nothing but what quantkit wrote, or nothing at all."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or any(mark <= names for mark in marks)


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


def commit(partial: Path, output: Path) -> None:
    """Make the finished `partial` the output, in place of one that was to be overwritten.

    All of it is on the disk before it gets its name. The workspace goes after that: a job that is
    killed here either has its blocks still or is done.

    Raises:
        ResourceError, OutputError: the rename failed; `partial` and the old output stay.
    """
    with writing(output):
        sync_tree(partial)
        if not output.exists():
            partial.rename(output)
        elif not exchange(partial, output):
            with _moved_aside(output):
                partial.rename(output)
        sync(output.parent)
        _finish_commit(output)


def _finish_commit(output: Path) -> None:
    """Remove what the output has replaced, its workspace, and last the lock, which marks them."""
    replaced = partial_of(output)
    if replaced.is_dir() and not replaced.is_symlink() and not (replaced / "lock").exists():
        shutil.rmtree(replaced, ignore_errors=True)
    shutil.rmtree(output / "workspace", ignore_errors=True)
    with suppress(OSError):
        (output / "lock").unlink(missing_ok=True)
        sync(output)


@contextmanager
def _moved_aside(output: Path) -> Iterator[None]:
    """Make room for a new output; the old one goes only when that stands in its place."""
    aside = Path(tempfile.mkdtemp(prefix=f"{output.name}.replaced-", dir=output.parent))
    output.rename(aside)
    try:
        yield
    except BaseException:
        aside.rename(output)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def discard(partial: Path) -> None:
    """Remove what a refused job left; the lock last, which marks the folder as quantkit's."""
    with suppress(OSError):
        for path in partial.iterdir():
            if path.name != "lock":
                _remove(path)
    shutil.rmtree(partial, ignore_errors=True)
