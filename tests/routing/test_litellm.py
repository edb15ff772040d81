"""A real LiteLLM proxy with the printed configuration, before real servers of llama.cpp."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.running import COMMAND, ROOT, environment, run
from tests.ports import free_port

pytestmark = pytest.mark.integrations

DEMO = ROOT / "models" / "demo-llama"
KEY = "sk-of-the-test"
SECONDS = 120


def ask(port: int, key: str = KEY) -> tuple[str, dict[str, Any]]:
    """What answers to the alias: the id of the route, and the body."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Once upon a time"}],
        "max_tokens": 8,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return str(answer.headers["x-litellm-model-id"]), json.load(answer)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it answers with status 200; what it has written is shown where it does not."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(f"{address} does not answer:\n{log.read_text()[-3000:]}")


@contextlib.contextmanager
def started(
    command: list[str], address: str, log: Path, **changes: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers at `address`."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment(**changes), start_new_session=True
        )
    try:
        wait_for(address, process, log)
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a server, and wait until it is gone."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    process.wait(SECONDS)


def serve(
    file: Path, name: str, port: int, log: Path
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    options = ["--with", "llama.cpp", "--context", "512", "--concurrency", "1", "--start"]
    named = ["--model-name", name, "--port", str(port)]
    command = [*COMMAND, "serve", str(file), *options, *named]
    return started(command, f"http://127.0.0.1:{port}/health", log)


def test_the_alias_answers_and_falls_back(tmp_path: Path) -> None:
    """The quantized server answers; once it is gone, the 16-bit one does."""
    for kind in ("Q8_0", "F16"):
        done = run("convert", DEMO, "--to", f"gguf:{kind}", "--output", tmp_path / kind)
        assert done.returncode == 0, done.stderr
    quantized, original = (next((tmp_path / kind).rglob("*.gguf")) for kind in ("Q8_0", "F16"))
    first, last, front = free_port(), free_port(), free_port()
    printed = run(
        *("gateway", "demo", "--unproven", "--quiet"),
        *("--quantized", f"{quantized}=http://127.0.0.1:{first}/v1"),
        *("--baseline", f"{original}=http://127.0.0.1:{last}/v1"),
    )
    assert printed.returncode == 0, printed.stderr
    config = tmp_path / "litellm.yaml"
    config.write_text(printed.stdout)
    names = [each["model_info"]["id"] for each in yaml.safe_load(printed.stdout)["model_list"]]
    proxy = [os.environ["QUANTKIT_LITELLM"], "--config", str(config)]
    listening = ["--host", "127.0.0.1", "--port", str(front)]
    with contextlib.ExitStack() as servers:
        servers.enter_context(serve(original, names[1], last, tmp_path / "original.log"))
        server = serve(quantized, names[0], first, tmp_path / "quantized.log")
        process = servers.enter_context(server)
        servers.enter_context(
            started(
                [*proxy, *listening],
                f"http://127.0.0.1:{front}/health/liveliness",
                tmp_path / "proxy.log",
                LITELLM_MASTER_KEY=KEY,
                LITELLM_LOCAL_MODEL_COST_MAP="True",
                PYTHONPATH="",
            )
        )
        route, body = ask(front)
        assert route == names[0]
        assert body["choices"][0]["message"]["content"]
        with pytest.raises(urllib.error.HTTPError, match=r"40[01]"):
            ask(front, "sk-of-a-stranger")
        end(process)
        route, body = ask(front)
        assert route == names[1]
        assert body["choices"][0]["message"]["content"]
