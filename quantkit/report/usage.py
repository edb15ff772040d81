"""The part of a model card that says how to run it: from its folder, or from the Hub.

On the Hub, vLLM and transformers load a repository by its name. llama.cpp takes of `-hf
OWNER/NAME:TYPE` the first GGUF file whose path has the type, in any folder
(common/download.cpp of llama.cpp, `find_best_model`). What else there is downloads first.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.ggml_types import GGUF
from quantkit.records import ArtifactReport, LayerRecord
from quantkit.report.rows import is_encoder
from quantkit.report.snippets import decoder_lines, encoder_lines
from quantkit.report.text import code_block, escape_markdown
from quantkit.schemes import MODELOPT, ONNX, RUNTIME_NOTES, SCHEMES

# As llama.cpp finds the type in a file's name, less the number of a part.
_TYPE = re.compile(r"[-.]([A-Za-z0-9_]+?)(?:-\d{5}-of-\d{5})?\.gguf$")


@dataclass(frozen=True)
class Place:
    """Where an artifact lies."""

    location: str
    """Folder, or `owner/name`."""
    on_hub: bool = False
    folder: str = ""
    """Of a repository; empty: at its root."""
    revision: str | None = None
    """Branch of a repository where it is not the main one."""
    evidence_above: bool = False
    """Whether quantkit.json lies in a folder above the artifact's."""


def serve_command(artifact: ArtifactReport, place: Place) -> str:
    """Return the one command that runs what is on the Hub, or that brings it here first."""
    revised = ["--revision", place.revision] if place.revision else []
    if artifact.format == GGUF and not place.revision:
        return shlex.join(["llama-server", "-hf", f"{place.location}:{_find_type(artifact)}"])
    if artifact.format == GGUF:
        local = shlex.quote(f"{_local_folder(place)}/{artifact.name}")
        return f"{_download(place)} && llama-server -m {local}"
    if artifact.format == MODELOPT and not (place.folder or place.revision):
        return shlex.join(["trtllm-serve", place.location])
    if artifact.format == MODELOPT:
        return f"{_download(place)} && trtllm-serve {shlex.quote(_local_folder(place))}"
    if artifact.format != ONNX and not place.folder:
        return shlex.join(["vllm", "serve", place.location, *revised])
    if artifact.format != ONNX:
        return f"{_download(place)} && vllm serve {shlex.quote(_local_folder(place))}"
    return _download(place)


def usage_section(
    artifact: ArtifactReport, place: Place, layers: Sequence[LayerRecord] = ()
) -> str:
    """Return the section of the card.

    Args:
        artifact: what the card is about.
        place: where it lies.
        layers: its own.
    """
    if artifact.format == GGUF:
        return _join(_file_parts(artifact, place))
    if artifact.format == ONNX:
        return _join(_graph_parts(artifact, place))
    if artifact.format == MODELOPT:
        return _join(_modelopt_parts(artifact, place))
    return _join(_folder_parts(place, _runtime_notes(artifact, layers)))


def _join(parts: Sequence[str]) -> str:
    return "\n\n".join(["## Use", *parts])


def _where(place: Place) -> str:
    return " in this folder" if place.location == "." else ""


def _folder_parts(place: Place, notes: Sequence[str]) -> list[str]:
    arguments = [json.dumps(place.location)]
    if place.folder:
        arguments.append(f"subfolder={json.dumps(place.folder)}")
    if place.revision:
        arguments.append(f"revision={json.dumps(place.revision)}")
    quoted = ", ".join(arguments)
    serve = f"vllm serve {shlex.quote(place.location)}"
    if place.on_hub:
        serve = f"vllm serve {shlex.quote(_local_folder(place))}"
        serve = f"{_download(place)}\n{serve}" if place.folder else _serve_by_name(place)
    where = _where(place)
    return [
        f"With vLLM{where}:",
        code_block(serve, "sh"),
        f"With transformers{where} (`pip install transformers compressed-tensors`):",
        code_block(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({quoted})\n"
            f'model = AutoModelForCausalLM.from_pretrained({quoted}, dtype="auto")\n'
            'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
            "python",
        ),
        *(["\n".join(f"- {escape_markdown(note)}." for note in notes)] if notes else []),
    ]


def _modelopt_parts(artifact: ArtifactReport, place: Place) -> list[str]:
    """How to serve ModelOpt's layout, which was judged without this server."""
    serve = f"trtllm-serve {shlex.quote(place.location)}"
    if place.on_hub:
        serve = serve_command(artifact, place).replace(" && ", "\n")
    parts = [f"With TensorRT-LLM{_where(place)}, on an NVIDIA GPU:", code_block(serve, "sh")]
    if artifact.judgement.checks:
        parts.append(
            f"It was judged in {escape_markdown(artifact.runtime)} by the same codes and scales. "
            "TensorRT-LLM itself was not run."
        )
    return parts


def _serve_by_name(place: Place) -> str:
    revised = ["--revision", place.revision] if place.revision else []
    return shlex.join(["vllm", "serve", place.location, *revised])


def _file_parts(artifact: ArtifactReport, place: Place) -> list[str]:
    """How to run a GGUF file."""
    model = shlex.quote(artifact.name.removesuffix(".gguf").lower())
    create = f"ollama create {model} -f Modelfile\nollama run {model}"
    if not place.on_hub:
        return [
            "With llama.cpp in this folder:",
            code_block(f"llama-server -m {shlex.quote(artifact.name)}", "sh"),
            "With Ollama in this folder:",
            code_block(create, "sh"),
        ]
    local = _local_folder(place)
    return [
        "With llama.cpp:",
        code_block(serve_command(artifact, place).replace(" && ", "\n"), "sh"),
        "With Ollama, by the Modelfile beside it:",
        code_block(f"{_download(place)}\ncd {shlex.quote(local)}\n{create}", "sh"),
    ]


def _graph_parts(artifact: ArtifactReport, place: Place) -> list[str]:
    """How to run an ONNX artifact."""
    folder = _local_folder(place) if place.on_hub else place.location
    if is_encoder(artifact):
        needs, lines = "onnxruntime transformers", encoder_lines(folder)
        name = "ONNX Runtime"
    else:
        needs, lines = "onnxruntime-genai", decoder_lines(folder)
        name = "ONNX Runtime GenAI"
    fetch = [code_block(_download(place), "sh")] if place.on_hub else []
    return [
        f"With {name}{_where(place)} (`pip install {needs}`):",
        *fetch,
        code_block(lines, "python"),
    ]


def _runtime_notes(artifact: ArtifactReport, layers: Sequence[LayerRecord]) -> Sequence[str]:
    used = {artifact.scheme, *(layer.scheme for layer in layers)} & set(SCHEMES)
    return [note for (scheme, _), note in RUNTIME_NOTES.items() if scheme in used]


def _find_type(artifact: ArtifactReport) -> str:
    found = _TYPE.search(artifact.name)
    return found.group(1) if found else artifact.scheme


def _local_folder(place: Place) -> str:
    """Where the artifact lies after `_download`."""
    name = place.location.rpartition("/")[2]
    return f"{name}/{place.folder}" if place.folder else name


def _download(place: Place) -> str:
    command = ["hf", "download", place.location]
    if place.folder:
        command += ["--include", f"{place.folder}/*"]
    if place.revision:
        command += ["--revision", place.revision]
    return shlex.join([*command, "--local-dir", place.location.rpartition("/")[2]])
