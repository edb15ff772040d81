"""Checkpoints: the config, the weights' headers, the index of shards, pickled weights.

Each is read as a job reads it: opened, planned, its tensors read, and looked into by `inspect` and
`verify`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

import quantkit
from quantkit.checkpoint.reader import open_checkpoint, read_tensor
from quantkit.job import plan_work
from quantkit.recipe import Recipe
from quantkit.records import Source
from tests.fuzzing.corpus import copying, pico_model, root
from tests.fuzzing.damage import BYTES, at_start, flip, set_number
from tests.fuzzing.reader import Damage, Reader
from tests.fuzzing.trees import damage_json, replace_values
from tests.helpers import make_pico_model

_RECIPE = Recipe.model_validate(
    {
        "version": 1,
        "quantize": {"scheme": "w4a16", "method": "rtn", "group_size": 32},
        "export": [{"format": "compressed-tensors"}],
    }
)


@cache
def _family(family: str) -> Path:
    place = root() / f"model-{family}"
    return make_pico_model(
        place, family=family, hidden=32, intermediate=32, heads=2, kv_heads=1, tokenizer=False
    )


@cache
def _pickled() -> Path:
    """The same weights as `torch.save` writes them."""
    place = root() / "model-pickled"
    shutil.copytree(pico_model(), place)
    tensors = load_file(place / "model.safetensors")
    os.remove(place / "model.safetensors")
    torch.save(tensors, place / "pytorch_model.bin")
    return place


def _plan(folder: Path) -> None:
    """Open a checkpoint and say what a job would do, as all jobs begin."""
    checkpoint = open_checkpoint(Source("model", folder, None))
    plan_work(_RECIPE, checkpoint, gate=False)


def _read_config(folder: Path) -> object:
    _plan(folder)
    return quantkit.inspect(folder)


def _read_weights(folder: Path) -> object:
    checkpoint = open_checkpoint(Source("model", folder, None))
    for name in checkpoint.tensors:
        read_tensor(checkpoint, name)
    quantkit.inspect(folder)
    return quantkit.verify(folder)


def _in_header(damage: Damage) -> Damage:
    """Make the damage that changes the JSON header of a safetensors file and its length with it."""

    def change(draw: random.Random, content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = damage(draw, content[8 : 8 + length])
        return len(header).to_bytes(8, "little") + header + content[8 + length :]

    return change


def _bad_entry(draw: random.Random, header: bytes) -> bytes:
    """Let one tensor claim another's bytes, a type or shape that is none, or more than there is."""
    try:
        tree = json.loads(header)
        names = [name for name in tree if name != "__metadata__"]
        one, other = tree[draw.choice(names)], tree[draw.choice(names)]
        kind = draw.randrange(5)
        if kind == 0:
            one["data_offsets"] = list(other["data_offsets"])
        elif kind == 1:
            one["dtype"] = draw.choice(("F4", "BOOL", "I64", "f32", "", "F8_E8M0", "C64", None))
        elif kind == 2:
            one["shape"] = draw.choice(([2**32, 2**32], [2**60], [0], [-1], [], [1] * 5000, [2.0]))
        elif kind == 3:
            one["data_offsets"] = draw.choice(([0, 2**60], [2**60, 2**60], [5, 1], [0], "01"))
        else:
            one["shape"], one["data_offsets"] = [0, 2**62], [one["data_offsets"][0]] * 2
        return json.dumps(tree).encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return header


_HEADER_DAMAGES = (
    _in_header(damage_json),
    _in_header(_bad_entry),
    set_number(within=8, widths=(8,), step=8),
    at_start(flip, 600),
)

_NAMES = (
    *("../model.safetensors", "/etc/passwd", "model-00009-of-00002.safetensors", "", "."),
    *("model-00001-of-00002.safetensors/x", "CON", "a\0b", "x" * 5000, 7, None),
)


def _exchange_shards(draw: random.Random, folder: Path) -> None:
    """Lose, exchange or repeat shards, or put something else in their place."""
    first, second = sorted(folder.glob("model-*.safetensors"))
    kind = draw.randrange(5)
    if kind == 0:
        os.remove(draw.choice((first, second)))
    elif kind == 1:
        shutil.copyfile(first, second)
    elif kind == 2:
        os.replace(first, folder / "spare")
        os.replace(second, first)
        os.replace(folder / "spare", second)
    elif kind == 3:
        os.remove(first)
        draw.choice((first.mkdir, lambda: os.mkfifo(first)))()
    else:
        os.remove(first)
        first.symlink_to(draw.choice(("/etc/passwd", "/dev/zero", first, second, "/")))


class _Command:
    """What runs a command where a pickle is trusted."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("true",)


_OBJECTS = (
    *(_Command(), {"a": _Command()}, {1: torch.ones(2)}, {"a": 1}, [torch.ones(2)], {}, None),
    *({"a": torch.ones(2).to_sparse()}, {"a": torch.ones(2, dtype=torch.complex64)}, open),
    *({"a": torch.zeros(1).expand(2**20, 2**20)}, {"a": torch.ones(4, 4).T}, {"a": "x" * 10_000}),
)


def _pickle_other(draw: random.Random, content: bytes) -> bytes:
    """Put another object in the place of named tensors."""
    buffer, thing = io.BytesIO(), draw.choice(_OBJECTS)
    if draw.random() < 0.3:
        return pickle.dumps(thing if not isinstance(thing, dict) else _Command(), draw.randrange(5))
    torch.save(thing, buffer)
    return buffer.getvalue()


def _in_archive(draw: random.Random, content: bytes) -> bytes:
    """Damage a member of the archive, whose checksums are right again."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError):
        return content
    chosen = draw.choice([*members, *(name for name in members if name.endswith("data.pkl"))])
    members[chosen] = draw.choice((*BYTES, set_number(within=400, widths=(1, 4))))(
        draw, members[chosen]
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return buffer.getvalue()


READERS = (
    Reader(
        name="config",
        build=copying(
            llama=pico_model,
            qwen3=lambda: _family("qwen3"),
            gemma2=lambda: _family("gemma2"),
        ),
        damages={"config.json": (*[damage_json] * 20, *BYTES)},
        read=_read_config,
    ),
    Reader(
        name="safetensors",
        build=copying(one=pico_model),
        damages={"model.safetensors": (*_HEADER_DAMAGES, *_HEADER_DAMAGES, *BYTES)},
        read=_read_weights,
    ),
    Reader(
        name="index",
        build=copying(two=lambda: pico_model(2)),
        damages={
            "model.safetensors.index.json": (*[damage_json, replace_values(*_NAMES)] * 6, *BYTES),
            "*.safetensors": (_in_header(_bad_entry), *BYTES),
        },
        read=_read_weights,
        edit=_exchange_shards,
    ),
    Reader(
        name="pickle",
        build=copying(pickled=_pickled),
        damages={"pytorch_model.bin": (_pickle_other, _in_archive, _in_archive, *BYTES)},
        read=_read_weights,
    ),
)
