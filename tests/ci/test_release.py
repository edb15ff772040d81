"""Whole pipelines on a small model: a plan, a job, its gate, the Hub."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.ci.forge import Forge
from tests.ci.stage import GITHUB_TOKEN, Stage, add_model, make_stage
from tests.cli.running import ROOT
from tests.helpers import make_pico_model
from tests.hub import LFS_PUT, WRITE_TOKEN, HubServer

pytestmark = pytest.mark.integrations


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_model(tmp_path_factory.mktemp("pico") / "model")


def copy_tree(target: Path) -> None:
    """Copy what a clone of the working tree would hold."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in names.rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def test_what_passes_goes_from_a_fresh_clone_to_the_hub(pico: Path, tmp_path: Path) -> None:
    """Installed by the step from a clone, planned on a pull request, released on a tag.

    A changed byte is refused afterwards, and a dry run sends nothing.
    pip finds the other packages in this environment, so that nothing is downloaded.
    """
    copy_tree(tmp_path / "clone")
    stage = Stage(make_stage(tmp_path).folder, tmp_path / "clone" / "ci" / "steps.sh")
    (stage.folder / "bin" / "quantkit").unlink()
    add_model(stage, pico)
    recipe = {"QUANTKIT_RECIPE": "recipe.yaml", "PYTHONPATH": sysconfig.get_path("purelib")}
    output = stage.folder / "checkout" / "out"
    installed = stage.run("install", **recipe, PIP_NO_BUILD_ISOLATION="0", PIP_NO_INDEX="1")
    assert installed.returncode == 0, installed.stderr
    with Forge() as forge, HubServer() as hub:
        planned = stage.run("plan", **recipe, **stage.pull_request(forge.url))
        released = stage.run(
            "release",
            **recipe,
            QUANTKIT_REPO="alice/pico-w8a16",
            QUANTKIT_TAG="v1.0",
            **hub.environment(stage.folder / "home", WRITE_TOKEN),
        )
        sent = hub.find_requests(LFS_PUT)
        shown = stage.run(
            "publish",
            QUANTKIT_OUTPUT="out",
            QUANTKIT_REPO="alice/other",
            QUANTKIT_DRY_RUN="true",
            **recipe | hub.environment(stage.folder / "home", WRITE_TOKEN),
        )
        weights = output / "compressed-tensors" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        refused = stage.run(
            "publish",
            QUANTKIT_OUTPUT="out",
            QUANTKIT_REPO="alice/other",
            **recipe | hub.environment(stage.folder / "home", WRITE_TOKEN),
        )
        content[-1] ^= 1

    assert planned.returncode == 0, planned.stderr
    [body] = forge.bodies()
    assert "**No problem found.**" in body
    assert "| compressed-tensors | " in body
    assert released.returncode == 0, released.stderr
    report = (output / "report" / "report.md").read_text()
    assert "✅ PASS" in report
    assert stage.summary.startswith(f"{body}\n{report}\n### Published\n")
    assert stage.outputs["verdict"] == "PASS"
    assert f"\n    url          {hub.endpoint}/alice/pico-w8a16" in stage.summary
    files = hub.files("alice/pico-w8a16", "v1.0")
    assert bytes(content) in files.values()
    assert "README.md" in files
    assert hub.repos["alice/pico-w8a16"].private
    assert len(sent) > 0
    assert shown.returncode == 0, shown.stderr
    assert "### What would be published\n" in stage.summary
    assert refused.returncode == 2
    assert "## ❌ quantkit publish: exit code 2\n" in stage.summary
    assert list(hub.repos) == ["alice/pico-w8a16"]
    assert WRITE_TOKEN not in released.stdout + released.stderr + stage.summary
    assert all(WRITE_TOKEN.encode() not in content for content in files.values())


def test_what_fails_the_gate_is_shown_and_not_published(pico: Path, tmp_path: Path) -> None:
    """The report in the summary, the verdict in the outputs, exit code 3, no word to the Hub."""
    stage = make_stage(tmp_path)
    add_model(stage, pico)
    with HubServer() as hub:
        done = stage.run(
            "release",
            QUANTKIT_RECIPE="recipe.yaml",
            QUANTKIT_OVERRIDES="gate.max_kl=1e-9\nquantize.group_size=64",
            QUANTKIT_REPO="alice/pico",
            **hub.environment(stage.folder / "home", WRITE_TOKEN),
        )

    assert done.returncode == 3, done.stderr
    output = stage.folder / "checkout" / "out"
    report = (output / "report" / "report.md").read_text()
    assert "❌ FAIL" in report
    assert stage.summary == f"{report}\n"
    assert stage.outputs == {
        "exit-code": "3",
        "verdict": "FAIL",
        "output": "out",
        "report": "out/report/report.html",
        "junit": "out/report/junit.xml",
    }
    assert (output / "report" / "junit.xml").is_file()
    assert "::error title=quantkit::the verdict is FAIL (exit code 3)" in done.stderr
    assert hub.requests == []
    assert GITHUB_TOKEN not in stage.seen


def test_what_the_recipe_publishes_gets_the_tag_of_the_run(pico: Path, tmp_path: Path) -> None:
    """The recipe knows no tag of a pipeline: it is set on its commit, and nothing is sent twice."""
    stage = make_stage(tmp_path)
    add_model(stage, pico)
    with HubServer() as hub:
        done = stage.run(
            "release",
            QUANTKIT_RECIPE="recipe.yaml",
            QUANTKIT_OVERRIDES="publish.repo=alice/pico\npublish.revision=next",
            QUANTKIT_TAG="v1.0",
            **hub.environment(stage.folder / "home", WRITE_TOKEN),
        )
        repo = hub.repos["alice/pico"]

    assert done.returncode == 0, done.stderr
    assert repo.refs["refs/tags/v1.0"] == repo.refs["refs/heads/next"]
    assert repo.refs["refs/heads/main"] != repo.refs["refs/heads/next"]
    assert stage.summary.count("### Published") == 2
    assert "there is nothing to send" in stage.summary
