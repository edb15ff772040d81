"""An output folder appears whole or not at all: it is filled as `<output>.partial` and renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from quantkit.durable import sync
from quantkit.errors import OutputError, writing

_OURS = ("quantkit.json", "report.json")


def partial_of(output: Path) -> Path:
    """The folder that is filled before it becomes `output`."""
    return output.with_name(f"{output.name}.partial")


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists or cannot be made, before any work.

    Raises:
        OutputError: it exists and `overwrite` is False; or it holds something other than an
            output of quantkit; or no folder can be made there.
    """
    if output.is_symlink() or output.exists():
        if not overwrite:
            raise OutputError(
                f"output {output} exists: choose another --output, or pass --overwrite"
            )
        ours = output.is_dir() and (
            not any(output.iterdir()) or any((output / name).is_file() for name in _OURS)
        )
        if output.is_symlink() or not ours:
            raise OutputError(
                f"output {output} is not a folder that quantkit wrote: --overwrite leaves it alone"
            )
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"output {output} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"output {output} cannot be made: no permission to write in {parent}")


def commit(partial: Path, output: Path) -> None:
    """Make the finished `partial` the output, in place of one that was to be overwritten.

    Raises:
        ResourceError, OutputError: the rename failed; `partial` stays.
    """
    replaced = output.with_name(f"{output.name}.replaced")
    with writing(output):
        shutil.rmtree(partial / "workspace", ignore_errors=True)
        (partial / "lock").unlink(missing_ok=True)
        sync(partial)
        shutil.rmtree(replaced, ignore_errors=True)
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
        sync(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def discard(partial: Path) -> None:
    """Remove what a refused job left."""
    shutil.rmtree(partial, ignore_errors=True)
