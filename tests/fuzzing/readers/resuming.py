"""What jobs leave on the disk for later: solved blocks, statistics, answers of the baseline."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import quantkit
from quantkit.allocation.stored import load_allocation, store_allocation
from quantkit.calibration.stored import (
    check_holds,
    check_model,
    load_fishers,
    load_kv_stats,
    load_stats,
    note_origin,
    open_statistics,
)
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.errors import ArtifactError, QuantkitError
from quantkit.job import plan_work
from quantkit.judging.baseline.store import AnswerStore
from quantkit.materials import gather_materials
from quantkit.recipe import Recipe
from quantkit.records import Allocation, Source
from quantkit.workspace import (
    load_block,
    load_kv_record,
    load_matrices,
    load_records,
    open_workspace,
    read_begun,
    store_block,
    store_matrices,
    stored_blocks,
    stored_matrices,
)
from tests.fuzzing.corpus import copying, pico_model, root
from tests.fuzzing.damage import BYTES
from tests.fuzzing.reader import Reader
from tests.fuzzing.trees import damage_json
from tests.helpers import pico_text

_DEPENDS = {"model": {"config.json": "0" * 64}, "seed": 0}
_KEY = "ab" * 32


@lru_cache(maxsize=1)
def _job() -> Recipe:
    data = root() / "statistics.txt"
    data.write_text(pico_text(300, seed=1))
    return Recipe.model_validate(
        {
            "version": 1,
            "model": str(pico_model()),
            "output": str(root() / "never"),
            "calibration": {"data": str(data), "samples": 4, "sequence_length": 16},
            "quantize": {"scheme": "w4a16", "group_size": 32, "method": "gptq", "effort": "best"},
            "export": [{"format": "compressed-tensors"}],
        }
    )


@lru_cache(maxsize=1)
def _statistics() -> Path:
    quantkit.calibrate(_job(), output=root() / "statistics")
    return root() / "statistics"


@lru_cache(maxsize=1)
def _plan() -> Any:
    return plan_work(_job(), open_checkpoint(Source("model", pico_model(), None)), gate=False)


def _read_statistics(folder: Path) -> object:
    """As a job that is solved from statistics reads them; each part refuses for itself."""
    stored, plan = open_statistics(folder), _plan()
    check_model(stored, "model", stored.manifest["model"]["files"])
    found: list[object] = [note_origin(stored, plan), stored.dtype]
    with contextlib.suppress(QuantkitError):
        gather_materials(
            _job(),
            model=None,
            tokenizer=None,
            output=None,
            overrides=(),
            examples=None,
            statistics=folder,
        )
    check_holds(stored, plan)
    cpu = torch.device("cpu")
    for block in plan.blocks:
        found += [load_stats(stored, block, group, cpu) for group in block.groups]
        found.append(load_fishers(stored, block, cpu))
        if stored.has_key_value:
            found.append(load_kv_stats(stored, block, cpu))
    return found


def _rehash(draw: random.Random, folder: Path) -> None:
    """Damage a file of tensors, and let the manifest have its new hash."""
    manifest = json.loads((folder / "statistics.json").read_bytes())
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    file.write_bytes(_damage_tensors(draw, file.read_bytes()))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if file.name.startswith("windows"):
        manifest["windows_sha256"] = digest
    else:
        kind, number = file.stem.split("-")
        key = "sha256" if kind == "block" else "fisher_sha256"
        manifest["blocks"][str(int(number))][key] = digest
    (folder / "statistics.json").write_text(json.dumps(manifest))


def _damage_tensors(draw: random.Random, content: bytes) -> bytes:
    """Damage a safetensors file: its header as JSON, or its bytes."""
    if draw.random() < 0.3:
        return draw.choice(BYTES)(draw, content)
    length = int.from_bytes(content[:8], "little")
    header = damage_json(draw, content[8 : 8 + length])
    if draw.random() < 0.3:
        names = [b"F32", b"I64", b"BF16", b"F64", b"I32"]
        header = header.replace(draw.choice(names), draw.choice(names), draw.randint(1, 3))
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@lru_cache(maxsize=1)
def _workspace() -> Path:
    from tests.formats.cases import make_case

    case = make_case(pico_model(), [("*", "w4a16_asym", 32)])
    workspace = open_workspace(root() / "partial", _DEPENDS, restart=False)
    store_allocation(workspace, Allocation((), 64, 4.5, None, 0.1, 4.4))
    store_block(workspace, case.blocks[0])
    store_matrices(workspace, 1, {"model.layers.1.mlp.up_proj": torch.eye(4)})
    return root() / "partial"


def _read_workspace(folder: Path) -> object:
    """Go on with the job; what is damaged goes, so it is a copy that is read."""
    partial = folder.parent / "work" / "partial"
    shutil.copytree(folder, partial)
    read_begun(partial)
    workspace = open_workspace(partial, _DEPENDS, restart=False)
    found: list[object] = [load_allocation(workspace)]
    for index in stored_blocks(workspace):
        found += [load_records(workspace, index), load_kv_record(workspace, index)]
        found.append(load_block(workspace, index))
    found += [load_matrices(workspace, index) for index in stored_matrices(workspace)]
    return found


def _rename(draw: random.Random, folder: Path) -> None:
    """Damage a block's file, and give it the name that fits, or another one that does not."""
    file = draw.choice(sorted((folder / "workspace").glob("*.safetensors")))
    file.write_bytes(_damage_tensors(draw, file.read_bytes()))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    name = f"{file.stem[:-16]}{digest}.safetensors"
    if draw.random() < 0.2:
        name = draw.choice((f"block-1-2-{digest}", f"block-x-{digest}", "block--", "fisher-٣-1"))
        name += ".safetensors"
    file.rename(file.with_name(name))


def _build_store(folder: Path) -> None:
    """Two stores of one answer each: one with a file, and one without."""
    data = folder / "data.f32"
    data.write_bytes(bytes(range(64)))
    for name, file in (("file", data), ("plain", None)):
        (folder / name).mkdir(mode=0o700)
        store = AnswerStore(folder / name, 1 << 30)
        store.open()
        draft = store.start(_KEY, {"ok": True, "ids": [1, 2]}, file)
        assert draft is not None
        store.finish(draft)
    os.remove(data)


def _read_store(folder: Path) -> object:
    place = folder.parent / "work" / "store"
    shutil.copytree(folder, place)
    place.chmod(0o700)
    has_file = any((place / _KEY).glob("[dh]a*"))
    store = AnswerStore(place, 1 << 30)
    store.open()
    kept = store.recall(_KEY, folder.parent / "work" / "answer.f32" if has_file else None)
    if kept is None:
        raise ArtifactError("it is computed again")
    return kept


def _sign(draw: random.Random, folder: Path) -> None:
    """Damage what an entry says, and sign it anew."""
    place = folder / _KEY / "answer.json"
    document = json.loads(place.read_bytes())
    try:
        body = json.loads(damage_json(draw, json.dumps(document["body"]).encode()))
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    except (ValueError, RecursionError):
        return
    place.write_text(json.dumps({"body": body, "sha256": digest}))


READERS = (
    Reader(
        name="statistics",
        build=copying(statistics=_statistics),
        damages={
            "statistics.json": (damage_json, damage_json, damage_json, *BYTES),
            "*.safetensors": BYTES,
        },
        read=_read_statistics,
        edit=_rehash,
    ),
    Reader(
        name="workspace",
        build=copying(partial=_workspace),
        damages={
            "workspace/*.json": (damage_json, damage_json, *BYTES),
            "workspace/*.safetensors": BYTES,
        },
        read=_read_workspace,
        edit=_rename,
    ),
    Reader(
        name="baseline-store",
        build=_build_store,
        damages={f"{_KEY}/*": (damage_json, *BYTES)},
        read=_read_store,
        edit=_sign,
    ),
)
