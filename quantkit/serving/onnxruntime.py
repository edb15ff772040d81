"""quantkit's own server over ONNX Runtime GenAI, which brings none."""

from __future__ import annotations

import sys
from pathlib import Path

from quantkit.environments.places import find_python
from quantkit.serving.fitting import GIB, Needs
from quantkit.serving.records import Machine, MemoryPlan, Rendered, Target, Wish

SCRIPT = Path(__file__).with_name("servers") / "onnxruntime_server.py"
SHARE = 0.9
BASE = GIB // 2
"""The packages, and the graph's weights once more where they are packed for the processor: a
guess."""
STEP_TOKENS = 2048


def find_needs(target: Target, machine: Machine, wish: Wish) -> Needs:
    """Return what it takes; the cache has the graph's own precision."""
    return Needs(SHARE, target.cache_bytes_per_value, BASE, STEP_TOKENS, divides_layers=False)


def render(target: Target, machine: Machine, memory: MemoryPlan, wish: Wish, name: str) -> Rendered:
    """Return the command."""
    python = find_python("onnxruntime", {}) or sys.executable
    options = ["--model-name", name, "--context", str(memory.context)]
    options += ["--concurrency", str(memory.concurrency)]
    place = ["--host", wish.host, "--port", str(wish.port)]
    notes = []
    if wish.kv_cache == "8bit":
        notes.append("the cache has the precision of the graph: --kv-cache has no effect")
    return Rendered(
        command=(python, str(SCRIPT), target.location, *options, *place),
        environment={"ORT_DISABLE_TELEMETRY": "1"},
        notes=tuple(notes),
    )
