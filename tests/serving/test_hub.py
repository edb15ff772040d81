"""Commands for what lies on the Hub, by its own client against a local server of its protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import quantkit
from quantkit.errors import CheckpointError, InputError
from tests.hub import HubServer

REPO = "acme/pico-w4"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: Path) -> Iterator[HubServer]:
    """A Hub with one quantized model, and one GGUF file."""
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        folder = output / "compressed-tensors"
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        # As Mistral's repositories have it: the same weights for another library.
        hub.add_repo(REPO, files | {"consolidated.safetensors": files["model.safetensors"]})
        (file,) = (output / "gguf").glob("*.gguf")
        config = (folder / "config.json").read_bytes()
        hub.add_repo("acme/plain-gguf", {"pico.gguf": file.read_bytes()})
        hub.add_repo("acme/pico-gguf", {"config.json": config, "pico.gguf": file.read_bytes()})
        yield hub


def test_a_hub_id_takes_its_config_alone(hub: HubServer, output: Path) -> None:
    """How large its weights are, the Hub says."""
    serve = quantkit.serve_command(f"{REPO}@main", "vllm", gpu="H100", context=64)
    assert serve.command[:5] == ("vllm", "serve", REPO, "--revision", "main")
    assert serve.model_name == "pico-w4"
    weights = output / "compressed-tensors" / "model.safetensors"
    assert serve.memory.weights == weights.stat().st_size
    assert serve.memory.kv_cache == 3 * 2 * 2 * 16 * 64 * 8 * 2
    assert any("were not read" in note for note in serve.notes)
    assert serve.container is not None
    assert "-v" not in serve.container
    # The name alone: its value stays where it is.
    assert serve.container[serve.container.index("HF_TOKEN") - 1] == "-e"
    assert not [each for each in hub.requests if "safetensors" in each.path]


@pytest.mark.parametrize(
    ("model", "runtime", "words"),
    [
        ("acme/absent", "vllm", "neither a folder nor a model on the Hub"),
        (f"{REPO}@nothing", "vllm", "no revision 'nothing'"),
        ("acme/plain-gguf", "llama.cpp", "no config.json.*hf download acme/plain-gguf --local-dir"),
        ("acme/pico-gguf", "vllm", "no weights in safetensors at its root"),
    ],
)
def test_what_the_hub_has_not_is_said(hub: HubServer, model: str, runtime: str, words: str) -> None:
    """In one line."""
    with pytest.raises(CheckpointError, match=words) as refused:
        quantkit.serve_command(model, runtime, gpu="H100")
    assert "\n" not in str(refused.value)


def test_a_hub_id_is_for_runtimes_that_take_one(hub: HubServer) -> None:
    """The others want files."""
    with pytest.raises(InputError, match=r"llama\.cpp does not serve compressed-tensors"):
        quantkit.serve_command(REPO, "llama.cpp")
