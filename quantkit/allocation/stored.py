"""The choice of schemes in a job's workspace, so that a resumed job goes on with the same one.

<output>.partial/workspace/allocation.json
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from quantkit.durable import write_text
from quantkit.records import AllocatedUnit, Allocation, UnitCost
from quantkit.workspace import Workspace, read_document

_FILE = "allocation.json"


def store_allocation(workspace: Workspace, allocation: Allocation) -> None:
    """Write a choice; it is on the disk when this returns.

    Solved blocks that lie there belong to a choice that was lost, and go.

    Raises:
        ResourceError, OutputError: it cannot be written.
    """
    for path in workspace.folder.glob("block-*"):
        path.unlink()
    found = asdict(allocation)
    document = {"allocation": found, "sha256": _digest(found)}
    write_text(workspace.folder / _FILE, json.dumps(document, indent=2) + "\n")


def load_allocation(workspace: Workspace) -> Allocation | None:
    """Return the stored choice; None where there is none, or a damaged one.

    Raises:
        OutputError: as `read_document`.
    """
    document = read_document(workspace.folder / _FILE)
    if document is None:
        return None
    found = document.get("allocation")
    if not isinstance(found, dict) or document.get("sha256") != _digest(found):
        return None
    try:
        units = tuple(
            AllocatedUnit(
                tuple(unit["layers"]),
                tuple(UnitCost(**cost) for cost in unit["costs"]),
                unit["chosen"],
            )
            for unit in found["units"]
        )
        return Allocation(**{**found, "units": units})
    except (KeyError, TypeError):
        return None


def _digest(found: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
