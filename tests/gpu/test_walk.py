"""The walk over calibration data on a GPU, with activations that do not fit on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit.calibration.parking import Room
from quantkit.calibration.walk import GroupStop, walk
from quantkit.checkpoint.reader import read_tensor
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.records import BlockPlan
from tests.calibration.test_parking import many_windows
from tests.calibration.test_walk import make_recipe, open_model
from tests.helpers import make_pico_model

pytestmark = pytest.mark.gpu


def second_moments(
    folder: Path, device: torch.device, room: Room | None, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Walk through a model and yield the second moment of the input of every group."""
    checkpoint, plan = open_model(folder, make_recipe())
    outside = [
        name for name in checkpoint.tensors if "layers." not in name and name != "lm_head.weight"
    ]

    def load_block(block: BlockPlan) -> Mapping[str, Tensor]:
        names = [name for name in checkpoint.tensors if name.startswith(f"{block.prefix}.")]
        return {name: read_tensor(checkpoint, name) for name in names}

    stops = walk(
        build_skeleton(checkpoint),
        plan.blocks,
        load_block,
        lambda: {name: read_tensor(checkpoint, name) for name in outside},
        many_windows(),
        device=device,
        dtype=dtype,
        needs_stats=lambda block, group: True,
        room=room,
    )
    for stop in stops:
        if isinstance(stop, GroupStop) and stop.stats is not None:
            yield stop.group.linears[0].name, stop.stats.second_moment.cpu().clone()


def test_no_byte_depends_on_where_activations_are_kept(cuda: torch.device, tmp_path: Path) -> None:
    """On the device, in RAM, in a file, and some in each."""
    folder = make_pico_model(tmp_path / "model", tokenizer=False)
    expected = dict(second_moments(folder, cuda, None, torch.bfloat16))
    rooms = (
        Room(device_bytes=0, host_bytes=None, folder=tmp_path),
        Room(device_bytes=0, host_bytes=0, folder=tmp_path),
        Room(device_bytes=300_000, host_bytes=300_000, folder=tmp_path),
    )
    for room in rooms:
        found = dict(second_moments(folder, cuda, room, torch.bfloat16))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_second_moments_are_those_of_the_cpu(cuda: torch.device, tmp_path: Path) -> None:
    """In float32, within what other orders of summation make of them."""
    folder = make_pico_model(tmp_path / "model", tokenizer=False)
    expected = dict(second_moments(folder, torch.device("cpu"), None, torch.float32))
    found = dict(second_moments(folder, cuda, None, torch.float32))
    assert found.keys() == expected.keys()
    for name, moment in expected.items():
        assert (found[name] - moment).norm() <= 1e-3 * moment.norm(), name
