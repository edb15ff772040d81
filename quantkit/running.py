"""Work in an output's partial folder: under its lock, and kept only where a job can go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from quantkit.errors import (
    CheckpointError,
    ResourceError,
    is_out_of_memory,
    machine_errors,
    machine_trouble,
)
from quantkit.locking import LOCK, Hold, locked
from quantkit.ranks import Ranks
from quantkit.records import Event, Progress
from quantkit.staging import check_output, clear, discard, partial_of

_WORTH_KEEPING = ("block-*", "fisher-*", "statistics-*", "allocation.json")
"""What a resumed job need not do again."""


def silent(_: Event) -> None:
    """Progress that nobody watches."""


@contextmanager
def staged(output: Path, *, overwrite: bool, tell: Progress = silent) -> Iterator[Path]:
    """Fill `<output>.partial` under its lock; keep it only where a job can go on from it.

    Of what an earlier job left, solved blocks alone are there. A job enters this before anything
    that takes long: a second one on the output is refused at once and not after hours.

    Raises:
        OutputError: the output exists or cannot be made, or another job works on it.
        ResourceError: a disk is full or has failed, or too many files are open.
    """
    with machine_errors(), _staged(output, overwrite, tell) as partial:
        yield partial


@contextmanager
def _staged(output: Path, overwrite: bool, tell: Progress) -> Iterator[Path]:
    check_output(output, overwrite=overwrite)
    partial = partial_of(output)
    existed = partial.exists()
    made = [place for place in _and_above(output.parent) if not place.exists()]
    with _locked(partial, tell) as hold:
        try:
            # Another job may have finished the same output in the meantime.
            check_output(output, overwrite=overwrite)
            clear(partial)
            yield partial
        except BaseException as error:
            # Only a damaged checkpoint makes solved blocks worthless: its files have to change. One
            # that cannot be read because the disk fails is not damaged.
            damaged = isinstance(error, CheckpointError) and machine_trouble(error) is None
            kept = any(
                path for name in _WORTH_KEEPING for path in (partial / "workspace").glob(name)
            )
            resumable = kept and (existed or not damaged)
            # Behind the commit it may be the next job's.
            if not resumable and hold.is_there():
                discard(partial)
                _remove_empty(made)
            raise


def staged_by_first(
    ranks: Ranks, output: Path, *, overwrite: bool, tell: Progress
) -> AbstractContextManager[Path]:
    """As `staged`, in the first of several processes alone: the others write nothing.

    They may be on other machines, and a lock of theirs would keep the first one out.
    """
    if not ranks.leads:
        return nullcontext(partial_of(output))
    return staged(output, overwrite=overwrite, tell=tell)


@contextmanager
def alone_in(folder: Path, tell: Progress = silent) -> Iterator[None]:
    """Hold the lock of a folder that fills while others read it, as that of a sweep.

    The lock's file goes at the end, and a folder in which there is nothing.

    Raises:
        OutputError: another job works there, or the folder cannot be made.
    """
    made = [place for place in _and_above(folder) if not place.exists()]
    with _locked(folder, tell):
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink(missing_ok=True)
            _remove_empty(made)


@contextmanager
def _locked(folder: Path, tell: Progress) -> Iterator[Hold]:
    """Hold the lock of a folder, and tell where it is not as it should be."""
    with locked(folder) as hold:
        if hold.note is not None:
            tell(Event("lock", 1, 1, hold.note))
        yield hold


def _and_above(folder: Path) -> tuple[Path, ...]:
    return (folder.absolute(), *folder.absolute().parents)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders that were made for the output, the deepest first, unless others use them."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def memory_errors() -> Iterator[None]:
    """Say what to do when memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            "not enough memory: lower calibration.samples or calibration.sequence_length "
            f"({str(error).splitlines()[0] if str(error) else 'allocation refused'})"
        ) from error
