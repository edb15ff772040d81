"""Write the bill of materials of quantkit in CycloneDX's JSON: what it is made of when it runs.

    bill.py OUTPUT   the packages of this environment that quantkit and its extras need

Versions are those of constraints.txt, licences those that licences.py finds. What only an extra
needs is `optional`; extras that are not set up here are named in the metadata. The same
environment, constraints and $SOURCE_DATE_EPOCH give the same bytes. See docs/supply.md.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import tomllib
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from licences import Rules, licence_of, read_rules
from packaging.requirements import Requirement
from pins import ROOT, canonical, read_pins

_BOM = "https://cyclonedx.org/schema/bom-1.6.schema.json"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://cyclonedx.org/quantkit")


@dataclass(frozen=True)
class Materials:
    """What quantkit needs, by name: what each needs in turn, and what all that is for."""

    needs: Mapping[str, frozenset[str]]
    required: frozenset[str]
    """Without these quantkit does not run; the others come with its extras."""
    left_out: tuple[str, ...]
    """Extras whose packages are not here."""


def main(output: Path) -> int:
    """Write the bill."""
    materials = find_materials()
    text = json.dumps(make_bill(materials), indent=2, sort_keys=True) + "\n"
    output.write_text(text, encoding="utf-8")
    words = f"{len(materials.needs)} packages, {len(materials.required)} of them required"
    print(f"bill of materials: {output}: {words}")
    return 0


def find_materials() -> Materials:
    """Follow what pyproject.toml asks for through the metadata of the packages that are here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    needs: dict[str, frozenset[str]] = {}
    for line in project["dependencies"]:
        _follow(Requirement(line), needs)
    required = frozenset(needs)
    left_out = []
    for extra, lines in extras.items():
        if extra == "dev":
            continue
        try:
            found = dict(needs)
            for line in lines:
                _follow(Requirement(line), found)
            needs = found
        except PackageNotFoundError:
            left_out.append(extra)
    return Materials(needs, required, tuple(sorted(left_out)))


def _follow(requirement: Requirement, needs: dict[str, frozenset[str]]) -> None:
    """Add a package and all that it needs to `needs`."""
    name = canonical(requirement.name)
    found = [
        wanted
        for line in distribution(name).requires or []
        for wanted in [Requirement(line)]
        if _applies(wanted, requirement.extras)
    ]
    before = needs.get(name)
    now = (before or frozenset()) | {canonical(wanted.name) for wanted in found}
    if before == now:
        return
    needs[name] = now
    for wanted in found:
        _follow(wanted, needs)


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def make_bill(materials: Materials) -> dict[str, Any]:
    """Return the document."""
    pins = {pin.key: pin.version for pin in read_pins(ROOT / "constraints.txt")}
    rules = read_rules()
    refs = {name: f"pkg:pypi/{name}@{pins[name]}" for name in materials.needs}
    own = _own_component()
    direct = sorted(set(materials.needs) & set(_direct()))
    graph = {own["bom-ref"]: [refs[name] for name in direct]} | {
        refs[name]: sorted(refs[need] for need in needs) for name, needs in materials.needs.items()
    }
    components = [
        _component(distribution(name), refs[name], pins[name], name in materials.required, rules)
        for name in sorted(materials.needs)
    ]
    body = {
        "$schema": _BOM,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "components": components,
        "dependencies": [
            {"ref": ref, "dependsOn": wanted} for ref, wanted in sorted(graph.items())
        ],
        "metadata": {
            "component": own,
            "timestamp": _timestamp(),
            "properties": [
                {"name": "quantkit:python", "value": ".".join(platform.python_version_tuple()[:2])},
                {"name": "quantkit:system", "value": f"{sys.platform} {platform.machine()}"},
                *(
                    {"name": "quantkit:extra-left-out", "value": name}
                    for name in materials.left_out
                ),
            ],
        },
    }
    # A name of this document that the same document has again.
    serial = uuid.uuid5(_NAMESPACE, json.dumps(body, sort_keys=True))
    return body | {"serialNumber": f"urn:uuid:{serial}"}


def _direct() -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra, lines in (("", project["dependencies"]), *project["optional-dependencies"].items()):
        if extra != "dev":
            yield from (canonical(Requirement(line).name) for line in lines)


def _own_component() -> dict[str, Any]:
    text = (ROOT / "quantkit" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    assert found is not None
    return {
        "type": "application",
        "bom-ref": f"pkg:pypi/quantkit@{found[1]}",
        "name": "quantkit",
        "version": found[1],
        "purl": f"pkg:pypi/quantkit@{found[1]}",
        "licenses": [{"license": {"id": "Apache-2.0"}}],
    }


def _component(
    package: Distribution, ref: str, version: str, required: bool, rules: Rules
) -> dict[str, Any]:
    name = canonical(package.metadata["Name"])
    reviewed = rules.reviewed.get(name)
    licence = reviewed["licence"] if reviewed else licence_of(package, rules)
    return {
        "type": "library",
        "bom-ref": ref,
        "name": name,
        "version": version,
        "purl": ref,
        "scope": "required" if required else "optional",
        "licenses": [{"expression": licence}] if licence else [],
    }


def _timestamp() -> str:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
