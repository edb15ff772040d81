"""Names in the answers of a Hub, asked by its real client."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import pytest

from quantkit.checkpoint.outline import outline_source
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.publishing.client import open_hub
from quantkit.publishing.contents import look
from tests.hub import HubServer
from tests.security.carriers import Carrier, Models
from tests.security.names import SECRET, Place

REPO = "alice/model"


def make_hub_carriers(hub: HubServer, patch: pytest.MonkeyPatch) -> tuple[Carrier, ...]:
    """Return the carriers; each repository is made anew for each name."""

    def prepare(place: Place, models: Models) -> None:
        hub.repos.clear()
        hub.connect(patch, place.folder / "home")
        (place.outside / SECRET).write_text("not to be written to")

    def offer(files: Mapping[str, bytes], read: Callable[[], object]) -> str:
        hub.add_repo(REPO, files)
        read()
        return ""

    def download(place: Place, name: str) -> str:
        index = json.dumps({"weight_map": {"w": name}}).encode()
        described = {"config.json": b"{}", "model.safetensors.index.json": index}
        return offer({**described, name: b"weights"}, lambda: open_checkpoint(resolve_source(REPO)))

    def outline(place: Place, name: str) -> str:
        index = json.dumps({"weight_map": {"w": name}}).encode()
        described = {"config.json": b"{}", "model.safetensors.index.json": index}

        def read() -> None:
            with outline_source(REPO) as found:
                open_checkpoint(found.source)

        return offer({**described, name: b"weights"}, read)

    def list_templates(place: Place, name: str) -> str:
        template = f"additional_chat_templates/{name}.jinja"
        files = {"config.json": b"{}", "model.safetensors": b"weights", template: b"{{ 1 }}"}
        return offer(files, lambda: resolve_source(REPO))

    def look_before(place: Place, name: str) -> str:
        files = {f"{name}/quantkit.json": b"{}", f"{name}/report/report.json": b"{}"}
        return offer(files, lambda: look(open_hub(), REPO, "main"))

    return (
        Carrier("Hub, index (download)", "", prepare, download, remote=True),
        Carrier("Hub, index (plan)", "", prepare, outline, remote=True),
        Carrier(
            "Hub, list of files (download)",
            "",
            prepare,
            list_templates,
            harmless="what is no file of the templates' folder stays on the Hub",
            remote=True,
        ),
        Carrier(
            "Hub, list of files (publish)",
            "",
            prepare,
            look_before,
            harmless="there is no evidence in a folder at the root",
            remote=True,
        ),
    )
