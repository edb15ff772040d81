"""quantkit.json and report.json: what publishing, the gate, sweeps and `inspect` go by."""

from __future__ import annotations

import contextlib
import json
import random
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import quantkit
from quantkit.errors import QuantkitError
from quantkit.evidence import read_evidence
from quantkit.formats.inspected import Inspection
from quantkit.gating import check_recorded_files, find_gate_spec
from quantkit.publishing.checking import check_output
from quantkit.publishing.client import say_nothing
from quantkit.publishing.contents import Contents
from quantkit.publishing.layout import compose
from quantkit.report.usage import Place
from quantkit.sweeping.outcomes import read_outcome
from quantkit.sweeping.records import Ended, SweepJob
from tests.fuzzing.corpus import copying, pico_model, root
from tests.fuzzing.damage import BYTES
from tests.fuzzing.reader import Reader
from tests.fuzzing.trees import damage_json
from tests.pico_jobs import make_pico_job
from tests.publishing.outputs import judge

_PLACE = Place("owner/name", on_hub=True)


@lru_cache(maxsize=1)
def _output() -> Path:
    """A finished output of a job, with a PASS that nobody waited for."""
    folder = root() / "job"
    folder.mkdir()
    (folder / "model").symlink_to(pico_model())
    recipe = make_pico_job(folder, quantize={"scheme": "w8a16", "method": "rtn", "group_size": 32})
    result = quantkit.quantize(recipe, gate=False, device="cpu")
    return judge(result, "PASS", pico_model()).output


def _read(folder: Path) -> object:
    """As all commands do that meet an output: each refuses for itself, and none falls over."""
    found: Inspection = quantkit.inspect(folder)
    with contextlib.suppress(QuantkitError):
        evidence = read_evidence(found.folder)
        check_recorded_files(evidence, found.folder)
        find_gate_spec(None, evidence, "text.txt", ())
    loaded: Any = SimpleNamespace(output=folder, model="model")
    read_outcome(SweepJob("pico", "recipe", loaded, (), folder / "job.log"), Ended(0, "{}", 1.0))
    checked = check_output(folder, say_nothing)
    return compose(checked, _PLACE, Contents(), None)


def _damage_both(draw: random.Random, folder: Path) -> None:
    """Change the evidence in both places, so that they agree, or the report beside it."""
    report = folder / "report" / "report.json"
    document = json.loads(report.read_bytes())
    evidence = document.pop("evidence")
    if draw.random() < 0.5:
        text = damage_json(draw, json.dumps(evidence).encode())
        (folder / "quantkit.json").write_bytes(text)
        rest = json.dumps(document).encode()
    else:
        rest, text = damage_json(draw, json.dumps(document).encode()), json.dumps(evidence).encode()
    if rest.endswith(b"}"):
        report.write_bytes(rest[:-1] + b', "evidence": ' + text + b"}")


READERS = (
    Reader(
        name="evidence",
        build=copying(output=_output),
        damages={
            "quantkit.json": (damage_json, damage_json, *BYTES),
            "report/report.json": (damage_json, damage_json, *BYTES),
        },
        read=_read,
        edit=_damage_both,
    ),
)
