"""The action, the GitLab template and the documented pipelines agree with the script and hold."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import yaml

from tests.ci.stage import STEPS
from tests.cli.running import ROOT

ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
SPEC, TEMPLATE = yaml.safe_load_all((ROOT / "ci" / "gitlab.yml").read_text())
SCRIPT = STEPS.read_text()
STEP_NAMES = ("install", "plan", "quantize", "publish", "release")
PAGE = (ROOT / "docs" / "ci.md").read_text()
EXAMPLES = [
    yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
]

# Of GitHub's metadata syntax: what there may be beside what must be.
KEYS_OF_ACTION = {"name", "author", "description", "inputs", "outputs", "runs", "branding"}
KEYS_OF_STEP = {"name", "id", "if", "uses", "with", "shell", "run", "env", "working-directory"}


def read_variables() -> set[str]:
    """The variables that the script reads."""
    body = SCRIPT[SCRIPT.index("set -euo pipefail") :]
    return set(re.findall(r"\$\{?(QUANTKIT_[A-Z_]+|HF_TOKEN|GITHUB_TOKEN)\b", body))


def documented_steps() -> list[dict[str, Any]]:
    """All steps of the documented workflows."""
    jobs = [job for each in EXAMPLES if isinstance(each, dict) for job in _jobs(each)]
    loose = [step for each in EXAMPLES if isinstance(each, list) for step in each]
    return [step for job in jobs for step in job["steps"]] + loose


def _jobs(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return list(workflow.get("jobs", {}).values())


def test_the_script_is_sound() -> None:
    """bash reads it, it stops at the first error, and its steps are those that it names."""
    subprocess.run(["bash", "-n", str(STEPS)], check=True)
    assert STEPS.stat().st_mode & 0o111
    assert "\nset -euo pipefail\n" in SCRIPT
    assert f"usage: ci/steps.sh {'|'.join(STEP_NAMES)}" in SCRIPT
    cases = SCRIPT[SCRIPT.index('case "${1:-}" in') :]
    assert re.findall(r"^  (\w+)\)", cases, flags=re.MULTILINE) == list(STEP_NAMES)


def test_every_variable_is_read_told_and_given() -> None:
    """By the script, by its first lines, by the action or the template."""
    head = SCRIPT[: SCRIPT.index("set -euo pipefail")]
    given = {name for step in ACTION["runs"]["steps"] for name in step.get("env", {})}
    variables = {
        name
        for job in TEMPLATE.values()
        for name in job["variables"]
        if name.startswith("QUANTKIT_") and name not in ("QUANTKIT_SOURCE", "QUANTKIT_REF")
    }
    assert given - {"QUANTKIT_STEP"} <= read_variables()
    assert variables <= read_variables()
    assert {name for name in read_variables() if name not in head} == set()
    elsewhere = {"QUANTKIT_VENV", "QUANTKIT_PLAN_FILE", "QUANTKIT_GITLAB_TOKEN"}
    assert read_variables() - given == elsewhere


def test_the_action_is_what_github_takes() -> None:
    """Its keys, and for each input and output a description."""
    assert set(ACTION) <= KEYS_OF_ACTION
    assert ACTION["runs"]["using"] == "composite"
    assert all(set(each) <= {"description", "required", "default"} for each in _inputs().values())
    assert all(each["description"] for each in [*_inputs().values(), *ACTION["outputs"].values()])
    for step in ACTION["runs"]["steps"]:
        assert set(step) <= KEYS_OF_STEP
        assert ("run" in step) != ("uses" in step)
        assert ("run" in step) == ("shell" in step)
    # GitHub makes strings of all inputs: a boolean would be compared with "true" in vain.
    assert all(isinstance(each.get("default", ""), str) for each in _inputs().values())


def _inputs() -> dict[str, dict[str, Any]]:
    inputs: dict[str, dict[str, Any]] = ACTION["inputs"]
    return inputs


def test_inputs_and_outputs_of_the_action_exist() -> None:
    """Each input is used, each that is used exists, and the script sets each output."""
    text = (ROOT / "action.yml").read_text()
    used = set(re.findall(r"\binputs\.([\w-]+)", text))
    assert used == set(_inputs())
    outputs = set(re.findall(r"steps\.quantkit\.outputs\.([\w-]+)", text))
    assert outputs == set(ACTION["outputs"])
    assert set(re.findall(r"^ +emit ([\w-]+) ", SCRIPT, flags=re.MULTILINE)) == outputs


def test_no_input_is_written_into_a_command() -> None:
    """Neither in the action nor in a documented workflow nor in the template."""
    commands = [
        step["run"] for step in [*ACTION["runs"]["steps"], *documented_steps()] if "run" in step
    ]
    assert len(commands) >= 3
    assert not [command for command in commands if "${{" in command]
    lines = [
        line
        for job in TEMPLATE.values()
        for line in [*job.get("before_script", []), *job.get("script", [])]
    ]
    assert not [line for line in lines if "$[[" in line]


def test_actions_of_others_are_pinned_by_their_commit() -> None:
    """With the version beside it for people."""
    others = [
        step["uses"]
        for step in [*ACTION["runs"]["steps"], *documented_steps()]
        if "uses" in step and not step["uses"].startswith("OWNER/quantkit@")
    ]
    assert len(others) >= 5
    assert all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", each) for each in others)
    assert len(re.findall(r"uses: actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+\n", PAGE)) >= 5


def test_documented_workflows_name_inputs_that_exist() -> None:
    """And commands; each has its rights written down, and strangers never get secrets."""
    ours = [step for step in documented_steps() if "quantkit@" in step.get("uses", "")]
    assert len(ours) >= 4
    assert all(set(step["with"]) <= set(_inputs()) for step in ours)
    assert {step["with"]["command"] for step in ours} == {"plan", "quantize", "publish", "release"}
    workflows = [each for each in EXAMPLES if isinstance(each, dict) and "jobs" in each]
    # YAML 1.1 reads the key `on` as true.
    assert [list(each[True]) for each in workflows] == [
        ["pull_request"],
        ["push"],
        ["schedule", "workflow_dispatch"],
    ]
    assert [each["permissions"] for each in workflows] == [
        {"contents": "read", "pull-requests": "write"},
        {"contents": "read"},
        {"contents": "read"},
    ]


def test_the_template_and_its_example_name_inputs_that_exist() -> None:
    """All are used, and those without a default are given."""
    inputs = SPEC["spec"]["inputs"]
    text = (ROOT / "ci" / "gitlab.yml").read_text()
    assert set(re.findall(r"\$\[\[ inputs\.(\w+) \]\]", text)) == set(inputs)
    [example] = [each for each in EXAMPLES if isinstance(each, dict) and "include" in each]
    [include] = example["include"]
    assert include["file"] == "ci/gitlab.yml"
    assert set(include["inputs"]) <= set(inputs)
    assert {name for name, each in inputs.items() if "default" not in each} <= set(
        include["inputs"]
    )
    jobs = {name for name in TEMPLATE if not name.startswith(".")}
    assert jobs == {"quantkit-plan", "quantkit-release"}
    assert set(example) - {"include"} <= jobs


@pytest.mark.parametrize("job", ["quantkit-plan", "quantkit-release"])
def test_jobs_of_the_template_run_steps_that_exist(job: str) -> None:
    """One step each, behind the install of the job that they extend."""
    assert TEMPLATE[job]["extends"] == ".quantkit"
    [line] = TEMPLATE[job]["script"]
    assert line.split()[-2:] == [".quantkit/source/ci/steps.sh", job.removeprefix("quantkit-")]
    assert TEMPLATE[".quantkit"]["before_script"][-1].endswith("steps.sh install")
