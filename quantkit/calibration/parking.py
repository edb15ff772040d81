"""Where suspended forwards keep what they hold: on the device, in RAM, or in a file.

A forward that is suspended (calibration/forwards.py) holds its tensors in the local variables of
its Python frames: the residual stream, the input of the group it waits at. What is over budget is
copied out byte by byte and the tensors' storages are emptied; before the forward goes on, the
storages get their bytes back. All views of a storage stay valid, nobody computes anything, and no
byte of the outcome depends on where it was kept.

A storage is left alone that is the model's own, or that two forwards hold.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import CO_OPTIMIZED
from pathlib import Path
from typing import IO, Any

import torch
from greenlet import greenlet
from torch import Tensor, UntypedStorage, nn

from quantkit.errors import CheckpointError, ResourceError, writing
from quantkit.numerics.memory import view_memory

_SMALL = 4096
"""Bytes of a storage that is not worth the way."""

_DEPTH = 3
"""Containers within containers: a call's keyword arguments, in it a tuple, in it tensors."""


@dataclass(frozen=True)
class Room:
    """How many bytes suspended forwards may hold, and where the rest goes.

    The first micro-batches stay where they are, further ones go one level down. On a CPU the
    device's memory is RAM, so `host_bytes` is the bound there and `device_bytes` says nothing.

    device_bytes: on the device; None: without a bound. host_bytes: in RAM; None: without a bound.
    folder: where a file is made for what exceeds RAM. It has no name there, so a job that is
    killed leaves none behind.
    """

    device_bytes: int | None = None
    host_bytes: int | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.host_bytes is not None and self.folder is None:
            raise ValueError("a bound for RAM needs a folder for what exceeds it")


def choose_room(
    device: torch.device,
    needed_bytes: int,
    folder: Path,
    processes: int = 1,
    most: int | None = None,
) -> Room:
    """Choose from what the machine has free how much suspended forwards may hold, and where.

    Half of what is free is theirs; blocks, statistics and solvers share the other half. There is
    no bound for what fits by far.

    Args:
        needed_bytes: what all of them hold at the most.
        folder: on the disk that takes what does not fit into RAM.
        processes: that share the machine's RAM, each of which chooses such a room.
        most: bytes of RAM that they may hold, whatever is free; None: without such a bound.
    """
    ram = free_ram()
    half = None if ram is None else ram // (2 * processes)
    bound = min((size for size in (half, most) if size is not None), default=None)
    host = None if bound is None or needed_bytes <= bound else bound
    if device.type != "cuda":
        return Room(host_bytes=host, folder=folder)
    free, _ = torch.cuda.mem_get_info(device)
    return Room(None if needed_bytes <= free // 2 else free // 2, host, folder)


def free_ram() -> int | None:
    """Bytes of RAM that the process may still take; None where the system does not say.

    What Linux calls available, or what is left of the process's control group where that is less.
    """
    found = [_available(Path("/proc/meminfo"))]
    for limit, used, stat in _CONTROL_GROUPS:
        found.append(_left_of_group(Path(limit), Path(used), Path(stat)))
    known = [size for size in found if size is not None]
    return min(known, default=None)


_GROUP = "/sys/fs/cgroup"
_CONTROL_GROUPS = (
    (f"{_GROUP}/memory.max", f"{_GROUP}/memory.current", f"{_GROUP}/memory.stat"),
    (
        f"{_GROUP}/memory/memory.limit_in_bytes",
        f"{_GROUP}/memory/memory.usage_in_bytes",
        f"{_GROUP}/memory/memory.stat",
    ),
)
"""Version 2 and version 1, as a container sees its own."""


def _available(table: Path) -> int | None:
    if not table.is_file():
        return None
    return next((1024 * size for name, size in _pairs(table) if name == "MemAvailable:"), None)


def _left_of_group(limit: Path, used: Path, stat: Path) -> int | None:
    """What a group's limit leaves; pages of files that can be dropped are not counted as used."""
    if not (limit.is_file() and used.is_file() and stat.is_file()):
        return None
    most = limit.read_text().strip()
    if most == "max":
        return None
    droppable = sum(size for name, size in _pairs(stat) if name in ("inactive_file", "active_file"))
    return max(0, int(most) - int(used.read_text()) + droppable)


def _pairs(table: Path) -> Iterator[tuple[str, int]]:
    for line in table.read_text("ascii").splitlines():
        words = line.split()
        if len(words) > 1 and words[1].isdigit():
            yield words[0], int(words[1])


@dataclass
class _Away:
    """A storage's bytes elsewhere: in RAM, or in the file at an offset.

    present: the storage has its bytes as well, to be read.
    """

    storage: UntypedStorage
    size: int
    host: Tensor | None
    offset: int
    present: bool = False


@dataclass
class _File:
    """One file in slots: a slot that is free again is taken by the next storage of its size."""

    handle: IO[bytes]
    folder: Path
    end: int = 0
    free: dict[int, list[int]] = field(default_factory=dict)


class Parking:
    """Puts away what suspended forwards hold and brings it back.

    Forwards are known by a number that the caller chooses. On CUDA copies run on a stream of their
    own beside the computation.
    """

    def __init__(self, model: nn.Module, room: Room, device: torch.device) -> None:
        self._model = model
        self._on_cuda = device.type == "cuda"
        self._device_bytes = room.device_bytes if self._on_cuda else room.host_bytes
        self._host_bytes = room.host_bytes if self._on_cuda else 0
        self._folder = room.folder
        self._file: _File | None = None
        self._staying: dict[int, int] = {}
        self._away: dict[int, list[_Away]] = {}
        self._on_device = self._in_ram = 0
        self._emptied: set[int] = set()
        self._fixed: set[int] = set()
        self._fetched: dict[int, torch.cuda.Event] = {}
        self._copies = torch.cuda.Stream(device) if self._on_cuda and self.bounded else None

    @property
    def bounded(self) -> bool:
        """Whether anything is ever put away."""
        return self._device_bytes is not None

    def close(self) -> None:
        """Forget all that is away, and give the file's space back."""
        self._away.clear()
        if self._file is not None:
            self._file.handle.close()
            self._file = None

    def begin_place(self) -> None:
        """The forwards come to a new place, where the model may hold other tensors."""
        if self.bounded:
            self._fixed = {storage._cdata for storage in _own_storages(self._model)}

    def fix_shared(self, forwards: Iterable[greenlet]) -> None:
        """Leave alone from now on, at this place, what more than one of the forwards holds."""
        seen: set[int] = set()
        for forward in forwards:
            held = _held_storages(forward).keys()
            self._fixed |= held & seen
            seen |= held

    def leave(self, number: int, forward: greenlet) -> None:
        """Put away what a forward holds that has just been suspended, if it is over budget.

        Raises:
            ResourceError: the disk is full.
            CheckpointError: it holds what was put away for another one.
        """
        held = _held_storages(forward)
        if held.keys() & self._emptied:
            raise CheckpointError(
                f"{type(self._model).__name__} shares tensors between its forwards, so they cannot "
                f"be parked: lower calibration.samples until the activations fit into memory"
            )
        storages = [
            storage
            for key, storage in held.items()
            if key not in self._fixed and storage.nbytes() >= _SMALL and storage.resizable()
        ]
        size = sum(storage.nbytes() for storage in storages)
        if self._device_bytes is None or self._on_device + size <= self._device_bytes:
            self._staying[number] = size
            self._on_device += size
            return
        host = self._host_bytes is None or self._in_ram + size <= self._host_bytes
        self._away[number] = [self._put_away(storage, in_ram=host) for storage in storages]
        self._emptied.update(storage._cdata for storage in storages)

    @contextmanager
    def shown(self, number: int) -> Iterator[None]:
        """Bring back what a forward holds, to be read and not changed; then it is away again."""
        self._bring_back(number)
        yield
        for away in self._away.get(number, ()):
            # The bytes that are elsewhere are still good.
            away.storage.resize_(0)
            away.present = False

    def fetch_early(self, number: int) -> None:
        """Begin to bring back what a forward holds while another one computes; on CUDA."""
        if self._copies is not None:
            self._fetch(number)

    def bring(self, number: int) -> None:
        """Bring back what a forward holds, which is about to go on."""
        self._on_device -= self._staying.pop(number, 0)
        self._bring_back(number)
        for away in self._away.pop(number, ()):
            self._emptied.discard(away.storage._cdata)
            if away.host is not None:
                self._in_ram -= away.size
            elif self._file is not None:
                self._file.free.setdefault(away.size, []).append(away.offset)

    def _put_away(self, storage: UntypedStorage, *, in_ram: bool) -> _Away:
        size = storage.nbytes()
        away = _Away(storage, size, None, 0)
        if in_ram:
            away.host = torch.empty(size, dtype=torch.uint8, pin_memory=self._on_cuda)
            self._copy(_bytes_of(storage), away.host)
            self._in_ram += size
        else:
            file = self._open_file()
            away.offset = file.free[size].pop() if file.free.get(size) else file.end
            file.end = max(file.end, away.offset + size)
            here = _bytes_of(storage).cpu() if self._on_cuda else None
            _write(file, view_memory(storage if here is None else here), away.offset)
        storage.resize_(0)
        return away

    def _bring_back(self, number: int) -> None:
        self._fetch(number)
        fetched = self._fetched.pop(number, None)
        if fetched is not None and self._copies is not None:
            # Not for the whole stream: others are still on their way out.
            torch.cuda.current_stream(self._copies.device).wait_event(fetched)

    def _fetch(self, number: int) -> None:
        lot = [away for away in self._away.get(number, ()) if not away.present]
        if not lot:
            return
        for away in lot:
            away.storage.resize_(away.size)
            away.present = True
            if away.host is not None:
                self._copy(away.host, _bytes_of(away.storage))
            elif self._on_cuda:
                host = torch.empty(away.size, dtype=torch.uint8, pin_memory=True)
                _read(self._open_file(), view_memory(host), away.offset)
                self._copy(host, _bytes_of(away.storage))
            else:
                _read(self._open_file(), view_memory(away.storage), away.offset)
        if self._copies is not None:
            self._fetched[number] = self._copies.record_event()

    def _copy(self, source: Tensor, target: Tensor) -> None:
        """Copy between device and RAM, on CUDA beside what is computed."""
        if self._copies is None:
            target.copy_(source)
            return
        # What is copied has been computed, and the memory that it goes to is not in use.
        self._copies.wait_stream(torch.cuda.current_stream(self._copies.device))
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        for tensor in (source, target):
            if tensor.is_cuda:
                # Its memory, once it is given back, waits for the copy.
                tensor.record_stream(self._copies)

    def _open_file(self) -> _File:
        if self._file is None:
            assert self._folder is not None
            with writing(self._folder):
                # Without a name from the start, where the system can; else unlinked at once.
                handle = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            self._file = _File(handle, self._folder)
        return self._file


@contextmanager
def parked(model: nn.Module, room: Room | None, device: torch.device) -> Iterator[Parking]:
    """Make a place for what suspended forwards hold; its file goes with it."""
    parking = Parking(model, room or Room(), device)
    try:
        yield parking
    finally:
        parking.close()


def _own_storages(model: nn.Module) -> Iterator[UntypedStorage]:
    """Storages of parameters, buffers, and tensors that a module keeps as plain attributes."""
    for module in model.modules():
        for values in (module._parameters, module._buffers, vars(module)):
            for value in values.values():
                if isinstance(value, Tensor) and not value.is_meta:
                    yield value.untyped_storage()


def _held_storages(forward: greenlet) -> dict[int, UntypedStorage]:
    """Find the storages of the tensors in a suspended greenlet's local variables, by address."""
    found: dict[int, UntypedStorage] = {}
    frame = forward.gr_frame
    while frame is not None:
        values = frame.f_locals
        for value in list(values.values()):
            _collect(value, _DEPTH, found)
        if isinstance(values, dict) and frame.f_code.co_flags & CO_OPTIMIZED:
            # Up to Python 3.12 that is a copy which the frame keeps, and with it dead tensors.
            values.clear()
        frame = frame.f_back
    return found


def _collect(value: Any, depth: int, found: dict[int, UntypedStorage]) -> None:
    if isinstance(value, Tensor):
        if not value.is_meta and value.layout == torch.strided:
            storage = value.untyped_storage()
            found[storage._cdata] = storage
    elif depth and isinstance(value, Mapping):
        for item in list(value.values()):
            _collect(item, depth - 1, found)
    elif depth and isinstance(value, tuple | list):
        for item in value:
            _collect(item, depth - 1, found)


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _write(file: _File, data: memoryview, offset: int) -> None:
    with writing(file.folder):
        while data:
            count = os.pwrite(file.handle.fileno(), data, offset)
            data, offset = data[count:], offset + count


def _read(file: _File, data: memoryview, offset: int) -> None:
    with writing(file.folder):
        while data:
            count = os.preadv(file.handle.fileno(), [data], offset)
            if not count:
                raise ResourceError(f"the file of parked activations in {file.folder} is cut short")
            data, offset = data[count:], offset + count
