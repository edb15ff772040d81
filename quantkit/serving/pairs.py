"""Which runtime serves which artifact, and what to do about a pair that does not work."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from quantkit.errors import ArtifactError, InputError, nearest
from quantkit.formats.completeness import check_completeness
from quantkit.formats.decode import open_artifact
from quantkit.formats.inspect import COMPRESSED_TENSORS, PLAIN
from quantkit.formats.reader_rules import claim_layers
from quantkit.formats.runtimes import find_support
from quantkit.ggml_types import GGUF
from quantkit.schemes import MODELOPT, ONNX, RUNTIME_NOTES
from quantkit.serving.records import Machine, Target, Wish

VLLM, TGI, TENSORRT_LLM = "vllm", "tgi", "tensorrt-llm"
OLLAMA, ONNX_RUNTIME, LLAMA_CPP = "ollama", "onnxruntime", "llama.cpp"

SERVED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        VLLM: (COMPRESSED_TENSORS, MODELOPT, "gptq", "awq", "fp8", PLAIN),
        TGI: (COMPRESSED_TENSORS, "gptq", "awq", "fp8", PLAIN),
        TENSORRT_LLM: (MODELOPT, "fp8", PLAIN),
        OLLAMA: (GGUF,),
        ONNX_RUNTIME: (ONNX,),
        LLAMA_CPP: (GGUF,),
    }
)
"""Runtime -> the formats that it serves; the first one is made for it."""

_RECIPES = MappingProxyType(
    {
        COMPRESSED_TENSORS: "--recipe awq4",
        MODELOPT: "--recipe fp8 --set 'export=[{format: modelopt}]'",
        GGUF: "--recipe gguf-q4",
        ONNX: "--recipe onnx-int4",
    }
)
"""Format -> options of `quantize` that make it of an original."""


@dataclass(frozen=True)
class _Gpus:
    """Compute capabilities that a scheme needs in vLLM: from, up to but not including."""

    least: tuple[int, int]
    below: tuple[int, int]
    words: str


_INT8 = _Gpus((7, 5), (10, 0), "INT8 inputs are served from Turing (7.5) to Hopper (9.0)")
_ANY = _Gpus((7, 5), (99, 0), "quantized weights are served from Turing (7.5) on")
_GPUS: Mapping[str, _Gpus] = MappingProxyType(
    {
        "w8a8": _INT8,
        "w8a8_static": _INT8,
        "w4a8_fp8": _Gpus((9, 0), (10, 0), "w4a8_fp8 is served on Hopper (9.0) alone"),
    }
)
"""As the answers of `quantkit.formats.runtimes` say in words."""
_FP8_FROM = (8, 9)


def check_runtime(runtime: str) -> None:
    """Refuse a runtime that is not known.

    Raises:
        InputError: it is not.
    """
    if runtime not in SERVED:
        near = nearest(runtime, SERVED)
        raise InputError(f"--with {runtime}: it is unknown{near} (known: {', '.join(SERVED)})")


def check_pair(target: Target, runtime: str, machine: Machine, wish: Wish) -> tuple[str, ...]:
    """Refuse what the runtime does not serve, and return what should be known of what it does.

    Raises:
        InputError: it does not serve this format or scheme, on this machine or at all.
    """
    if target.format not in SERVED[runtime]:
        raise InputError(_wrong_format(target, runtime))
    if not machine.gpus and runtime in (TGI, TENSORRT_LLM):
        raise InputError(
            f"{runtime} needs an NVIDIA GPU, and this machine has none: name the one of another "
            f"machine, for instance --gpu H100"
        )
    if runtime == VLLM:
        return tuple(_check_vllm(target, machine, _name_cache(target, wish)))
    if runtime == TGI:
        return tuple(_check_tgi(target))
    return ()


def _wrong_format(target: Target, runtime: str) -> str:
    """One line: who serves this artifact, and how to get one for the runtime that was asked for."""
    best = SERVED[runtime][0]
    others = [name for name, formats in SERVED.items() if formats[0] == target.format]
    others = others or [name for name, formats in SERVED.items() if target.format in formats]
    others = [VLLM] if VLLM in others else others
    right = f"serve it --with {' or --with '.join(others)}; " if others else ""
    if best == GGUF and target.format == PLAIN:
        source = shlex.quote(target.location)
        made = f"quantkit convert {source} --to gguf:Q4_K_M --output {source}-gguf"
    else:
        made = f"quantkit quantize ORIGINAL {_RECIPES[best]} --output FOLDER"
    return (
        f"{runtime} does not serve {target.format} ({target.location}): {right}for {runtime} make "
        f"{best} from the original: {made}"
    )


def _name_cache(target: Target, wish: Wish) -> str:
    """The key/value cache that is served with."""
    if wish.kv_cache == "16bit":
        return "none"
    return "fp8" if wish.kv_cache == "8bit" and target.kv_cache == "none" else target.kv_cache


def _check_vllm(target: Target, machine: Machine, kv_cache: str) -> Iterator[str]:
    """Yield notes on a scheme in vLLM.

    Raises:
        InputError: it cannot serve it there.
    """
    build = "vllm-cuda" if machine.gpus else "vllm-cpu"
    if target.format == COMPRESSED_TENSORS and target.folder is not None:
        artifact = open_artifact(target.folder)
        claimed = claim_layers(artifact, check_completeness(artifact).linears)
        support = next(each for each in find_support(claimed, kv_cache) if each.runtime == build)
        for answer in support.answers:
            if answer.serves == "no":
                hint = RUNTIME_NOTES.get((answer.what, build), "")
                raise InputError(
                    f"{_BUILDS[build]} cannot serve {target.name}: {answer.what}: {answer.words}"
                    f"{f' ({hint})' if hint else ''}"
                )
            if answer.serves == "partly":
                yield f"{answer.what} in {_BUILDS[build]}: {answer.words}"
    if target.format == MODELOPT and not machine.gpus:
        yield "whether vLLM's CPU build takes ModelOpt's layout is not known"
    if machine.capability is not None:
        yield from _check_capability(target, machine.capability, machine.name)
        if kv_cache.startswith("fp8") and machine.capability < _FP8_FROM:
            raise InputError(
                f"an FP8 key/value cache is for compute capability 8.9 (Ada, Hopper) or later, and "
                f"{_capability_of(machine.name, machine.capability)}: serve it with "
                f"--kv-cache 16bit"
            )


_BUILDS = {"vllm-cuda": "vLLM on GPUs", "vllm-cpu": "vLLM's CPU build"}


def _check_capability(target: Target, capability: tuple[int, int], name: str) -> Iterator[str]:
    """Yield what a GPU of this compute capability does otherwise.

    Raises:
        InputError: it has no kernel.
    """
    has = _capability_of(name, capability)
    schemes = {words.split()[0] for words in target.scheme.split(", ") if words}
    for scheme in sorted(schemes - {"none"}):
        needed = _GPUS.get(scheme, _ANY)
        if not needed.least <= capability < needed.below:
            raise InputError(f"vLLM cannot serve {target.name} there: {needed.words}, and {has}")
        if "fp8" in scheme and capability < _FP8_FROM:
            yield f"{has}: inputs stay in 16 bits, FP8 is for 8.9 (Ada, Hopper) and later"


def _capability_of(name: str, capability: tuple[int, int]) -> str:
    return f"{name} has compute capability {capability[0]}.{capability[1]}"


def _check_tgi(target: Target) -> Iterator[str]:
    """Yield notes on TGI 3.3.5, whose loaders of compressed-tensors know fewer schemes.

    Read in its server/text_generation_server/layers/compressed_tensors.

    Raises:
        InputError: it cannot serve the scheme.
    """
    yield (
        "TGI is in maintenance mode: its own README recommends vLLM for what is new; "
        "version 3.3.5 is the one meant here"
    )
    if target.format != COMPRESSED_TENSORS:
        return
    schemes = [words.split()[0] for words in target.scheme.split(", ") if words]
    for scheme in schemes:
        if scheme in _NOT_IN_TGI:
            raise InputError(
                f"TGI cannot serve {target.name}: {scheme}: {_NOT_IN_TGI[scheme]}; serve it with "
                f"--with vllm"
            )
        if scheme == "w8a8_static":
            yield "TGI takes one scale a token in place of the stored scales of inputs"
    if len(set(schemes)) > 1:
        raise InputError(
            f"TGI cannot serve {target.name}: it has several schemes ({target.scheme}), and TGI "
            f"knows one layout a model; serve it with --with vllm"
        )


_NOT_IN_TGI = MappingProxyType(
    {
        "w4a16_asym": "it looks for zero points under another name",
        "w4a8": "it has no such kernel",
        "w4a8_fp8": "it has no such kernel",
        "fp8_block": "it takes scales of compressed-tensors a row or a tensor, not a block",
    }
)


def check_problems(target: Target) -> None:
    """Refuse an artifact that `inspect` finds fault with.

    Raises:
        ArtifactError: the first problem.
    """
    if target.problems:
        more = len(target.problems) - 1
        words = f" (and {more} more; see `quantkit inspect`)" if more else ""
        raise ArtifactError(f"{target.location}: {target.problems[0]}{words}")
