"""`quantkit plan --markdown FILE`."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Bench
from tests.cli.running import run_here


def test_the_page_has_every_artifact_and_says_what_the_terminal_says(bench: Bench) -> None:
    """Three formats, a row each; the plan itself is printed as ever."""
    exports = "[{format: compressed-tensors}, {format: gguf, type: Q8_0}, {format: onnx}]"
    arguments = ["--recipe", "recipe.yaml", "--markdown", "plan.md", "--set", f"export={exports}"]
    done = run_here("plan", *arguments, "--set", "quantize.method=rtn", folder=bench.folder)

    assert done.returncode == 0, done.stderr
    page = (bench.folder / "plan.md").read_text()
    sizes = [line.split(" | ")[0] for line in page.splitlines() if " smaller |" in line]
    assert sizes == ["| compressed-tensors", "| gguf Q8_0", "| onnx int4"]
    for name in ("layers", "time", "memory", "disk"):
        assert f"| **{name}** | " in page
        assert f"\n{name} " in done.stdout
    assert "| **size** |" not in page
    assert done.stdout.endswith("No problem found.\n")
    assert not (bench.folder / "plan.md.writing").exists()


def test_problems_are_written_and_the_exit_code_stays(bench: Bench) -> None:
    """Every problem of the plan, in the file and on stderr; the same mark as of a plan without."""
    asked = ["plan", "--recipe", "recipe.yaml", "--markdown", "plan.md"]
    bad = bench.recipe.read_text().replace("group_size: 32", "group_size: 128")
    bench.recipe.write_text(bad.replace("w4a16,", "w4a16, ignore: [nothing],"))
    done = run_here(*asked, folder=bench.folder)
    page = (bench.folder / "plan.md").read_text()

    assert done.returncode == 2
    assert done.stdout == ""
    assert page.splitlines()[2] == "## ❌ Plan: `recipe.yaml`"
    told = done.stderr.splitlines()
    assert f"**{told[0].removeprefix('error: ').removesuffix(':')}**" in page
    assert page.count("\n- ") == len(told) - 1 > 1
    assert "group_size 128 does not divide in_features 64" in page
    bench.recipe.write_text("version: 1\nscheme: w4a16\n")
    assert run_here(*asked, folder=bench.folder).returncode == 2
    again = (bench.folder / "plan.md").read_text()
    assert again != page
    assert again.splitlines()[0] == page.splitlines()[0]


@pytest.mark.parametrize("target", ["model", "absent/plan.md"])
def test_a_file_that_cannot_be_is_refused_before_any_work(bench: Bench, target: str) -> None:
    """A folder, and a folder that is not there; whatever the recipe."""
    asked = ["plan", "--recipe", "absent.yaml", "--markdown", target]
    done = run_here(*asked, folder=bench.folder)

    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --markdown {target}")
