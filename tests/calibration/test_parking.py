"""Suspended forwards whose tensors are elsewhere meanwhile: the same bytes, less memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from quantkit.calibration.parking import Parking, Room, choose_room, free_ram, parked
from quantkit.calibration.walk import BlockEnd, GroupStop, walk
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.errors import CheckpointError, ResourceError
from quantkit.records import TokenWindows
from tests.calibration.test_walk import loaders, make_recipe, open_model
from tests.helpers import make_pico_model

CPU = torch.device("cpu")


def many_windows(count: int = 800, length: int = 16) -> TokenWindows:
    """Four micro-batches, the last of which is smaller; some tokens do not count."""
    generator = np.random.default_rng(0)
    ids = generator.integers(3, 300, (count, length))
    weights = (generator.random((count, length)) > 0.2).astype(np.float32)
    return TokenWindows(ids, weights, "random", "0")


def start_walk(
    folder: Path,
    room: Room | None,
    windows: TokenWindows,
    dtype: torch.dtype = torch.float32,
    *,
    all_told: bool,
    device: torch.device = CPU,
    **options: object,
) -> Generator[GroupStop | BlockEnd, None, None]:
    """A walk with everything that it can tell, or with nothing."""
    checkpoint, plan = open_model(folder, make_recipe(**options))
    return walk(
        build_skeleton(checkpoint),
        plan.blocks,
        *loaders(checkpoint),
        windows,
        device=device,
        dtype=dtype,
        needs_stats=lambda block, group: all_told,
        kv_cache=plan.kv_cache,
        follow_original=all_told,
        room=room,
    )


def walk_through(
    folder: Path,
    room: Room | None,
    dtype: torch.dtype,
    device: torch.device = CPU,
    **options: object,
) -> dict[str, Tensor]:
    """Follow a walk whose layers are rounded coarsely, and return all that it tells."""
    windows = many_windows(1200 if device.type == "cuda" else 800)
    stops = start_walk(folder, room, windows, dtype, all_told=True, device=device, **options)
    found: dict[str, Tensor] = {}
    for stop in stops:
        told = stop.stats if isinstance(stop, GroupStop) else stop.kv
        place = stop.block.prefix if isinstance(stop, BlockEnd) else stop.group.linears[0].name
        for field in fields(told):
            value = getattr(told, field.name)
            if isinstance(value, Tensor):
                found[f"{place} {field.name}"] = value.clone()
        if isinstance(stop, GroupStop):
            for linear in stop.group.linears:
                name = f"{linear.name}.weight"
                stop.replace(name, (stop.tensors[name].float() * 8).round() / 8)
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_no_byte_depends_on_where_activations_are_kept(tmp_path: Path, family: str) -> None:
    """All in the file, and some of it; with the original followed and keys and values watched."""
    folder = make_pico_model(tmp_path / "model", family=family, tokenizer=False)
    cache = {"kv_cache": "fp8"} if family != "gemma2" else {}
    dtype = torch.bfloat16 if family == "qwen3" else torch.float32
    expected = walk_through(folder, None, dtype, **cache)

    for size in (0, 4_000_000):
        room = Room(host_bytes=size, folder=tmp_path)
        found = walk_through(folder, room, dtype, **cache)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_on_cuda_no_byte_depends_on_the_place_either(tmp_path: Path) -> None:
    """In RAM, partly in RAM, and in the file; copies run beside the computation."""
    folder = make_pico_model(tmp_path / "model", tokenizer=False)
    cuda = torch.device("cuda")
    expected = walk_through(folder, None, torch.bfloat16, cuda, kv_cache="fp8")

    for room in (
        Room(device_bytes=0),
        Room(device_bytes=2_000_000, host_bytes=2_000_000, folder=tmp_path),
        Room(device_bytes=0, host_bytes=0, folder=tmp_path),
    ):
        found = walk_through(folder, room, torch.bfloat16, cuda, kv_cache="fp8")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@contextmanager
def limited_file_size(size: int) -> Iterator[None]:
    """Let the system refuse what it refuses on a full disk."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_full_disk_is_a_lack_of_resources(tmp_path: Path) -> None:
    """One line that names the folder; nothing is left in it."""
    folder = make_pico_model(tmp_path / "model", tokenizer=False)
    room = Room(host_bytes=0, folder=tmp_path)

    with limited_file_size(500_000), pytest.raises(ResourceError, match=f"writing {tmp_path}"):
        walk_through(folder, room, torch.float32)

    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def suspend(*tensors: Tensor) -> tuple[greenlet, list[float]]:
    """A forward that holds the tensors and, resumed, sums each of them up."""
    caller, sums = getcurrent(), []

    def run() -> None:
        held = {"states": (list(tensors),)}
        caller.switch()
        sums.extend(float(tensor.sum()) for tensor in held["states"][0])

    forward = greenlet(run)
    forward.switch()
    return forward, sums


def park_all(folder: Path, model: nn.Module) -> Parking:
    """A parking where nothing may stay in RAM."""
    parking = Parking(model, Room(host_bytes=0, folder=folder), CPU)
    parking.begin_place()
    return parking


def test_what_forwards_share_stays(tmp_path: Path) -> None:
    """A mask that two forwards hold is not emptied under one of them; nor are buffers."""
    model = nn.Module()
    model.register_buffer("table", torch.ones(3000))
    table = model.get_buffer("table")
    own, other, mask = torch.ones(4000), torch.ones(4000), torch.ones(5000)
    first, sums = suspend(own[:2000], mask, table.view(30, 100), own[2000:])
    second, _ = suspend(other, mask[10:])

    parking = park_all(tmp_path, model)
    parking.fix_shared([first, second])
    parking.leave(0, first)
    parking.leave(1, second)

    assert [own.untyped_storage().nbytes(), other.untyped_storage().nbytes()] == [0, 0]
    assert float(mask.sum() + table.sum()) == 8000
    with parking.shown(0):
        assert float(own.sum()) == 4000
    assert own.untyped_storage().nbytes() == 0
    parking.bring(0)
    first.switch()
    assert sums == [2000, 5000, 3000, 2000]
    parking.close()


def test_a_forward_that_meets_what_is_away_is_an_error(tmp_path: Path) -> None:
    """It has computed with nothing: better no artifact than that one."""
    shared = torch.ones(4000)
    parking = park_all(tmp_path, nn.Module())
    for number in range(2):
        forward, _ = suspend(shared)
        if number:
            with pytest.raises(CheckpointError, match="shares tensors between its forwards"):
                parking.leave(number, forward)
        else:
            parking.leave(number, forward)
    parking.close()


def test_looking_into_a_frame_keeps_nothing_alive(tmp_path: Path) -> None:
    """A forward drops its tensors when it does so by itself."""
    caller = getcurrent()

    def run() -> None:
        states = torch.ones(5000)
        watched.append(weakref.ref(states))
        caller.switch()
        states = torch.zeros(1)
        caller.switch(states)

    watched: list[weakref.ref[Tensor]] = []
    forward = greenlet(run)
    forward.switch()
    with parked(nn.Module(), Room(host_bytes=1 << 30, folder=tmp_path), CPU) as parking:
        parking.leave(0, forward)
        parking.bring(0)
        forward.switch()
        assert watched[0]() is None
        forward.switch()


_PEAKS = """
import sys
from pathlib import Path
import numpy as np
from quantkit.calibration.parking import Room
from quantkit.records import TokenWindows
from tests.calibration.test_parking import start_walk

folder = Path(sys.argv[1])
ids = np.random.default_rng(0).integers(3, 300, (300, 64))
windows = TokenWindows(ids, np.ones(ids.shape, np.float32), "random", "0")
for room in (Room(host_bytes=0, folder=folder), None):
    for _ in start_walk(folder / "model", room, windows, all_told=False):
        pass
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024)
"""


def test_the_process_is_smaller_by_what_is_parked(tmp_path: Path) -> None:
    """Peak memory with the file behind, and then without it."""
    make_pico_model(tmp_path / "model", hidden=256, intermediate=512, layers=1, tokenizer=False)
    found = subprocess.run(
        [sys.executable, "-c", _PEAKS, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        # Every tensor is mapped by itself, so that none hides in a hole that another one left.
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
    )
    parked_peak, plain_peak = map(int, found.stdout.split())

    # The residual stream and a group's input: 19,200 tokens of each in float32.
    activations = 2 * 19_200 * 256 * 4
    assert plain_peak - parked_peak > 0.7 * activations


def test_room_is_chosen_from_what_is_free(tmp_path: Path) -> None:
    """No bound for what fits by far; else half of what is free."""
    free = free_ram()
    assert free is not None
    assert choose_room(CPU, 1000, tmp_path).host_bytes is None
    chosen = choose_room(CPU, free * 10, tmp_path).host_bytes
    assert chosen is not None
    assert 0.2 * free < chosen < 0.8 * free
    assert choose_room(CPU, 1000, tmp_path, most=1000).host_bytes is None
    assert choose_room(CPU, 1000, tmp_path, most=999).host_bytes == 999
    shared = choose_room(CPU, free // 2, tmp_path, processes=4).host_bytes
    assert shared is not None
    assert 0.05 * free < shared < 0.2 * free
    with pytest.raises(ValueError, match="needs a folder"):
        Room(host_bytes=1)
