"""Ollama, by docs/modelfile.mdx and docs/faq.mdx of Ollama."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from quantkit.errors import CheckpointError
from quantkit.formats.gguf.modelfile import quote
from quantkit.serving.fitting import Needs
from quantkit.serving.llamacpp import find_needs as find_llamacpp_needs
from quantkit.serving.llamacpp import name_cache_type
from quantkit.serving.records import (
    Machine,
    MemoryPlan,
    Rendered,
    Target,
    Wish,
    bracketed,
    publish_port,
    reachable,
)

MODELFILE = "Modelfile"
SERVED_MODELFILE = "Modelfile.serve"
INSIDE_PORT = 11434
"""Of the image."""
MOST_BYTES = 1 << 20
"""Of a Modelfile; one with more is none."""

_CONTEXT = re.compile(
    r"^[^\S\n]*PARAMETER\s+num_ctx\s+(\d+)[^\S\n]*$", re.IGNORECASE | re.MULTILINE
)
_FROM = re.compile(r"^[^\S\n]*FROM\s.*$", re.IGNORECASE | re.MULTILINE)


def find_needs(target: Target, machine: Machine, wish: Wish) -> Needs:
    """Return what Ollama takes, whose engine is llama.cpp's."""
    return find_llamacpp_needs(target, machine, wish)


def render(target: Target, machine: Machine, memory: MemoryPlan, wish: Wish, name: str) -> Rendered:
    """Return the server's command, and those that make the model and run it.

    The Modelfile beside the file is taken as it is where it has the right context; else one with
    the right context is written.
    """
    environment = {
        "OLLAMA_HOST": f"{bracketed(wish.host)}:{wish.port}",
        "OLLAMA_NUM_PARALLEL": str(memory.concurrency),
        "OLLAMA_CONTEXT_LENGTH": str(memory.context),
    }
    if name_cache_type(wish) != "f16":
        # A quantized cache needs it.
        environment |= {
            "OLLAMA_FLASH_ATTENTION": "1",
            "OLLAMA_KV_CACHE_TYPE": name_cache_type(wish),
        }
    assert target.folder is not None
    beside = target.folder / MODELFILE
    text = _read(beside)
    files: dict[str, str] = {}
    named = None if text is None else _CONTEXT.search(text)
    if named is None or int(named[1]) != memory.context:
        files[SERVED_MODELFILE] = _compose(text, Path(target.location), memory.context)
    file = SERVED_MODELFILE if files else str(beside)
    client = ("env", f"OLLAMA_HOST={reachable(wish.host)}:{wish.port}", "ollama")
    notes = ["OLLAMA_KV_CACHE_TYPE and OLLAMA_NUM_PARALLEL hold for all models of the server"]
    if text is None:
        notes.append("no Modelfile lies beside: Ollama chooses the template by the file's own")
    model = name_model(name)
    notes.append(f"on a terminal, `ollama run {model}` talks to it")
    return Rendered(
        command=("ollama", "serve"),
        environment=environment,
        setup=((*client, "create", model, "-f", file),),
        files=files,
        container=_container(target, machine, environment, wish),
        health="/",
        notes=tuple(notes),
        model_name=model,
    )


def _container(
    target: Target, machine: Machine, environment: Mapping[str, str], wish: Wish
) -> tuple[str, ...]:
    """Ollama's published image; see docs/docker.mdx of Ollama."""
    assert target.folder is not None
    words = ["docker", "run", "-d", "--name", "ollama"]
    if machine.gpus:
        words += ["--gpus", "all"]
    for variable, value in environment.items():
        words += [] if variable == "OLLAMA_HOST" else ["-e", f"{variable}={value}"]
    words += [*publish_port(wish, INSIDE_PORT), "-v", "ollama:/root/.ollama"]
    return (*words, "-v", f"{target.folder.absolute()}:/models:ro", "ollama/ollama")


def name_model(name: str) -> str:
    """Return a name that Ollama takes: small letters, digits, `_`, `-`, `.`."""
    return re.sub(r"[^a-z0-9_.-]+", "-", name.lower()).strip("-._") or "model"


def _read(path: Path) -> str | None:
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > MOST_BYTES:
            raise CheckpointError(f"{path} is larger than any Modelfile")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


def _compose(text: str | None, file: Path, context: int) -> str:
    """The Modelfile beside the file, or a bare one, with another context.

    FROM becomes an absolute path, since the new one lies elsewhere.
    """
    source = f"FROM {quote(str(file.absolute()))}"
    parameter = f"PARAMETER num_ctx {context}"
    if text is None:
        return f"{source}\n{parameter}\n"
    # A replacement that is a function: the path may hold backslashes.
    found = _FROM.sub(lambda _: source, text, count=1)
    if _CONTEXT.search(found):
        return _CONTEXT.sub(lambda _: parameter, found)
    return f"{found.rstrip()}\n{parameter}\n"
