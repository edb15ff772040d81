"""The resumable job on disk: one file a solved block, found again after an interruption.

    <output>.partial/
      lock                 held while a job runs (`locking`)
      workspace/
        job.json           what the job depends on; a resume with anything else is refused
        block-00003-<first 16 digits of its sha256>.safetensors

A block's file is complete or absent: it is written beside, synced and renamed, and its name holds
its hash, which is computed again before it is used. What is damaged all the same, as on a disk that
lies about what it has written, is removed and made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantkit.differing import list_differences
from quantkit.durable import make_folder, sync, write_text
from quantkit.errors import InputError, OutputError, ResourceError, writing
from quantkit.records import KvRecord, LayerRecord, QuantizedLayer, SolvedBlock
from quantkit.schemes import SCHEMES

_NAME = re.compile(r"[a-z]+-(\d{5})-([0-9a-f]{16})")
"""Of a stored file: the index of its block, and the beginning of its sha256."""
_KEPT_SUFFIXES = (".json", ".safetensors")
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}
"""What file systems without hard links answer, and those that have too many of one file."""


@dataclass(frozen=True)
class Workspace:
    """A job's folder of solved blocks."""

    folder: Path


def open_workspace(partial: Path, depends: Mapping[str, Any], *, restart: bool) -> Workspace:
    """Open the workspace in `partial`, or make it.

    Args:
        partial: the job's folder beside the output.
        depends: JSON-ready; everything that the solved blocks depend on.
        restart: throw away the blocks of a job that depended on something else.

    Raises:
        InputError: blocks of another job are there and `restart` is False; says what differs.
        OutputError: nobody can read whose blocks are there.
    """
    folder = partial / "workspace"
    job = folder / "job.json"
    found = read_document(job)
    # Whose blocks they are cannot be told without the file, which is older than any of them.
    if found is not None:
        differences = list_differences(found, _plain(depends))
        if not differences:
            _clear_up(folder)
            return Workspace(folder)
        if not restart:
            raise InputError(
                f"{partial} holds an unfinished job that differs in {'; '.join(differences)}: go "
                f"on with what it was started with, or start again with --overwrite"
            )
    with writing(folder):
        if folder.exists():
            # Without it first: half of the blocks would be those of the job all the same.
            job.unlink(missing_ok=True)
            shutil.rmtree(folder)
        make_folder(folder)
        write_text(job, json.dumps(depends, indent=2, sort_keys=True) + "\n")
    return Workspace(folder)


def _clear_up(folder: Path) -> None:
    """Remove what a killed job was writing, and matrices whose block is solved."""
    for path in folder.iterdir():
        # safetensors writes to a hidden file of its own beside the one that it is told.
        if path.suffix not in _KEPT_SUFFIXES and not path.is_dir():
            path.unlink()
    for path in folder.glob("fisher-*"):
        if any(folder.glob(f"block-{path.stem.split('-')[1]}-*")):
            path.unlink()


def _plain(value: Any) -> Any:
    """The value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def read_document(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a file of the workspace; None where it is absent or damaged.

    Raises:
        OutputError: it is there and cannot be read, which says nothing against the blocks.
    """
    try:
        document = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    except OSError as error:
        raise OutputError(
            f"cannot read {path} of an unfinished job: {error.strerror}; mend it, or remove it to "
            f"begin the job anew"
        ) from error
    return document if isinstance(document, dict) else None


def read_begun(partial: Path) -> Mapping[str, Any]:
    """Return what the unfinished job in a folder depends on; empty where there is none.

    Raises:
        OutputError: as `read_document`.
    """
    return read_document(partial / "workspace" / "job.json") or {}


def store_block(workspace: Workspace, block: SolvedBlock) -> None:
    """Write a solved block; it is on the disk when this returns.

    Its Fisher matrices have done their work and make room.

    Raises:
        ResourceError, OutputError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    layers = []
    for layer in block.layers:
        tensors[f"codes:{layer.name}"] = layer.codes
        tensors[f"scale:{layer.name}"] = layer.scale
        if layer.zero_point is not None:
            tensors[f"zero_point:{layer.name}"] = layer.zero_point
        if layer.input_scale is not None:
            tensors[f"input_scale:{layer.name}"] = layer.input_scale
        layers.append([layer.name, layer.scheme.name, layer.group_size])
    tensors |= {f"dense:{name}": tensor for name, tensor in block.dense.items()}
    # Cloned: what is written may share no memory, and a replayed bias is that of the artifact.
    tensors |= {f"replay:{name}": tensor.clone() for name, tensor in block.replay.items()}
    tensors |= {f"added:{name}": tensor for name, tensor in block.added.items()}
    tensors |= {f"encoded:{name}": tensor for name, tensor in block.encoded.items()}
    tensors |= {f"divided:{name}": tensor.clone() for name, tensor in block.divided.items()}
    tensors |= {f"importance:{name}": tensor for name, tensor in block.importance.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {
        "index": block.index,
        "layers": layers,
        "records": [asdict(record) for record in block.records],
        "kv": None if block.kv is None else asdict(block.kv),
    }
    _write(workspace, f"block-{block.index:05d}", tensors, {"block": json.dumps(about)})
    for path in workspace.folder.glob(f"fisher-{block.index:05d}-*"):
        path.unlink()


def store_matrices(workspace: Workspace, index: int, matrices: Mapping[str, Tensor]) -> None:
    """Write the Fisher matrices of a block's layers; they are on the disk when this returns.

    Raises:
        ResourceError, OutputError: they cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in matrices.items()}
    _write(workspace, f"fisher-{index:05d}", tensors, {})


def stored_matrices(workspace: Workspace) -> frozenset[int]:
    """Return the indexes of the blocks whose Fisher matrices are stored, as `stored_blocks`."""
    return _stored(workspace, "fisher")


def load_matrices(workspace: Workspace, index: int) -> Mapping[str, Tensor]:
    """Return the Fisher matrices of a block that `stored_matrices` named."""
    with _opened(_path_of(workspace, "fisher", index)) as reader:
        return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118


def store_tensors(
    workspace: Workspace,
    kind: str,
    index: int,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
) -> None:
    """Write tensors of a kind of its own for a block; they are on the disk when this returns.

    Args:
        kind: what the file's name begins with; a word.
        about: JSON-ready, as `load_about` returns it.

    Raises:
        ResourceError, OutputError: they cannot be written.
    """
    _write(workspace, f"{kind}-{index:05d}", tensors, {"about": json.dumps(about)})


def stored_tensors(workspace: Workspace, kind: str) -> frozenset[int]:
    """Return the indexes of the blocks with tensors of the kind, as `stored_blocks`."""
    return _stored(workspace, kind)


def load_about(workspace: Workspace, kind: str, index: int) -> dict[str, Any]:
    """Return what was stored about tensors that `stored_tensors` named."""
    with _opened(_path_of(workspace, kind, index)) as reader:
        about: dict[str, Any] = json.loads(reader.metadata()["about"])
        return about


def take_out(workspace: Workspace, kind: str, index: int, place: Path) -> str:
    """Let a block's file of a kind lie at `place` on the same disk too, and return its sha256.

    It stays in the workspace: a job that is killed before its end need not make it again. Where the
    file system has no hard links, it is moved.

    Raises:
        ResourceError, OutputError: it cannot be.
    """
    path = _path_of(workspace, kind, index)
    with writing(place):
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        try:
            os.link(path, place)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            path.rename(place)
    return digest


def _write(
    workspace: Workspace, stem: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a file whole or not at all, with its hash in its name, in place of any before it."""
    beside = workspace.folder / f"{stem}.writing"
    try:
        with writing(beside):
            try:
                save_file(dict(tensors), beside, metadata=dict(metadata))
            except SafetensorError as error:
                raise as_os_error(error) from error
            sync(beside)
            place = workspace.folder / f"{stem}-{_digest(beside)}.safetensors"
            beside.replace(place)
            for path in workspace.folder.glob(f"{stem}-*"):
                if path != place:
                    path.unlink()
            sync(workspace.folder)
    finally:
        # On a full disk it would keep others from writing.
        beside.unlink(missing_ok=True)


def as_os_error(error: SafetensorError) -> OSError:
    """The writer's library wraps the system's error in text: `... (os error 28) at path ...`."""
    found = re.search(r"\(os error (\d{1,4})\)", str(error))
    if found is None:
        return OSError(0, str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])))


def stored_blocks(workspace: Workspace) -> frozenset[int]:
    """Return the indexes of the blocks that are stored whole; damaged files are removed."""
    return _stored(workspace, "block")


def _stored(workspace: Workspace, kind: str) -> frozenset[int]:
    whole = set()
    for path in sorted(workspace.folder.glob(f"{kind}-*-*.safetensors")):
        found = _NAME.fullmatch(path.stem)
        if found is not None and found[2] == _digest(path) and _is_sound(path, kind):
            whole.add(int(found[1]))
        else:
            path.unlink()
    return frozenset(whole)


def _is_sound(path: Path, kind: str) -> bool:
    """Whether a file has what its readers look for, raising as `_opened`."""
    try:
        with _opened(path) as reader:
            names = set(reader.keys())
            if kind == "block":
                about = json.loads(reader.metadata()["block"])
                _records(about)
                _kv_record(about)
                return all(
                    {f"codes:{name}", f"scale:{name}"} <= names and scheme in SCHEMES
                    for name, scheme, _ in about["layers"]
                )
            return kind == "fisher" or isinstance(json.loads(reader.metadata()["about"]), dict)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def load_block(workspace: Workspace, index: int) -> SolvedBlock:
    """Return a block that `stored_blocks` named."""
    return _read_block(_path_of(workspace, "block", index))


def load_records(workspace: Workspace, index: int) -> tuple[LayerRecord, ...]:
    """Return the records of a block that `stored_blocks` named, without reading its tensors."""
    with _opened(_path_of(workspace, "block", index)) as reader:
        return _records(json.loads(reader.metadata()["block"]))


def load_kv_record(workspace: Workspace, index: int) -> KvRecord | None:
    """Return a stored block's record of its key/value cache, as `load_records` does."""
    with _opened(_path_of(workspace, "block", index)) as reader:
        return _kv_record(json.loads(reader.metadata()["block"]))


def _path_of(workspace: Workspace, kind: str, index: int) -> Path:
    return next(workspace.folder.glob(f"{kind}-{index:05d}-*.safetensors"))


def _records(about: Mapping[str, Any]) -> tuple[LayerRecord, ...]:
    return tuple(LayerRecord(**record) for record in about["records"])


def _kv_record(about: Mapping[str, Any]) -> KvRecord | None:
    found = about["kv"]
    if found is None:
        return None
    lists = {key: tuple(values) for key, values in found.items() if key != "name"}
    return KvRecord(found["name"], **lists)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a stored file by the library that wrote it, which calls every refusal "no such file".

    Raises:
        ResourceError: the file is there and cannot be opened.
    """
    try:
        with safe_open(path, framework="pt") as reader:
            yield reader
    except FileNotFoundError as error:
        if not path.is_file():
            raise
        raise ResourceError(
            f"{path} is there and cannot be opened: too many files are open (ulimit -n), or the "
            f"disk has failed"
        ) from error


def _read_block(path: Path) -> SolvedBlock:
    with _opened(path) as reader:
        about = json.loads(reader.metadata()["block"])
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    layers = tuple(
        QuantizedLayer(
            name,
            SCHEMES[scheme],
            group_size,
            tensors[f"codes:{name}"],
            tensors[f"scale:{name}"],
            tensors.get(f"zero_point:{name}"),
            tensors.get(f"input_scale:{name}"),
        )
        for name, scheme, group_size in about["layers"]
    )
    return SolvedBlock(
        index=about["index"],
        layers=layers,
        dense=_with_prefix(tensors, "dense:"),
        records=_records(about),
        replay=_with_prefix(tensors, "replay:"),
        added=_with_prefix(tensors, "added:"),
        encoded=_with_prefix(tensors, "encoded:"),
        importance=_with_prefix(tensors, "importance:"),
        divided=_with_prefix(tensors, "divided:"),
        kv=_kv_record(about),
    )


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]
