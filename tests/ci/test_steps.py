"""The steps of continuous integration, run as a runner runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ci.forge import Forge
from tests.ci.stage import GITHUB_TOKEN, HF_TOKEN, Stage, make_stage


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return make_stage(tmp_path)


def test_problems_become_a_comment_that_the_next_plan_replaces(stage: Stage) -> None:
    """One comment a recipe, of our account, wherever it lies among others.

    More comments than a page holds are there, and one of a stranger that looks like ours.
    """
    with Forge() as forge:
        variables = stage.pull_request(forge.url) | {"QUANTKIT_RECIPE": "recipe.yaml"}
        (stage.folder / "checkout" / "evaluation.txt").unlink()
        for number in range(120):
            forge.add(f"comment {number}", "somebody")
        codes = [stage.run("plan", **variables, HF_TOKEN=HF_TOKEN).returncode]
        [body] = forge.bodies()
        mark = body.splitlines()[0]
        forge.comments.insert(3, forge.comments.pop())
        forge.comments.insert(0, {"id": 1, "body": mark, "user": {"login": "somebody"}})
        (stage.folder / "checkout" / "recipe.yaml").write_text("version: 2\n")
        codes.append(stage.run("plan", **variables).returncode)

    assert codes == [2, 2]
    assert "## ❌ Plan: `recipe.yaml`" in body
    assert "1 problem found before any work" in body
    [next_body] = forge.bodies()
    assert next_body.startswith(f"{mark}\n")
    assert next_body != body
    assert forge.comments[0]["body"] == mark
    assert [each.method for each in forge.requests] == ["GET", "GET", "POST", "GET", "PATCH"]
    assert forge.requests[-1].path.startswith("/repos/acme/models/issues/comments/")
    assert {each.token for each in forge.requests} == {f"Bearer {GITHUB_TOKEN}"}
    assert stage.summary == f"{body}\n{next_body}\n"
    assert stage.outputs == {"exit-code": "2"}
    assert GITHUB_TOKEN not in stage.seen
    assert HF_TOKEN in stage.seen


@pytest.mark.parametrize(
    ("refusal", "token", "said"),
    [
        (403, GITHUB_TOKEN, "Resource not accessible by integration"),
        (None, "", "no github-token"),
        (None, 'x"\nurl = "http://elsewhere', "characters of no token"),
    ],
)
def test_without_a_comment_the_plan_counts_as_before(
    stage: Stage, refusal: int | None, token: str, said: str
) -> None:
    """A run for a fork may not comment: a warning, the summary, and the plan's exit code."""
    with Forge(refusal=refusal) as forge:
        variables = stage.pull_request(forge.url) | {"QUANTKIT_RECIPE": "absent.yaml"}
        done = stage.run("plan", **variables, GITHUB_TOKEN=token)

    assert done.returncode == 2
    # Its last word is about the comment alone: the code above is the plan's.
    assert done.stderr.splitlines()[-1].startswith("::warning title=quantkit::")
    assert said in done.stderr
    assert "1 problem found" in stage.summary
    assert forge.comments == []
    assert not token or token not in done.stderr


def test_a_merge_request_of_gitlab_gets_a_note(stage: Stage) -> None:
    """The account behind the token is asked for, so that only its own note is replaced."""
    page = stage.folder / "page.md"
    with Forge(people="author", login="project_7_bot") as forge:
        variables = {
            "CI_MERGE_REQUEST_IID": "3",
            "CI_API_V4_URL": f"{forge.url}/api/v4",
            "CI_PROJECT_ID": "7",
            "QUANTKIT_GITLAB_TOKEN": "glpat-tokenOfTheProject",
            "QUANTKIT_RECIPE": "absent.yaml",
            "QUANTKIT_PLAN_FILE": str(page),
            "QUANTKIT_VENV": str(stage.folder),
        }
        codes = [stage.run_plainly("plan", variables).returncode for _ in range(2)]

    assert codes == [2, 2]
    assert forge.bodies("project_7_bot") == [page.read_text()]
    notes = "/api/v4/projects/7/merge_requests/3/notes"
    assert [(each.method, each.path.partition("?")[0]) for each in forge.requests] == [
        ("GET", "/api/v4/user"),
        ("GET", notes),
        ("POST", notes),
        ("GET", "/api/v4/user"),
        ("GET", notes),
        ("PUT", f"{notes}/1000"),
    ]
    assert {each.token for each in forge.requests} == {"glpat-tokenOfTheProject"}
    assert "glpat-" not in stage.seen


def test_names_are_never_run(stage: Stage) -> None:
    """What looks like shell in a variable stays a name, and what it prints is no command."""
    evil = "$(touch pwned)`touch pwned`\"; touch pwned; '"
    done = stage.run(
        "plan",
        QUANTKIT_RECIPE=evil,
        QUANTKIT_MODEL=evil,
        QUANTKIT_OVERRIDES=f"gate.data={evil}\n\n  \r\n",
    )

    assert done.returncode == 2
    assert not (stage.folder / "checkout" / "pwned").exists()
    assert done.stdout == ""
    stop, *inside, go_on = [line for line in done.stderr.splitlines() if line][:3]
    assert stop.startswith("::stop-commands::")
    assert inside[0].startswith("error: ")
    assert go_on == f"::{stop.removeprefix('::stop-commands::')}::"
    assert "touch pwned" in stage.summary


@pytest.mark.parametrize(
    ("step", "variables", "said"),
    [
        ("deploy", {}, "there is no step 'deploy'"),
        ("plan", {}, "no recipe"),
        ("publish", {}, "no output"),
        ("install", {"QUANTKIT_INSTALL": "none", "PATH": "/usr/bin:/bin"}, "is not installed"),
    ],
)
def test_what_is_missing_is_named(
    stage: Stage, step: str, variables: dict[str, str], said: str
) -> None:
    """One line, shown beside the run, and exit code 2."""
    done = stage.run(step, **variables)

    assert done.returncode == 2
    assert done.stderr.startswith("::error title=quantkit::")
    assert said in done.stderr


def test_without_a_page_the_exit_code_is_the_same(stage: Stage) -> None:
    """On GitLab and elsewhere there is no summary to write; an error is a line of the log."""
    variables = {"QUANTKIT_RECIPE": "absent.yaml", "QUANTKIT_VENV": str(stage.folder)}
    done = stage.run_plainly("quantize", variables)

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("quantkit: error: quantkit quantize (exit code")


def test_a_job_that_cannot_begin_says_why_on_the_page(stage: Stage) -> None:
    """The error's line is code there, not markup; the verdict is ERROR."""
    done = stage.run("quantize", QUANTKIT_RECIPE="<b>no</b>.yaml")

    assert done.returncode == 2
    assert stage.outputs == {"exit-code": "2", "verdict": "ERROR"}
    assert stage.summary.startswith("## ❌ quantkit quantize: exit code 2\n\n    ")
    assert "<b>no</b>" in stage.summary
