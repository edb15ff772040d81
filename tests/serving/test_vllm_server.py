"""vLLM serves an artifact: `make vllm` runs this with vLLM's own environment on the PATH."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.cli.running import ROOT, run
from tests.ports import free_port

pytestmark = pytest.mark.vllm


def test_start_answers_a_chat_completion() -> None:
    """The artifact of `make demo`, on a processor; nothing is compiled, which takes minutes."""
    # Not resolved: the interpreter of an environment is a link out of it.
    programs = Path(os.environ["QUANTKIT_VLLM_PYTHON"]).absolute().parent
    port = free_port()
    done = run(
        *("serve", ROOT / "artifacts" / "demo" / "compressed-tensors", "--with", "vllm"),
        *("--gpu", "cpu", "--context", "512", "--concurrency", "2", "--port", str(port)),
        *("--model-name", "demo", "--start", "--check", "--json"),
        PATH=f"{programs}{os.pathsep}{os.environ['PATH']}",
        TORCHDYNAMO_DISABLE="1",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    document = json.loads(done.stdout)
    assert "--enforce-eager" in document["command"]
    answer = document["answer"]
    assert (answer["model"], answer["completion_tokens"]) == ("demo", 32)
    assert answer["content"].strip()
