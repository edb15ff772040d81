"""The command that serves an artifact, for the runtime, the machine and the load at hand.

`serve_command` prints nothing and starts nothing; `quantkit.serving.starting` runs what it returns.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import get_args

from quantkit.errors import InputError
from quantkit.report.rounding import format_bytes
from quantkit.serving import llamacpp, ollama, onnxruntime, tensorrt_llm, tgi, vllm
from quantkit.serving.fitting import Needs, cache_bytes, plan_memory
from quantkit.serving.machine import choose_machine
from quantkit.serving.pairs import (
    LLAMA_CPP,
    OLLAMA,
    ONNX_RUNTIME,
    SERVED,
    TENSORRT_LLM,
    TGI,
    VLLM,
    check_pair,
    check_problems,
    check_runtime,
)
from quantkit.serving.records import (
    CacheWish,
    Machine,
    MemoryPlan,
    Rendered,
    ServeCommand,
    Target,
    Wish,
)
from quantkit.serving.target import find_target

HOST = "127.0.0.1"
CONCURRENCY = 8
_NAME = re.compile(r"[\w.:/@+-]{1,200}")


@dataclass(frozen=True)
class _Runtime:
    """How one runtime is served with."""

    port: int
    """Its own default."""
    find_needs: Callable[[Target, Machine, Wish], Needs]
    render: Callable[[Target, Machine, MemoryPlan, Wish, str], Rendered]


_RUNTIMES: Mapping[str, _Runtime] = MappingProxyType(
    {
        VLLM: _Runtime(8000, vllm.find_needs, vllm.render),
        TGI: _Runtime(8080, tgi.find_needs, tgi.render),
        TENSORRT_LLM: _Runtime(8000, tensorrt_llm.find_needs, tensorrt_llm.render),
        OLLAMA: _Runtime(11434, ollama.find_needs, ollama.render),
        ONNX_RUNTIME: _Runtime(8000, onnxruntime.find_needs, onnxruntime.render),
        LLAMA_CPP: _Runtime(8080, llamacpp.find_needs, llamacpp.render),
    }
)


def serve_command(
    artifact: str | os.PathLike[str],
    runtime: str,
    *,
    context: int | None = None,
    concurrency: int | None = None,
    gpu: str = "auto",
    gpus: int | None = None,
    memory: int | None = None,
    kv_cache: CacheWish = "auto",
    host: str = HOST,
    port: int | None = None,
    model_name: str | None = None,
) -> ServeCommand:
    """Return the exact command that serves an artifact, with the memory that it is based on.

    Args:
        artifact: an output of `quantize`, a folder or file that `inspect` reads, or a Hub id
            (id@revision), of which the config alone is fetched.
        runtime: `vllm`, `tgi`, `tensorrt-llm`, `ollama`, `onnxruntime` or `llama.cpp`.
        context: tokens of a sequence, prompt and answer together; by default up to 8192. Where it
            does not fit, the longest that does is taken, and a note says so.
        concurrency: sequences that are served at a time, each as long as the context; by default 8,
            and 1 in ONNX Runtime.
        gpu: `auto` for what this machine has, `cpu`, or a name of `quantkit.capacity.GPUS`.
        gpus: how many there are; the fewest that hold the model are used.
        memory: bytes of each GPU, or of the processor's memory, in place of what is known.
        kv_cache: `auto` for the precision that the artifact has scales for, `16bit`, `8bit`.
        host: address to listen on.
        port: by default the runtime's own.
        model_name: of the model in requests; by default that of the artifact's folder.

    Raises:
        InputError: the runtime does not serve such an artifact, or an argument makes no sense.
        ResourceError: the model does not fit on the machine.
    """
    check_runtime(runtime)
    wish = _read_wish(runtime, context, concurrency, kv_cache, host, port, model_name)
    target = find_target(artifact, SERVED[runtime])
    machine = choose_machine(gpu, gpus, memory)
    check_problems(target)
    notes = [*target.notes, *machine.notes, *check_pair(target, runtime, machine, wish)]
    needs = _RUNTIMES[runtime].find_needs(target, machine, wish)
    plan = plan_memory(target, machine, needs, wish)
    rendered = _RUNTIMES[runtime].render(target, machine, plan, wish, model_name or target.name)
    notes += [*rendered.notes, *_explain(target, plan)]
    return ServeCommand(
        runtime=runtime,
        artifact=os.fspath(artifact),
        format=target.format,
        scheme=target.scheme,
        model_name=rendered.model_name or model_name or target.name,
        command=rendered.command,
        environment=rendered.environment,
        setup=rendered.setup,
        files=rendered.files,
        container=rendered.container,
        host=wish.host,
        port=wish.port,
        health=rendered.health,
        machine=machine,
        memory=plan,
        notes=tuple(notes),
        api_key_variable=rendered.api_key_variable,
    )


def _read_wish(
    runtime: str,
    context: int | None,
    concurrency: int | None,
    kv_cache: str,
    host: str,
    port: int | None,
    model_name: str | None,
) -> Wish:
    """Check what is asked for.

    Raises:
        InputError: a number or a name makes no sense.
    """
    # ONNX Runtime GenAI makes its answers one by one: sequences at a time take turns.
    most = concurrency if concurrency is not None else 1 if runtime == ONNX_RUNTIME else CONCURRENCY
    if not 1 <= most <= 1 << 16:
        raise InputError(f"--concurrency {most}: name at least 1 sequence")
    chosen = _RUNTIMES[runtime].port if port is None else port
    if not 1 <= chosen < 1 << 16:
        raise InputError(f"--port {chosen}: a port is a number from 1 to 65535")
    if kv_cache not in get_args(CacheWish):
        raise InputError(f"--kv-cache {kv_cache}: known are {', '.join(get_args(CacheWish))}")
    if model_name is not None and not _NAME.fullmatch(model_name):
        raise InputError(
            f"--model-name {model_name!r}: letters, digits and ._-:/@+ can be in a model's name"
        )
    if not host or any(letter.isspace() for letter in host):
        raise InputError(f"--host {host!r} is no address")
    return Wish(context, most, host, chosen, model_name, kv_cache)  # type: ignore[arg-type]


def _explain(target: Target, plan: MemoryPlan) -> list[str]:
    """What should be known about the memory, and about the artifact itself."""
    notes = list(target.shape.notes)
    if plan.context < plan.asked_context:
        whole = cache_bytes(target, plan.bytes_per_value, plan.asked_context, plan.concurrency)
        notes.append(
            f"a context of {plan.asked_context} tokens does not fit: its cache would take "
            f"{format_bytes(whole)} for {plan.concurrency} sequences; {plan.context} is the "
            f"longest that does (a lower --concurrency or --kv-cache 8bit makes room)"
        )
    if target.verdict in ("FAIL", "INCONCLUSIVE", "UNJUDGED"):
        notes.append(f"the gate's verdict on this artifact is {target.verdict}")
    return notes
