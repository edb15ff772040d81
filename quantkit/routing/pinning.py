"""What a route leads to, named by its content: a commit of the Hub, or the hash of the files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint.reader import hash_files, open_checkpoint
from quantkit.checkpoint.source import find_folder, resolve_config, resolve_source
from quantkit.errors import InputError, PublishError
from quantkit.formats.inspect import find_evidence
from quantkit.ggml_types import GGUF
from quantkit.publishing import promote
from quantkit.publishing.checking import CheckedArtifact, check_output
from quantkit.records import Progress
from quantkit.schemes import ONNX

_DIGITS = 12
_ANY = "gateway"
"""An alias that is asked about and not set."""

_RUNTIMES: Mapping[str, str] = {GGUF: "llama.cpp", ONNX: "onnxruntime", "modelopt": "tensorrt-llm"}
"""Format -> what serves it; vLLM serves the others."""
_TAKE_HUB_IDS = ("vllm", "tensorrt-llm")


@dataclass(frozen=True)
class Pinned:
    """A model that cannot change without changing its name."""

    name: str
    """NAME@REVISION: by it requests ask the server, and the server answers to it alone."""
    location: str
    """What `quantkit serve` is given."""
    revision: str
    """Commit of the Hub, or sha256 over the hashes of the files."""
    runtime: str
    verdict: str | None
    """The gate's; None for the original."""
    download: tuple[str, ...] = ()
    """The command that brings it to `location`, where its server takes no Hub id."""


def pin_quantized(artifact: str, *, unproven: bool, tell: Progress) -> Pinned:
    """Name an artifact by its content; it has passed, and its files are hashed again.

    Args:
        artifact: an output of quantkit or its only format's folder, or a Hub id (id@revision) that
            quantkit published.
        unproven: accept any artifact.

    Raises:
        InputError: there is none, or it has not passed.
    """
    folder = _find_folder(artifact)
    if folder is None:
        return _pin_published(artifact, unproven=unproven, tell=tell)
    if unproven:
        return _pin_folder(artifact, folder)
    try:
        return _pin_output(folder, tell)
    except PublishError as error:
        raise InputError(f"{error}; --unproven routes to it all the same") from None


def _pin_output(folder: Path, tell: Progress) -> Pinned:
    """Name an artifact of an output that passed.

    Raises:
        PublishError: it did not, or is not what passed.
        InputError: the output has several artifacts.
    """
    evidence = find_evidence(folder)
    output = folder if evidence is None else evidence.parent
    checked = check_output(output, tell)
    chosen = _choose(checked.artifacts, folder, output)
    hashes = {file.path: file.sha256 for file in chosen.files}
    revision = _combine(hashes)
    whole = output.absolute().name
    name = whole if len(checked.artifacts) == 1 else f"{whole}-{chosen.name}"
    return Pinned(
        _name(name, revision),
        str(chosen.folder),
        revision,
        _RUNTIMES.get(chosen.format, "vllm"),
        "PASS",
    )


def pin_baseline(model: str) -> Pinned:
    """Name the original by its content; a folder's files are hashed.

    Raises:
        InputError: there is none.
    """
    folder = _find_folder(model)
    if folder is not None:
        return _pin_folder(model, folder, baseline=True)
    source = resolve_config(model)
    repo = model.partition("@")[0]
    revision = str(source.revision)
    return Pinned(f"{repo}@{revision[:_DIGITS]}", f"{repo}@{revision}", revision, "vllm", None)


def _find_folder(model: str) -> Path | None:
    """The folder or GGUF file of that name; None where it can only be a Hub id."""
    if model.endswith(".gguf") and Path(model).is_file():
        return Path(model)
    return find_folder(model)


def _choose(artifacts: tuple[CheckedArtifact, ...], folder: Path, output: Path) -> CheckedArtifact:
    """The artifact that is meant: the one in `folder`, or the only one of the output.

    Raises:
        InputError: there are several.
    """
    inside = [each for each in artifacts if each.folder.absolute() == folder.absolute()]
    if inside or len(artifacts) == 1:
        return (inside or list(artifacts))[0]
    names = ", ".join(each.path for each in artifacts)
    raise InputError(f"{output} holds several artifacts: name the folder of one of them ({names})")


def _pin_folder(model: str, folder: Path, *, baseline: bool = False) -> Pinned:
    """Name a folder of files that nobody has recorded, or a GGUF file."""
    if folder.is_file():
        with folder.open("rb") as file:
            hashes = {folder.name: hashlib.file_digest(file, "sha256").hexdigest()}
        runtime, stem = "llama.cpp", folder.stem
    else:
        hashes = hash_files(open_checkpoint(resolve_source(model)))
        runtime, stem = "vllm", folder.absolute().name
    revision = _combine(hashes)
    return Pinned(
        _name(stem, revision),
        model,
        revision,
        runtime,
        None if baseline else "UNJUDGED",
    )


def _name(name: str, revision: str) -> str:
    """NAME@REVISION, of letters that `quantkit serve` takes for a model's name."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}@{revision[:_DIGITS]}"


def _combine(hashes: Mapping[str, str]) -> str:
    """One sha256 over the names and hashes of files."""
    text = json.dumps(dict(sorted(hashes.items())), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _pin_published(model: str, *, unproven: bool, tell: Progress) -> Pinned:
    """Name a repository of the Hub by the commit that is meant now.

    Raises:
        InputError: there is none, or what is there has not passed.
    """
    repo, _, revision = model.partition("@")
    if unproven:
        commit = str(resolve_config(model).revision)
        name = f"{repo}@{commit[:_DIGITS]}"
        return Pinned(name, f"{repo}@{commit}", commit, "vllm", "UNJUDGED")
    # What an alias may name is what a route may lead to; nothing is moved.
    checked = promote(repo, alias=_ANY, at=revision or None, dry_run=True, progress=tell)
    commit, runtime = checked.after, _RUNTIMES.get(checked.format, "vllm")
    name, location = f"{repo}@{commit[:_DIGITS]}", f"{repo}@{commit}"
    download: tuple[str, ...] = ()
    if checked.folder or runtime not in _TAKE_HUB_IDS:
        local = repo.rpartition("/")[2]
        location = "/".join(part for part in (local, checked.folder) if part)
        download = _download(repo, commit, checked.folder, local)
    return Pinned(name, location, commit, runtime, "PASS", download)


def _download(repo: str, commit: str, folder: str, local: str) -> tuple[str, ...]:
    included = ("--include", f"{folder}/*") if folder else ()
    return ("hf", "download", repo, "--revision", commit, *included, "--local-dir", local)
