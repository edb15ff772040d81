"""statistics.json: read with bounds, and refused unless it is what `calibrate` writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.headers import parse_json
from quantkit.checkpoint.paths import join_inside
from quantkit.errors import CalibrationError, CheckpointError
from quantkit.staging import STATISTICS

SCHEMA = 1

_MAX_BYTES = 16 << 20
"""A block takes a kilobyte, and one of many experts a hundred."""
_MAX_FEATURES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KINDS: Mapping[str, type] = {
    "model": dict,
    "calibration": dict,
    "spec": dict,
    "compute": dict,
    "holds": dict,
    "blocks": dict,
    "windows_sha256": str,
}


def read_manifest(folder: Path) -> tuple[bytes, Mapping[str, Any]]:
    """Return the bytes of a folder's manifest, and what it says.

    Raises:
        CalibrationError: there is none, it is no file of the folder, or it is not what this version
            writes.
    """
    try:
        path = join_inside(folder, STATISTICS)
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except CheckpointError as error:
        raise CalibrationError(str(error)) from None
    except OSError as error:
        raise CalibrationError(
            f"{folder} holds no statistics ({STATISTICS}: {error.strerror}): make them with "
            f"`quantkit calibrate`"
        ) from error
    try:
        if len(content) > _MAX_BYTES:
            raise CheckpointError(f"it is larger than {_MAX_BYTES >> 20} MB")
        manifest = parse_json(content, str(path))
    except CheckpointError:
        manifest = {}
    if manifest.get("schema") != SCHEMA:
        raise CalibrationError(
            f"{path} is not a manifest of this version (schema {SCHEMA}): calibrate again"
        )
    wrong = [key for key, kind in _KINDS.items() if not isinstance(manifest.get(key), kind)]
    wrong = wrong or [key for key, sound in _check_parts(manifest).items() if not sound]
    if wrong:
        raise CalibrationError(f"{path} is damaged ({', '.join(wrong)}): calibrate again")
    return content, manifest


def _check_parts(manifest: Mapping[str, Any]) -> dict[str, bool]:
    """Say of each part of a manifest whether it has the shape that its readers go by."""
    model, told, holds = manifest["model"], manifest["calibration"], manifest["holds"]
    files, notes = model.get("files"), told.get("notes")
    return {
        "model": isinstance(model.get("name"), str) and _are_texts(files),
        "calibration": isinstance(told.get("source"), str)
        and _is_digest(told.get("sha256"))
        and isinstance(notes, list)
        and all(isinstance(note, str) for note in notes),
        "holds": isinstance(holds.get("key_value"), bool)
        and isinstance(holds.get("fisher"), bool)
        # It says why there are none.
        and isinstance(holds.get("no_key_value"), type(None) if holds["key_value"] else str),
        "windows_sha256": _is_digest(manifest["windows_sha256"]),
        "blocks": all(_is_block(about, holds) for about in manifest["blocks"].values()),
    }


def _is_block(about: object, holds: Mapping[str, Any]) -> bool:
    """Whether something describes the file of a block, and has what the manifest says it holds."""
    if not isinstance(about, dict) or not _is_digest(about.get("sha256")):
        return False
    groups = about.get("groups")
    return (
        isinstance(groups, dict)
        and all(map(_is_group, groups.values()))
        and (not holds.get("key_value") or _is_count(about.get("kv_tokens")))
        and (not holds.get("fisher") or _is_digest(about.get("fisher_sha256")))
    )


def _is_group(about: object) -> bool:
    return (
        isinstance(about, dict)
        and isinstance(about.get("layers"), list)
        and _is_count(about.get("features"))
        and about["features"] <= _MAX_FEATURES
        and _is_count(about.get("tokens"))
        and isinstance(about.get("bfloat16"), bool)
    )


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and bool(_SHA256.fullmatch(value))


def _are_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
