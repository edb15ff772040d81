"""A gateway's configuration: pinned, proven, without secrets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

import quantkit
from quantkit.cli.gateway import read_route
from quantkit.errors import InputError
from quantkit.routing import Route, gateway
from tests.cli.running import run_here
from tests.helpers import make_pico_model
from tests.hub import WRITE_TOKEN, HubServer
from tests.publishing.outputs import make_output

URL = "http://127.0.0.1:8000/v1"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output that has passed, with its original in the folder `model` beside."""
    return make_output(tmp_path_factory.mktemp("gateway"))


def test_quantized_first_and_the_original_behind(output: Path) -> None:
    """Each route asks for a name with a revision in it, which follows from the files alone."""
    original = output.parent / "model"
    found = run_here(
        "gateway", "my-model", "--quantized", f"{output}={URL}", "--baseline", f"{original}={URL}"
    )
    assert found.returncode == 0, found.stderr
    config = yaml.safe_load(found.stdout)
    first, last = config["model_list"]
    assert (first["model_name"], last["model_name"]) == ("my-model", "my-model-16bit")
    assert first["litellm_params"]["model"].startswith("openai/out@")
    assert first["litellm_params"]["api_base"] == URL
    assert config["router_settings"]["fallbacks"] == [{"my-model": ["my-model-16bit"]}]
    assert config["general_settings"]["master_key"] == "os.environ/LITELLM_MASTER_KEY"
    assert f"--model-name {first['model_info']['id']}" in found.stdout
    again = gateway("x", quantized=[Route(str(output), URL)], baseline=Route(str(original), URL))
    assert again.pinned[0].revision == first["model_info"]["revision"]


def test_another_file_has_another_name(output: Path, tmp_path: Path) -> None:
    """A route leads to the very files that passed: what was changed since is refused."""
    changed = tmp_path / "out"
    shutil.copytree(output, changed)
    config = changed / "compressed-tensors" / "config.json"
    config.write_text(config.read_text() + "\n")
    original = Route(str(output.parent / "model"), URL)
    with pytest.raises(InputError, match=r"config\.json"):
        gateway("x", quantized=[Route(str(changed), URL)], baseline=original)
    both = [
        gateway("x", quantized=[Route(str(each), URL)], baseline=original, unproven=True).pinned[0]
        for each in (output / "compressed-tensors", changed / "compressed-tensors")
    ]
    assert both[0].revision != both[1].revision
    assert {each.verdict for each in both} == {"UNJUDGED"}


def test_what_has_no_pass_is_refused(tmp_path: Path) -> None:
    """Unless it is asked for."""
    model = make_pico_model(tmp_path / "model")
    route = Route(str(model), URL)
    with pytest.raises(InputError, match="--unproven"):
        gateway("x", quantized=[route], baseline=route)
    found = gateway("x", quantized=[route], baseline=route, unproven=True)
    assert found.config["model_list"][0]["model_info"]["verdict"] == "UNJUDGED"


def test_servers_of_one_artifact_are_told_apart(output: Path, tmp_path: Path) -> None:
    """The proxy leaves out one that fails by its id; both are asked for by the same name."""
    odd = tmp_path / "it's odd\nmodel_list: []"
    shutil.copytree(output, odd)
    routes = [Route(str(odd), URL), Route(str(odd), "http://127.0.0.1:8001/v1")]
    found = gateway("x", quantized=routes, baseline=Route(str(output.parent / "model"), URL))
    first, second, _ = found.config["model_list"]
    assert first["litellm_params"]["model"] == second["litellm_params"]["model"]
    assert second["model_info"]["id"] == f"{first['model_info']['id']}-2"
    assert first["model_info"]["id"].startswith("it-s-odd-model_list-@")
    assert yaml.safe_load(found.text) == found.config


def test_what_is_published_is_pinned_by_its_commit(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its server does not take from the Hub by name is downloaded first."""
    original = Route(str(output.parent / "model"), URL)
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home", WRITE_TOKEN)
        for repo, variant in (("alice/whole", None), ("alice/parts", "W8")):
            quantkit.publish(output, repo=repo, variant=variant)
        whole, parts = (
            gateway("x", quantized=[Route(repo, URL)], baseline=original)
            for repo in ("alice/whole", "alice/parts@main")
        )
    commit = whole.pinned[0].revision
    assert whole.pinned[0].name == f"alice/whole@{commit[:12]}"
    assert f"\n# quantkit serve alice/whole@{commit} --with vllm --model-name alice" in whole.text
    commit = parts.pinned[0].revision
    assert (
        f"\n# hf download alice/parts --revision {commit} --include 'W8/*' --local-dir parts && "
        f"quantkit serve parts/W8 --with vllm --model-name alice/parts@{commit[:12]}\n"
    ) in parts.text


def test_keys_are_named_and_not_written(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy reads them from its environment."""
    monkeypatch.setenv("SERVER_KEY", "sk-secret")
    original = Route(str(output.parent / "model"), URL)
    routes = [Route(str(output), URL)]
    found = gateway("x", quantized=routes, baseline=original, api_key_variable="SERVER_KEY")
    assert found.config["model_list"][0]["litellm_params"]["api_key"] == "os.environ/SERVER_KEY"
    assert "sk-secret" not in found.text + json.dumps(found.config)
    with pytest.raises(InputError, match="not the key"):
        gateway("x", quantized=routes, baseline=original, api_key_variable="sk-secret")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/v1",
        "http://",
        "http://host:99999/v1",
        "https://me:secret@host/v1",
        "https://host/v1?key=secret",
        "http",
    ],
)
def test_addresses_that_cannot_be(url: str) -> None:
    """What may be a secret is not repeated."""
    with pytest.raises(InputError, match=r"is no address|keys do not go into an") as caught:
        gateway("x", quantized=[Route("m", url)], baseline=Route("m", URL))
    assert "secret" not in str(caught.value)


def test_routes_on_the_command_line() -> None:
    """The address begins at the last `=http`: folders may have the sign in their names."""
    assert read_route("a=b/c=http://h:1/v1", "--quantized") == Route("a=b/c", "http://h:1/v1")
    for wrong in ("model", "model=host:1", "=http://h"):
        with pytest.raises(InputError, match="MODEL=http"):
            read_route(wrong, "--baseline")
