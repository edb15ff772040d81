"""A model of the Hub without its weights: a plan needs no more of them than their headers."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.headers import MAX_HEADER_BYTES
from quantkit.checkpoint.paths import join_inside
from quantkit.checkpoint.source import (
    INDEXES,
    explaining,
    fetch_description,
    find_folder,
    list_described,
    list_shards,
    resolve_source,
)
from quantkit.errors import CheckpointError, PlanError, raise_alone, writing
from quantkit.records import Source

_FIRST_BYTES = 100_000
"""Of a file, asked for at once: few headers are longer, as huggingface_hub has counted."""
_CONNECTIONS = 8
_MOST_BYTES = 1 << 43
"""Of one weight file: eight terabytes, and what file systems let a file have without its blocks."""


@dataclass(frozen=True)
class _Head:
    """The beginning of a safetensors file, as far as its header goes, and the file's length."""

    header: bytes
    size: int


@dataclass(frozen=True)
class Outline:
    """A folder from which a checkpoint's config and headers can be read."""

    source: Source
    absent_bytes: int = 0
    """Of weights that are on the Hub alone."""


@contextmanager
def outline_source(model: str) -> Iterator[Outline]:
    """Yield a folder from which a checkpoint's config and headers can be read.

    It is the model's own where that is on this disk. Else of a model on the Hub all but the weights
    is downloaded, and a folder is made for as long as this context lasts: its weight files have the
    real headers and lengths and take no room, and their weights are zeros. Pickled weights have no
    headers; they are downloaded.

    Raises:
        CheckpointError, ResourceError, MissingPackageError: as `resolve_source`.
    """
    described = (
        None if find_folder(model) is not None or _is_offline() else fetch_description(model)
    )
    if described is None or _has_weights(described.folder):
        yield Outline(resolve_source(model))
        return
    heads = _read_heads(described)
    if not heads:
        yield Outline(resolve_source(model))
        return
    with tempfile.TemporaryDirectory(prefix="quantkit-plan-") as place:
        folder = Path(place)
        for name in list_described(described.folder):
            # A copy: what links out of its folder is refused.
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(join_inside(described.folder, name), folder / name)
        for name, head in heads.items():
            _write_outline(join_inside(folder, name), head)
        absent = sum(head.size for head in heads.values())
        try:
            yield Outline(Source(described.name, folder, described.revision), absent)
        except (CheckpointError, PlanError) as error:
            found = _name_model(error, str(folder), described.name)
        else:
            return
    raise found


def _name_model(
    error: CheckpointError | PlanError, folder: str, model: str
) -> CheckpointError | PlanError:
    """The same error with the model's name: the folder is gone when somebody reads it."""
    if isinstance(error, PlanError):
        return PlanError([problem.replace(folder, model) for problem in error.problems])
    return CheckpointError(str(error).replace(folder, model))


def _is_offline() -> bool:
    try:
        from huggingface_hub import constants
    except ImportError:
        # Whatever is asked of the Hub next says what to install.
        return True
    return bool(constants.HF_HUB_OFFLINE)


def _has_weights(folder: Path) -> bool:
    """Whether all weight files of one kind were downloaded before."""
    kinds = [list_shards(folder, index) for index in INDEXES]
    return any(names and all((folder / name).is_file() for name in names) for names in kinds)


def _read_heads(described: Source) -> dict[str, _Head]:
    """Return the beginning of each safetensors file by name; empty where there are none."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import RemoteEntryNotFoundError

    repo = described.name.partition("@")[0]
    names = list_shards(described.folder, INDEXES[0])
    addresses = [hf_hub_url(repo, name, revision=described.revision) for name in names]
    with explaining(described.name, repo, described.revision):
        try:
            with ThreadPoolExecutor(_CONNECTIONS) as pool:
                return dict(zip(names, pool.map(_read_head, addresses), strict=True))
        except RemoteEntryNotFoundError:
            if len(names) == 1:
                return {}
            raise_alone(
                CheckpointError(
                    f"model {described.name!r}: its index names weight files that the Hub does "
                    f"not have"
                )
            )


def _read_head(address: str) -> _Head:
    start, size = _read_range(address, 0, _FIRST_BYTES)
    needed = 8 + int.from_bytes(start[:8], "little")
    # A claim that cannot be is left to the reader of the file.
    if len(start) < needed <= min(size, MAX_HEADER_BYTES):
        start += _read_range(address, len(start), needed - len(start))[0]
    return _Head(start[:needed], size)


def _read_range(address: str, first: int, count: int) -> tuple[bytes, int]:
    """Return up to `count` bytes of a file from byte `first`, and the file's length."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    asked: Mapping[str, str] = {
        **build_hf_headers(),
        "Range": f"bytes={first}-{first + count - 1}",
        "Accept-Encoding": "identity",
    }
    with http_stream_backoff("GET", address, headers=asked, follow_redirects=True) as response:
        hf_raise_for_status(response)
        content, skipped = bytearray(), 0 if response.status_code == 206 else first
        for piece in response.iter_bytes():
            content += piece
            # Without ranges the whole file would come.
            if len(content) >= skipped + count:
                break
        return bytes(content[skipped : skipped + count]), _find_size(response)


def _find_size(response: Any) -> int:
    """The length of the file, of which the answer may be a part."""
    match = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
    told = match.group(1) if match else response.headers.get("Content-Length", "")
    if not re.fullmatch(r"\d{1,18}", told, re.ASCII) or int(told) > _MOST_BYTES:
        raise CheckpointError(f"the Hub says {told!r:.40}, which is no length of a weight file")
    return int(told)


def _write_outline(path: Path, head: _Head) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), path.open("wb") as file:
        file.write(head.header)
        file.truncate(head.size)
