"""Outputs of real jobs on pico models, with the judgement of a gate that they did not wait for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import quantkit
from quantkit.evidence import write_evidence
from quantkit.records import Result, Verdict
from quantkit.report import write_model_card, write_reports
from tests.helpers import make_pico_model
from tests.pico_jobs import make_pico_job
from tests.report.sample import make_judgement

LICENSE = "---\nlicense: apache-2.0\nlanguage: en\n---\n# Pico\n"


def make_output(folder: Path, *exports: dict[str, object]) -> Path:
    """Return an output with the verdict PASS; the weights come in several files."""
    return make_result(folder, *exports).output


def make_result(folder: Path, *exports: dict[str, object]) -> Result:
    """Return the result of such a job."""
    sharded = {"format": "compressed-tensors", "max_shard_bytes": 1_000_000}
    if not (folder / "model").exists():
        make_pico_model(folder / "model", hidden=192, intermediate=768, layers=4)
    recipe = make_pico_job(
        folder,
        exports or (sharded,),
        quantize={"scheme": "w8a16", "method": "rtn", "group_size": 32},
    )
    (folder / "model" / "README.md").write_text(LICENSE)
    result = quantkit.quantize(recipe, gate=False, device="cpu")
    return judge(result, "PASS", folder / "model")


def judge(result: Result, verdict: Verdict, model: Path) -> Result:
    """Write evidence, reports and cards anew, as if a gate had come to `verdict`."""
    judgement = make_judgement(verdict)
    rows = tuple(replace(row, judgement=judgement) for row in result.report.artifacts)
    report = replace(
        result.report,
        artifacts=rows,
        verdict=verdict,
        evidence={**result.report.evidence, "verdict": verdict},
    )
    write_evidence(report.evidence, result.output)
    write_reports(report, result.output / "report")
    for artifact, row in zip(result.artifacts, report.artifacts, strict=True):
        write_model_card(report, row, artifact.folder, model)
    return replace(result, verdict=verdict, report=report)


def edit_evidence(output: Path, **changes: Any) -> None:
    """Change keys of quantkit.json, and of its copy in report.json."""
    places = (output / "quantkit.json", output / "report" / "report.json")
    evidence, document = (json.loads(place.read_text()) for place in places)
    evidence |= changes
    document["evidence"] = evidence
    if "verdict" in changes:
        document["verdict"] = changes["verdict"]
    for place, content in zip(places, (evidence, document), strict=True):
        place.write_text(json.dumps(content))


def read_evidence(output: Path) -> dict[str, Any]:
    """Return what quantkit.json has."""
    found: dict[str, Any] = json.loads((output / "quantkit.json").read_text())
    return found
