"""One small job with everything odd about it, and secrets wherever they are usually kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.records import Result
from tests.hub import WRITE_TOKEN
from tests.pico_jobs import make_pico_job
from tests.security.attacking import list_surroundings

SECRETS = {
    "HF_TOKEN": WRITE_TOKEN,
    "HUGGING_FACE_HUB_TOKEN": "hf_plantedInTheOlderVariable",
    "VLLM_API_KEY": "planted-key-of-a-server",
    "MLFLOW_TRACKING_URI": "http://me:planted%21of-mlflow@127.0.0.1:9/mlflow",
    "MLFLOW_TRACKING_PASSWORD": "planted-password",
    "OTEL_EXPORTER_OTLP_HEADERS": "api-key=planted-of-a-collector,tenant=planted-tenant",
    "HTTPS_PROXY": "http://me:planted-of-a-proxy@127.0.0.1:9",
    "PIP_INDEX_URL": "https://planted-of-an-index@127.0.0.1:9/simple",
}
"""Variables of the environment, and what they say that nobody else should read."""
STORED = "hf_plantedInTheClientsStore"
"""In the files of the Hub's client."""
PLANTED = ("planted", "hf_token", STORED)
"""In each of the secrets."""


@dataclass(frozen=True)
class OddJob:
    """A job on a model with odd names of tensors, in an environment full of secrets."""

    root: Path
    result: Result
    before: dict[str, str]
    """Of `list_surroundings`."""
    after: dict[str, str]


@pytest.fixture(scope="session")
def odd_job(tmp_path_factory: pytest.TempPathFactory) -> OddJob:
    """The job, done once."""
    root = tmp_path_factory.mktemp("odd")
    recipe = make_pico_job(root, quantize={"scheme": "w8a16", "method": "rtn", "group_size": 32})
    weights = root / "model" / "model.safetensors"
    odd = ("../../x", "/x", "a\\b", "NUL", "~/x", "a:b", "n" * 300)
    tensors = load_file(weights)
    spare = {name: tensors["model.norm.weight"].clone() for name in odd}
    save_file(tensors | spare, weights, metadata={"format": "pt"})
    for name in ("outside", "working", "scratch"):
        (root / name).mkdir()
    before = list_surroundings(root)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        result = quantkit.quantize(recipe, gate=False, device="cpu")
    return OddJob(root, result, before, list_surroundings(root))


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment full of secrets, and the folder of the Hub's client with more of them."""
    home = tmp_path / "hub-home"
    home.mkdir()
    (home / "token").write_text(STORED)
    (home / "stored_tokens").write_text(f"[mine]\nhf_token = {STORED}\n")
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return home
