"""llama.cpp and ONNX Runtime serve freshly made artifacts of the demo model."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

import quantkit
from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.judging.evaluate import WORKERS
from quantkit.serving.records import ServeCommand
from quantkit.serving.starting import PROMPT, running_server
from tests.cli.running import COMMAND, ROOT, environment, run
from tests.ports import free_port
from tests.serving.test_chat_http import ask, stream
from tests.serving.test_starting import await_end, is_alive

pytestmark = pytest.mark.integrations

DEMO = ROOT / "models" / "demo-llama"
RECIPES = {"llama.cpp": "gguf-q4", "onnxruntime": "onnx-int4"}
QUICKER = {"llama.cpp": ["export=[{format: gguf, type: Q8_0}]"], "onnxruntime": []}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What quantize makes for a runtime, quickly; made once."""
    folder = tmp_path_factory.mktemp("served")

    def make(runtime: str) -> Path:
        output = folder / RECIPES[runtime]
        if not output.exists():
            quantkit.quantize(
                RECIPES[runtime],
                model=DEMO,
                output=output,
                overrides=[
                    *("calibration.samples=8", "calibration.sequence_length=64"),
                    *("quantize.method=rtn", "quantize.effort=fast"),
                    *QUICKER[runtime],
                ],
                gate=False,
                device="cpu",
            )
        return output

    return make


@pytest.mark.parametrize("runtime", RECIPES)
def test_start_answers_a_chat_completion(made: Callable[[str], Path], runtime: str) -> None:
    """Through the command, which ends the server after its check."""
    port = free_port()
    done = run(
        *("serve", made(runtime), "--with", runtime, "--port", str(port), "--gpu", "cpu"),
        *("--context", "256", "--concurrency", "2", "--model-name", "demo"),
        *("--start", "--check", "--quiet", "--json"),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    answer = document["answer"]
    assert answer["model"] == "demo"
    assert answer["content"].strip()
    assert answer["completion_tokens"] == 32
    assert document["url"] == f"http://127.0.0.1:{port}/v1"


def start_onnxruntime(output: Path) -> ServeCommand:
    """The server of quantkit, for two sequences at a time."""
    return quantkit.serve_command(
        output, "onnxruntime", context=256, concurrency=2, port=free_port(), model_name="demo"
    )


def test_onnx_runtime_says_what_the_gate_judges(made: Callable[[str], Path]) -> None:
    """The template gives transformers' tokens, and the most probable ones follow as in the worker;
    streamed, and for two callers at a time, as well."""
    output = made("onnxruntime")
    tokenizer = load_tokenizer(DEMO)
    talk = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ids = list(tokenizer(prompt, add_special_tokens=False).input_ids)
    requests = [
        {"op": "load", "path": str(output / "onnx"), "device": "cpu", "threads": 1},
        {"op": "generate", "prompt_ids": ids, "max_new_tokens": 32},
    ]
    worker = subprocess.run(
        [*COMMAND[:1], str(WORKERS["onnxruntime"])],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        check=True,
    )
    expected = tokenizer.decode(json.loads(worker.stdout.splitlines()[-1])["ids"])

    with running_server(start_onnxruntime(output), timeout=60) as server:
        port = server.serve.port
        answer = server.ask()
        body = {"messages": talk, "max_tokens": 32, "temperature": 0}
        with ThreadPoolExecutor(4) as pool:
            several = [
                future.result()
                for future in [
                    pool.submit(ask, port, "POST", "/v1/chat/completions", body) for _ in range(4)
                ]
            ]
        events = stream(port, PROMPT, max_tokens=32, temperature=0)
        seeded = [
            ask(port, "POST", "/v1/chat/completions", {**body, "temperature": 1.5, "seed": seed})
            for seed in (1, 1, 2)
        ]
        long = {"messages": [{"role": "user", "content": "fire " * 400}]}
        refused = ask(port, "POST", "/v1/chat/completions", long)

    assert answer.content == expected
    assert answer.prompt_tokens == len(ids)
    assert {document["choices"][0]["message"]["content"] for _, document in several} == {expected}
    streamed = (event["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert "".join(streamed) == expected
    first, again, other = (each[1]["choices"][0]["message"]["content"] for each in seeded)
    assert first == again != other
    assert refused[0] == 400
    assert refused[1]["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_command_leaves_no_orphan(made: Callable[[str], Path], how: signal.Signals) -> None:
    """However it ends: asked to, or killed on the spot."""
    port = free_port()
    arguments = [
        "serve",
        str(made("onnxruntime")),
        "--with",
        "onnxruntime",
        "--port",
        str(port),
        "--start",
    ]
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # Tests that run in a shell's background have it ignored, and so would the command.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("serving"):
                break
        server = find_child(process.pid)
        assert is_alive(server)
        process.send_signal(how)
        code = process.wait(timeout=30)
    assert "".join(said).count("answer   ") == 1
    assert f"http://127.0.0.1:{port}/v1 until Ctrl-C" in said[-1]
    assert await_end(server)
    assert code == (-9 if how == signal.SIGKILL else 0)


def find_child(pid: int) -> int:
    """The one child of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    (found,) = [int(child) for child in children if is_server(int(child))]
    return found


def is_server(pid: int) -> bool:
    """Whether a process runs one of quantkit's scripts."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return False
    return any(re.search(r"serving/servers/\w+\.py$", word) for word in words)
