"""What is served, on which machine, with what memory, and by which command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quantkit.capacity import ModelShape
from quantkit.records import Verdict

HUB_TOKEN = "HF_TOKEN"
"""Variable with the token of the Hub, where what is published is private."""
CacheWish = Literal["auto", "16bit", "8bit"]
"""Precision of the key/value cache: `auto` is what the artifact has scales for."""


@dataclass(frozen=True)
class ServedLayer:
    """A quantized matrix, as far as it matters to how a model is divided."""

    name: str
    group_size: int | None
    sharing: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """An artifact that is to be served."""

    name: str
    """What it is called where the user gives no other name."""
    location: str
    """What a server is given: a folder, a file, or a Hub id."""
    revision: str | None
    """Of a Hub id that names one."""
    folder: Path | None
    """None: it lies on the Hub."""
    format: str
    scheme: str
    kv_cache: str
    """Of the scales in the artifact: `none`, `fp8`, `fp8_per_head`, or what config.json says."""
    weight_bytes: int
    shape: ModelShape
    intermediate: int
    """Width of the widest layer, by which the size of activations is guessed."""
    layers: tuple[ServedLayer, ...]
    """Quantized ones; empty for what lies on the Hub, whose headers were not read."""
    cache_bytes_per_value: float = 2.0
    """Of an unquantized cache."""
    verdict: Verdict | None = None
    """The gate's, where evidence lies beside."""
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """Where it is served: GPUs of one kind, or a processor."""

    name: str
    gpus: int
    """0: a processor alone."""
    memory_bytes: int
    """Of each GPU; of the processor, what is available."""
    capability: tuple[int, int] | None
    """Compute capability; None for a processor."""
    notes: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """What messages call it."""
        return f"{self.gpus} x {self.name}" if self.gpus else "this machine's processor"


@dataclass(frozen=True)
class Wish:
    """What the user asks for."""

    context: int | None
    """Tokens of a sequence, prompt and answer together; None: up to 8192, as far as it fits."""
    concurrency: int
    """Sequences that are served at a time."""
    host: str
    port: int
    model_name: str | None
    kv_cache: CacheWish


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each GPU, or of the processor's memory, when all sequences are as long as may be."""

    available: int
    """What the server may take."""
    weights: int
    kv_cache: int
    overhead: int
    """A guess: the runtime itself, activations, and what it works in."""
    gpus: int
    """Over which the model is divided; 0: a processor."""
    context: int
    concurrency: int
    asked_context: int
    """What was asked for; larger than `context` where that does not fit."""
    bytes_per_value: float

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.overhead


@dataclass(frozen=True)
class ServeCommand:
    """The command that serves an artifact, and what it is based on."""

    runtime: str
    artifact: str
    format: str
    scheme: str
    model_name: str
    """By which requests name the model."""
    command: tuple[str, ...]
    environment: Mapping[str, str]
    """Variables to be set for `command`."""
    setup: tuple[tuple[str, ...], ...]
    """Commands that come after the server is up, and before the first request: Ollama's."""
    files: Mapping[str, str]
    """Configuration that the commands name: file -> its text."""
    container: tuple[str, ...] | None
    """The same in the runtime's published container."""
    host: str
    port: int
    health: str
    """Path that answers with status 200 once the model is loaded."""
    machine: Machine
    memory: MemoryPlan
    notes: tuple[str, ...] = ()
    api_key_variable: str | None = None
    """Variable of the environment that gives the server its key, if it has one."""

    @property
    def url(self) -> str:
        """The address that clients of OpenAI's API take."""
        return f"http://{reachable(self.host)}:{self.port}/v1"

    def document(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        memory = self.memory
        return {
            "runtime": self.runtime,
            "artifact": self.artifact,
            "format": self.format,
            "scheme": self.scheme,
            "model_name": self.model_name,
            "command": list(self.command),
            "environment": dict(self.environment),
            "setup": [list(each) for each in self.setup],
            "files": dict(self.files),
            "container": None if self.container is None else list(self.container),
            "url": self.url,
            "machine": {
                "name": self.machine.name,
                "gpus": self.machine.gpus,
                "memory_bytes": self.machine.memory_bytes,
            },
            "memory": {
                "available_bytes": memory.available,
                "weights_bytes": memory.weights,
                "kv_cache_bytes": memory.kv_cache,
                "overhead_bytes": memory.overhead,
                "total_bytes": memory.total,
                "gpus_used": memory.gpus,
                "context": memory.context,
                "asked_context": memory.asked_context,
                "concurrency": memory.concurrency,
                "kv_cache_bytes_per_value": memory.bytes_per_value,
            },
            "notes": list(self.notes),
        }

    def shell(self) -> str:
        """Return lines that a shell takes as they stand."""
        lines: list[str] = []
        for name, text in self.files.items():
            end = _find_end(text)
            lines += [f"cat > {shlex.quote(name)} <<'{end}'", text.rstrip("\n"), end]
        assigned = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        served = break_lines(self.command, assigned)
        if not self.setup:
            return "\n".join([*lines, served])
        address = f"http://{reachable(self.host)}:{self.port}{self.health}"
        lines.append(f"{served} &")
        lines.append(f"until curl -sf {shlex.quote(address)} > /dev/null; do sleep 1; done")
        return "\n".join([*lines, *(break_lines(each) for each in self.setup)])


@dataclass(frozen=True)
class Rendered:
    """What one runtime makes of a target: the parts of a `ServeCommand` that are its own."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    setup: tuple[tuple[str, ...], ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    container: tuple[str, ...] | None = None
    health: str = "/health"
    notes: tuple[str, ...] = ()
    api_key_variable: str | None = None
    model_name: str | None = None
    """Where the runtime chooses the name itself."""


def break_lines(command: tuple[str, ...], assigned: list[str] | None = None) -> str:
    """Return a command for a shell, each option in a line of its own where it is long."""
    words = [*(assigned or ()), *(shlex.quote(word) for word in command)]
    if sum(map(len, words)) + len(words) <= _SHORT:
        return " ".join(words)
    lines: list[list[str]] = [[]]
    begun = len(words) - len(command) + 2
    for index, word in enumerate(words):
        # The program and what it is to do stay together.
        if word.startswith("-") and index >= begun:
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(" ".join(line) for line in lines)


def _find_end(text: str) -> str:
    """A line that ends a text for the shell: none of its own, which a stranger may have written."""
    end, lines = "QUANTKIT", set(text.splitlines())
    while end in lines:
        end += "_"
    return end


def reachable(host: str) -> str:
    """Return how this machine reaches a server that listens on `host`."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}
    return everywhere.get(host, bracketed(host))


def bracketed(host: str) -> str:
    """Return an address as it stands before a port."""
    return f"[{host}]" if ":" in host else host


def publish_port(wish: Wish, inside: int | None = None) -> tuple[str, str]:
    """Return Docker's option that lets a container's port be reached; it takes no names of hosts.

    Args:
        wish: names the address.
        inside: the container's port; by default the same.
    """
    host = {"localhost": "127.0.0.1"}.get(wish.host, bracketed(wish.host))
    return "-p", f"{host}:{wish.port}:{inside or wish.port}"


_SHORT = 88
"""Letters of a command that stays in one line."""
