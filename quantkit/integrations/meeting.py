"""The processes of a training, of which one does a job while the others wait."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")

_PATIENCE = timedelta(days=30)
"""A job takes what it takes; where its process dies, the connection tells the others at once."""


class Meeting:
    """All processes of a training; alone, it meets itself.

    They have a process group of their own: the collectives of the training's group give up after
    ten to thirty minutes, and on GPUs they wait on the device. gloo's wait on the processor.
    """

    def __init__(self) -> None:
        joined = distributed.is_available() and distributed.is_initialized()
        self._group: Any = None
        if joined and distributed.get_world_size() > 1:
            self._group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        self.leads = self._group is None or distributed.get_rank() == 0
        """Whether this is the process that does the jobs."""

    def share(self, value: T) -> T:
        """Return on every process what the first one has; all wait until it comes.

        Raises:
            RuntimeError: the first process has ended.
        """
        if self._group is None:
            return value
        box: list[Any] = [value if self.leads else None]
        distributed.broadcast_object_list(box, src=0, group=self._group)
        found: T = box[0]
        return found

    def leave(self) -> None:
        """Give the connections back; all processes do it."""
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None
