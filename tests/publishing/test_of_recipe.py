"""`publish:` in a recipe: asked for before the work, done after a PASS alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import quantkit
from quantkit.cli.reports import quantize_reply
from quantkit.errors import HubError, InputError, PublishError
from quantkit.publishing.of_recipe import publish_result
from quantkit.recipe import GateSpec, PublishSpec, Recipe
from quantkit.records import Result
from quantkit.running import silent
from tests.helpers import pico_text
from tests.hub import COMMIT, READ_TOKEN, HubServer, refuse_with
from tests.pico_jobs import make_pico_job

REPO = "alice/pico-w8"


def make_recipe(folder: Path, **publish: object) -> Recipe:
    """A job with a gate that lets everything pass."""
    recipe = make_pico_job(folder, quantize={"scheme": "w8a16", "method": "rtn", "group_size": 32})
    (folder / "evaluation.txt").write_text(pico_text(3000, seed=2))
    gate = GateSpec(
        data=str(folder / "evaluation.txt"),
        samples=32,
        sequence_length=32,
        max_perplexity_increase=0.5,
        max_kl=1.0,
        probes=None,
    )
    return recipe.model_copy(update={"gate": gate, "publish": PublishSpec(repo=REPO, **publish)})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda hub, patch, home: hub.connect(patch, home, None), "there is no token"),
        (lambda hub, patch, home: hub.connect(patch, home, READ_TOKEN), "the token may only read"),
        (lambda hub, patch, home: hub.add_repo(REPO, private=False), "is public, and --private"),
    ],
    ids=["no token", "read token", "public"],
)
def test_what_could_not_be_published_is_refused_before_the_work(
    spoil: Callable[..., object],
    words: str,
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """And leaves nothing behind."""
    spoil(hub, monkeypatch, tmp_path / "home")
    with pytest.raises(PublishError, match=words):
        quantkit.quantize(make_recipe(tmp_path, private=True), device="cpu")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_job_without_a_gate_is_not_published(tmp_path: Path) -> None:
    """Whether the recipe has none or the command leaves it out; the Hub is not asked."""
    recipe = make_recipe(tmp_path)
    with pytest.raises(InputError, match="publish: only what has passed a gate"):
        quantkit.quantize(recipe, gate=False, device="cpu")
    with pytest.raises(InputError, match="publish: only what has passed a gate"):
        quantkit.plan(recipe.model_copy(update={"gate": None}))


def test_a_sweep_publishes_nothing(tmp_path: Path) -> None:
    """Its jobs compete for one place."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(make_recipe(tmp_path).model_dump(mode="json")))
    with pytest.raises(InputError, match="a sweep does not publish what it compares"):
        quantkit.sweep([path], output_root=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_what_passed_is_published_as_the_recipe_says(hub: HubServer, result: Result) -> None:
    """And the reply ends with the address and the command that serves it."""
    spec = PublishSpec(repo=REPO, revision="next", tag="v1")
    done = publish_result(spec, result, silent)
    assert done.publication is not None
    refs = hub.repos[REPO].refs
    assert done.publication.commit == refs["refs/heads/next"] == refs["refs/tags/v1"]
    reply = quantize_reply(done)
    assert reply.lines[-2:] == [
        f"url      {hub.endpoint}/{REPO}/tree/v1",
        f"serve    vllm serve {REPO} --revision next",
    ]
    assert reply.document["publication"]["commit"] == done.publication.commit  # type: ignore[call-overload]


@pytest.mark.parametrize("verdict", ["FAIL", "INCONCLUSIVE"])
def test_another_verdict_goes_nowhere_and_says_so(
    verdict: str, hub: HubServer, result: Result
) -> None:
    """The exit code is the verdict's own."""
    failed = replace(result, verdict=verdict)  # type: ignore[arg-type]
    done = publish_result(PublishSpec(repo=REPO), failed, silent)
    assert done.publication is None
    assert f"nothing was published to {REPO}: the verdict is {verdict}" in done.report.notes[-1]
    assert not hub.requests


def test_a_publication_that_fails_leaves_the_output_and_the_command(
    hub: HubServer, result: Result
) -> None:
    """Which goes on without the job."""
    hub.fail(refuse_with(500, COMMIT))
    spec = PublishSpec(repo=REPO, tag="v1", private=False)
    command = f"quantkit publish {result.output} --repo {REPO} --tag v1 --public"
    with pytest.raises(HubError, match=f"is finished and has passed.*`{command}`"):
        publish_result(spec, result, silent)
    hub.recover()
    assert quantkit.publish(result.output, repo=REPO, tag="v1", private=False).commit


@pytest.mark.integrations
def test_a_job_ends_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    """Quantized, judged by the real gate, and published."""
    done = quantkit.quantize(make_recipe(tmp_path), device="cpu")
    assert done.verdict == "PASS"
    assert done.publication is not None
    assert "model.safetensors" in hub.files(REPO)
    assert quantkit.promote(REPO, alias="stable").after == done.publication.commit
