from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from quantkit.errors import OutputError
from quantkit.records import Verdict
from quantkit.report import write_reports
from quantkit.report.evidence import evidence_sections, recipe_changes, recipe_text
from tests.report.hostile import make_hostile_report
from tests.report.sample import RECIPE, make_evidence, make_report

NAMES = ["junit.xml", "report.html", "report.json", "report.md"]


@pytest.mark.parametrize("verdict", ["PASS", "FAIL", "INCONCLUSIVE", "UNJUDGED"])
def test_every_form_is_written_and_says_the_verdict(tmp_path: Path, verdict: Verdict) -> None:
    """Four files appear, nothing else, and the verdict is in each one that has to say it."""
    folder = tmp_path / "deep" / "report"

    paths = write_reports(make_report(verdict), folder)

    assert sorted(paths) == sorted(entry.name for entry in folder.iterdir()) == NAMES
    assert json.loads(paths["report.json"].read_bytes())["verdict"] == verdict
    assert verdict in paths["report.md"].read_text(encoding="utf-8")
    assert verdict in paths["report.html"].read_text(encoding="utf-8")
    failures = [f.get("type") for f in ET.parse(paths["junit.xml"]).iter("failure")]
    assert (verdict in failures) == (verdict in ("FAIL", "INCONCLUSIVE"))


def test_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    """Nothing of the clock or of the folder gets into a report."""
    first = write_reports(make_report(), tmp_path / "a")
    second = write_reports(make_report(), tmp_path / "b")

    assert all(first[name].read_bytes() == second[name].read_bytes() for name in NAMES)


def test_hostile_text_can_be_written(tmp_path: Path) -> None:
    """A name that has no form in UTF-8 stops no report."""
    assert sorted(write_reports(make_hostile_report(), tmp_path)) == NAMES


def test_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    """A file in the place of the folder is the user's to mend."""
    (tmp_path / "report").write_text("in the way")

    with pytest.raises(OutputError, match=r"cannot write .*report"):
        write_reports(make_report(), tmp_path / "report")


def test_failure_of_a_renderer_leaves_no_file(tmp_path: Path) -> None:
    """Evidence that JSON has no form for is found before anything is written."""
    with pytest.raises(TypeError):
        write_reports(replace(make_report(), evidence={"x": object()}), tmp_path / "report")

    assert list(tmp_path.iterdir()) == []


def test_reports_need_no_torch() -> None:
    """Table rows and reports are made without the packages that need seconds to import."""
    code = "import sys, quantkit.report; print({'torch', 'transformers'} & {*sys.modules})"

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stdout == "set()\n"


def test_evidence_is_laid_out_with_units() -> None:
    """Bytes and seconds are for people; hashes are whole; layers and recipe are elsewhere."""
    sections = {
        s.title: dict(s.rows) for s in evidence_sections({**make_evidence(), "layers": [1]})
    }

    assert sections["Timings"] == {
        "seconds · prepare": "1.23 s",
        "seconds · quantize": "1 min 2 s",
        "seconds · gate": "1 min 23 s",
        "peak_memory_bytes": "813 MB (812,646,400 bytes)",
        "matmul_probe · device": "cpu",
        "matmul_probe · float32_gflops": "115.2",
        "matmul_probe · bfloat16_gflops": "411.6",
    }
    assert sections["Model"]["files · config.json"] == "1c" * 32
    assert sections["Model"]["revision"] == "–"
    assert sections["Artifacts"]["1 · tensor_bytes"] == "4.11 MB (4,113,408 bytes)"
    assert not {"Recipe", "Layers", "Verdict"} & set(sections)


def test_short_evidence_has_neither_the_machine_nor_empty_rows() -> None:
    """report.json has them; a comment has better uses for its room."""
    evidence = make_evidence()
    timings = {
        "seconds": {"gate": 83.21},
        "predicted": {"disk_bytes": 4096, "probe": {"call_seconds": 1.8e-6}},
        "matmul_probe": {"float32_gflops": 115.2},
    }
    found = evidence_sections({**evidence, "timings": timings, "statistics": None}, short=True)
    sections = {section.title: dict(section.rows) for section in found}

    assert sections["Timings"] == {
        "seconds · gate": "1 min 23 s",
        "predicted · disk_bytes": "4.10 kB (4,096 bytes)",
    }
    assert "revision" not in sections["Model"]
    assert "Statistics" not in sections["General"]
    assert sections["Model"]["files · config.json"] == "1c" * 32


def test_recipe_is_found_in_every_form_that_evidence_has() -> None:
    """Verbatim text, text with overrides, or a mapping; without a recipe there is none."""
    assert recipe_text({"recipe": RECIPE}) == recipe_text({"recipe": {"text": RECIPE}}) == RECIPE
    assert recipe_text({"recipe": {"version": 1, "export": ({"format": "x"},)}}) == (
        "version: 1\nexport:\n- format: x\n"
    )
    assert recipe_text({}) is recipe_text({"recipe": None}) is None
    assert recipe_changes({"recipe": {"text": "", "overrides": ["a=1"]}}) == ("a=1",)
    assert recipe_changes({"recipe": RECIPE, "overrides": ("b=2",)}) == ("b=2",)
    assert recipe_changes({}) == ()
