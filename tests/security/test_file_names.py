"""No name that a stranger gives leads out of a folder, whoever reads it (docs/security.md)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import HubServer
from tests.security.attacking import attack_all
from tests.security.carriers import CARRIERS
from tests.security.conftest import OddJob
from tests.security.hub_carriers import make_hub_carriers
from tests.security.names import ATTACKS
from tests.security.table import render_table


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub whose answers are the attacker's."""
    with HubServer() as hub:
        yield hub


FEW = ("`..` first", "link out of the folder", "named pipe")


def test_a_few_names_are_refused_by_every_reader(tmp_path: Path) -> None:
    """One of each kind: a name, what lies there, and what keeps a reader waiting."""
    outcomes = attack_all(tmp_path, attacks=[each for each in ATTACKS if each.title in FEW])
    assert len(outcomes) > 2 * len(CARRIERS)
    assert not [
        (each.carrier.title, each.attack.title, each.found) for each in outcomes if each.is_hole
    ]


@pytest.mark.fuzz
def test_every_name_is_refused_by_every_reader(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing outside is read, written or waited for; what is passed over, is for a reason."""
    carriers = (*CARRIERS, *make_hub_carriers(hub, monkeypatch))
    outcomes = attack_all(tmp_path, carriers)
    print(render_table(outcomes))
    assert not [
        (each.carrier.title, each.attack.title, each.found) for each in outcomes if each.is_hole
    ]
    assert len(ATTACKS) >= 16
    assert {each.carrier for each in outcomes} == set(carriers)


def test_names_of_tensors_name_no_files(odd_job: OddJob) -> None:
    """They stand in headers alone: files of blocks and shards are numbered."""
    output = odd_job.result.output
    assert {*odd_job.after} - {*odd_job.before} == {output.name}
    names = [path.relative_to(output).as_posix() for path in output.rglob("*")]
    assert all(re.fullmatch(r"[\w./-]+", name) and ".." not in name for name in names)
