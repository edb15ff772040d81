"""Work in an output's partial folder: under its lock, and kept only where a job can go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantkit.errors import CheckpointError, ResourceError, is_out_of_memory
from quantkit.records import Event
from quantkit.staging import check_output, clear, discard, partial_of
from quantkit.workspace import locked

_WORTH_KEEPING = ("block-*", "fisher-*", "statistics-*", "allocation.json")
"""What a resumed job need not do again."""


@contextmanager
def staged(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Fill `<output>.partial` under its lock; keep it only where a job can go on from it.

    Of what an earlier job left, solved blocks alone are there.

    Raises:
        OutputError: the output exists or cannot be made, or another job works on it.
    """
    check_output(output, overwrite=overwrite)
    partial = partial_of(output)
    existed = partial.exists()
    with locked(partial):
        try:
            # Another job may have finished the same output in the meantime.
            check_output(output, overwrite=overwrite)
            clear(partial)
            yield partial
        except BaseException as error:
            # Only a damaged checkpoint makes solved blocks worthless: its files have to change.
            kept = any(
                path for name in _WORTH_KEEPING for path in (partial / "workspace").glob(name)
            )
            resumable = kept and (existed or not isinstance(error, CheckpointError))
            if not resumable:
                discard(partial)
            raise


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


def silent(_: Event) -> None:
    """Progress that nobody watches."""
