"""A GGUF file in llama.cpp's own server, over HTTP: what users of the file get from it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.judging.evaluate import WORKERS
from tests.judging.gguf_files import write_gguf

DEMO = Path(__file__).parent.parent.parent / "models" / "demo-llama"
SERVER = Path(__file__).with_name("llamacpp_server.py")
TIMEOUT = 60
NEW_TOKENS = 24


@contextmanager
def serving(path: Path) -> Iterator[str]:
    """Yield the address of a server of the GGUF file `path`."""
    with subprocess.Popen(
        [sys.executable, str(SERVER), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        # A server that never answers ends the test, not the session.
        alarm = threading.Timer(TIMEOUT, process.kill)
        alarm.start()
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            yield address
        finally:
            alarm.cancel()
            process.kill()


def post(address: str, path: str, body: dict[str, Any]) -> Any:
    """Send a request and return the answer."""
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        return json.load(answer)


def generate(path: Path, prompt_ids: list[int]) -> list[int]:
    """The greedy continuation that the gate's worker gives."""
    requests = [
        {"op": "load", "path": str(path), "device": "cpu", "threads": 1},
        {"op": "generate", "prompt_ids": prompt_ids, "max_new_tokens": NEW_TOKENS},
    ]
    done = subprocess.run(
        [sys.executable, str(WORKERS["llama.cpp"])],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    ids = json.loads(done.stdout.splitlines()[-1])["ids"]
    assert isinstance(ids, list)
    return ids


def write_exact(folder: Path) -> Path:
    """The demo model in float32, by gguf-py."""
    return write_gguf(DEMO, folder / "demo.gguf")


def write_own(folder: Path) -> Path:
    """The demo model in Q4_K_M, by quantkit."""
    quantkit.convert(DEMO, to="gguf:Q4_K_M", output=folder / "out")
    (path,) = (folder / "out").glob("*.gguf")
    return path


@pytest.mark.parametrize("write", [write_exact, write_own])
def test_a_chat_over_http_gives_the_tokens_that_the_gate_judges(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    """The server renders the file's own chat template to the ids of transformers, the BOS once, and
    at temperature 0 goes on as the gate's worker does."""
    path = write(tmp_path)
    messages = [
        {"role": "user", "content": "Tell me about fire, in 1234 words; don't hurry."},
        {"role": "assistant", "content": "Well:\n  fire is hot."},
        {"role": "user", "content": "And 水?"},
    ]
    tokenizer = load_tokenizer(DEMO)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(prompt, str)
    ids = list(tokenizer(prompt, add_special_tokens=False).input_ids)

    with serving(path) as address:
        asked = {"messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": True}
        chat = post(address, "/v1/chat/completions", asked)
        rendered = post(address, "/apply-template", {"messages": messages})["prompt"]
        read = post(address, "/tokenize", {"content": rendered, "add_special": True})["tokens"]

    got = [token["id"] for token in chat["choices"][0]["logprobs"]["content"]]
    assert read == ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert chat["usage"]["prompt_tokens"] == len(ids)
    assert len(got) == NEW_TOKENS
    assert got == generate(path, ids)
    assert chat["choices"][0]["message"]["content"] == tokenizer.decode(got)
