"""The processes of one job, each a rank: `torchrun` starts them, and they share the work.

Every process runs the same stages in step. What they have to agree on goes through the functions
here, which do nothing for a process alone; all ranks have to call the same ones in the same order.
The first rank alone writes files and talks to the user: what the others raise is shown by it.

torch is imported where it is used, since `import quantkit` must not load it.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from quantkit.errors import (
    InputError,
    QuantkitError,
    ResourceError,
    WorkerError,
    is_out_of_memory,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

_MEETING = timedelta(minutes=10)
"""How long processes wait for each other at the start."""
_PATIENCE = timedelta(days=2)
"""How long one may wait for another later: the first may measure for hours what all go by."""


@dataclass(frozen=True)
class Ranks:
    """Which process this is, counted from 0, and how many there are."""

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def share(self, count: int, unit: int = 1) -> slice:
        """Return this rank's share of `count` things in a row, whole units but for the last one.

        Shares follow each other in the order of the ranks. There are empty ones where there are
        fewer units than ranks.
        """
        units = -(-count // unit)
        start, stop = (units * rank // self.size * unit for rank in (self.rank, self.rank + 1))
        return slice(start, min(stop, count))


ALONE = Ranks(0, 1)


def ranks_here(ranks: Ranks) -> int:
    """How many of the ranks run on this machine and share its memory, this one included.

    torchrun says it; without its word all of them may.
    """
    if ranks.size == 1:
        return 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))


class _LostError(ResourceError):
    """A rank did not answer: its process has ended, or the network has."""


def read_ranks() -> Ranks:
    """Return which process this is by torchrun's environment; `ALONE` without.

    Raises:
        InputError: there are several processes and no word of which one this is.
    """
    size, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK")
    if size == "1":
        return ALONE
    if not size.isdecimal() or rank is None or not rank.isdecimal() or int(rank) >= int(size):
        raise InputError(
            f"WORLD_SIZE={size} and RANK={rank or ''} do not say which of several processes this "
            f"is: start the job with torchrun, or unset both"
        )
    return Ranks(int(rank), int(size))


def _check_address() -> None:
    """Refuse to wait for other processes without knowing where they meet.

    Raises:
        InputError: the environment has no address and port.
    """
    place, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not place or not port.isdecimal():
        raise InputError(
            f"MASTER_ADDR={place or ''} and MASTER_PORT={port} do not say where the processes of "
            f"this job meet: start it with torchrun, or unset WORLD_SIZE and RANK"
        )


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Meet the other processes that torchrun has started; `ALONE` where it has not.

    The environment says who and where (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`,
    `LOCAL_RANK`). On a machine with CUDA each process of it takes the GPU of its local rank.

    Raises:
        InputError: the environment does not say where they meet.
        QuantkitError: what another rank has failed with, on the first rank.
        SystemExit: on the others, which leave it to the first to say why, with the exit code of
            the error.
        ResourceError: a rank has died.
    """
    ranks = read_ranks()
    if ranks.size == 1:
        yield ALONE
        return
    _check_address()
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    with _answered():
        store, _, _ = next(rendezvous("env://", timeout=_MEETING))
        # Of each job in the life of these processes its own: torchrun keeps the store.
        number = store.add(f"jobs of {ranks.rank}", 1)
        store = PrefixStore(f"job {number}", store)
    try:
        with _met(ranks, store):
            yield ranks
    except (KeyboardInterrupt, Exception) as error:
        raise _settle(error, ranks, store) from error


@contextmanager
def _met(ranks: Ranks, store: Store) -> Iterator[None]:
    """Be connected with the other ranks."""
    import torch
    from torch import distributed

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _answered():
        distributed.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=_PATIENCE
        )
    try:
        # After the meeting: before it nobody would hear why this rank fails.
        _take_device()
        yield
    except (KeyboardInterrupt, Exception) as error:
        # Before the others miss this rank.
        _leave_word(error, ranks, store)
        raise
    finally:
        distributed.destroy_process_group()


def _take_device() -> None:
    """Make the GPU of the local rank, if there are any, the one that is meant by `cuda`.

    Raises:
        InputError: there are more processes than GPUs.
    """
    import torch

    if not torch.cuda.is_available():
        return
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise InputError(
            f"{count} GPUs and more processes on this machine: pass --nproc-per-node {count}"
        )
    torch.cuda.set_device(local)


def _settle(error: BaseException, ranks: Ranks, store: Store) -> BaseException:
    """Return what this rank is to raise for an error of its own or of another rank.

    torchrun stops all ranks when one has failed; the first one finds out why, if there is word of
    it. The others are silent, unless it is about a defect, whose traceback belongs to where it is.
    """
    if ranks.leads:
        stopped = isinstance(error, _LostError | KeyboardInterrupt)
        return (_read_word(ranks, store) if stopped else None) or error
    if isinstance(error, KeyboardInterrupt):
        return SystemExit(130)
    if isinstance(error, QuantkitError):
        return SystemExit(error.exit_code)
    return error


def _leave_word(error: BaseException, ranks: Ranks, store: Store) -> None:
    """Let the first rank know why this one fails, unless it is because of yet another."""
    if ranks.leads or isinstance(error, _LostError | KeyboardInterrupt):
        return
    text, code = f"{type(error).__name__}: {error}", QuantkitError.exit_code
    if isinstance(error, QuantkitError):
        text, code = str(error), error.exit_code
    # The first rank may hold the store and have gone: nobody would read it.
    with suppress(RuntimeError):
        store.set(f"error of {ranks.rank}", json.dumps({"text": text, "exit_code": code}))


def _read_word(ranks: Ranks, store: Store) -> QuantkitError | None:
    """Return the error of the first rank that has left word of one."""
    for rank in range(1, ranks.size):
        key = f"error of {rank}"
        try:
            if not store.check([key]):
                continue
            word = json.loads(store.get(key))
        except RuntimeError:
            return None
        kind = {2: InputError, 3: WorkerError, 5: ResourceError}.get(
            word["exit_code"], QuantkitError
        )
        return kind(f"process {rank} of the job: {word['text']}")
    return None


@contextmanager
def _answered() -> Iterator[None]:
    """Say what it means that a rank does not answer."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise _LostError(
            "another process of this job has ended, or cannot be reached; the finished blocks are "
            f"kept, and the same command goes on ({str(error).splitlines()[0]})"
        ) from error


def sum_over(ranks: Ranks, tensor: Tensor) -> None:
    """Replace a tensor by its sum over the ranks, the same bits on each.

    Raises:
        ResourceError: a rank has died.
    """
    _reduce(ranks, tensor, "SUM")


def max_over(ranks: Ranks, tensor: Tensor) -> None:
    """Replace each element of a tensor by its largest over the ranks.

    Raises:
        ResourceError: a rank has died.
    """
    _reduce(ranks, tensor, "MAX")


def _reduce(ranks: Ranks, tensor: Tensor, operation: str) -> None:
    if ranks.size == 1:
        return
    from torch import distributed

    # Collectives read memory as it lies.
    whole = tensor.contiguous()
    with _answered():
        distributed.all_reduce(whole, getattr(distributed.ReduceOp, operation))
    if whole is not tensor:
        tensor.copy_(whole)


def gather(ranks: Ranks, value: T) -> list[T]:
    """Return what each rank has given, in the order of the ranks, on every rank.

    Args:
        value: anything that can be pickled; tensors on a GPU arrive on the receiver's own.

    Raises:
        ResourceError: a rank has died.
    """
    if ranks.size == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * ranks.size
    with _answered():
        distributed.all_gather_object(found, _encode(value))
    return [value if rank == ranks.rank else _decode(encoded) for rank, encoded in enumerate(found)]


def from_first(ranks: Ranks, make: Callable[[], T]) -> T:
    """Return what `make` returns on the first rank; on the others it is not called.

    Raises:
        ResourceError: a rank has died.
    """
    if ranks.size == 1:
        return make()
    from torch import distributed

    value = make() if ranks.leads else None
    sent: list[Any] = [_encode(value) if ranks.leads else None]
    with _answered():
        distributed.broadcast_object_list(sent, src=0)
    return value if ranks.leads else _decode(sent[0])  # type: ignore[return-value]


def _encode(value: object) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _decode(encoded: bytes) -> Any:
    """Read what another process of this job has written: not a stranger's pickle."""
    import torch

    def place(storage: Any, location: str) -> Any:
        return storage if location == "cpu" else storage.cuda()

    return torch.load(io.BytesIO(encoded), map_location=place, weights_only=False)
