"""The files beside the weights that an artifact takes over from its checkpoint as they are.

Only named files travel: tokenizers, chat templates, the generation config and the terms. Code,
pickles and whatever else lies in the folder stay behind.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from quantkit.checkpoint.paths import join_inside
from quantkit.checkpoint.reader import Checkpoint, read_pieces
from quantkit.durable import write_atomically
from quantkit.errors import writing


def copy_side_files(checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """Copy the checkpoint's side files to `folder`, under the same relative names.

    Returns:
        Name relative to `folder` -> sha256.

    Raises:
        CheckpointError: a file cannot be read or links out of the checkpoint.
        ResourceError, OutputError: a file cannot be written.
    """
    root = checkpoint.source.folder
    hashes = {}
    for path in checkpoint.side_files:
        name = path.relative_to(root).as_posix()
        target = folder / name
        with writing(target):
            target.parent.mkdir(exist_ok=True)
        hashes[name] = _copy(join_inside(root, name), target)
    return hashes


def _copy(source: Path, target: Path) -> str:
    """Copy one file and return its sha256."""
    digest = hashlib.sha256()

    def write(beside: Path) -> None:
        with beside.open("wb") as handle:
            for piece in read_pieces(source):
                digest.update(piece)
                handle.write(piece)

    write_atomically(target, write)
    return digest.hexdigest()
