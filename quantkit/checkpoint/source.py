"""What the user calls a model -> a folder on this disk."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from quantkit.checkpoint.paths import join_inside
from quantkit.errors import (
    CheckpointError,
    MissingPackageError,
    QuantkitError,
    ResourceError,
    is_of_machine,
    nearest,
    raise_alone,
)
from quantkit.masking import masked_logs
from quantkit.records import Source

TRANSFORMER_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_xlm-roberta_config.json",
)
"""What sentence-transformers says of the encoder itself, one of these; the first counts."""

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",
    "1_Pooling/config.json",
    *TRANSFORMER_FILES,
    "config_sentence_transformers.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
)
"""Files beside the config and the weights that a checkpoint may have: tokenizers, what
sentence-transformers does with the vectors of an encoder, and terms."""

CHAT_TEMPLATES = "additional_chat_templates"
"""Folder of named chat templates, one `.jinja` file each."""

QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json")
"""Files in which the first writers of GPTQ and AWQ describe a checkpoint, and config.json does not;
in the order of AutoGPTQ. They do not travel: what is written anew has a description of its own."""

MODELOPT_FILE = "hf_quant_config.json"
"""File in which ModelOpt describes a checkpoint; config.json may as well. It does not travel."""

MODEL_CARD = "README.md"
"""It says under which licence the model is, which holds for what is made of it too."""

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""The file that maps tensors to shards, by preference; its name less `.index.json` is the file of
a checkpoint without shards."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


def resolve_source(model: str) -> Source:
    """Find a model's folder, downloading it where it is named by a Hub id.

    Of a Hub repository only the config, the tokenizer, the terms and the safetensors weights are
    downloaded; pickled weights only where there are no others.

    Args:
        model: a folder, a Hub id, or `id@revision` with a branch, a tag or a commit.

    Raises:
        CheckpointError: there is neither such a folder nor such a model, or it is not accessible.
    """
    folder = find_folder(model)
    if folder is not None:
        return Source(model, folder, None)
    return _download(model)


def resolve_config(model: str) -> Source:
    """Find the folder of a model's config.json, of which a Hub repository is asked alone.

    Raises:
        CheckpointError: as `resolve_source`.
    """
    folder = find_folder(model)
    if folder is not None:
        return Source(model, folder, None)
    repo, _, revision = model.partition("@")
    folder = _fetch(model, repo, revision or None, ["config.json"])
    return Source(model, folder, folder.name)


def find_folder(model: str) -> Path | None:
    """Return the folder that `model` names, or None where it can only be a Hub id.

    Raises:
        CheckpointError: it is neither.
    """
    if not model.strip():
        raise CheckpointError("the model's name is empty: name a folder or a Hub id")
    try:
        folder = Path(model).expanduser()
        if folder.is_dir():
            return folder
        is_file = folder.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"model {model!r} cannot be looked up: {error}") from None
    if is_file:
        known = " of the original model" if folder.suffix == ".gguf" else ""
        raise CheckpointError(
            f"model {model!r} is a file: name the folder{known} that holds config.json"
        )
    if not _HUB_ID.fullmatch(model) or _looks_like_path(model):
        place = "" if folder.is_absolute() else f" in {Path.cwd()}"
        near = _find_near(folder)
        raise CheckpointError(f"model {model!r}: there is no such folder{place}{near}")
    return None


def _find_near(folder: Path) -> str:
    """What may have been meant by a folder that is not there: one that is called nearly so."""
    missing = folder
    while not missing.parent.exists():
        missing = missing.parent
    try:
        beside = (str(entry) for entry in missing.parent.iterdir() if entry.is_dir())
        return nearest(str(missing), beside)
    except OSError:
        return ""


def list_side_files(folder: Path) -> tuple[str, ...]:
    """Return the names, relative to `folder`, of the side files that are there."""
    names = [name for name in SIDE_FILES if (folder / name).is_file()]
    templates = sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))
    return (*names, *(f"{CHAT_TEMPLATES}/{path.name}" for path in templates))


def list_described(folder: Path) -> tuple[str, ...]:
    """Return the names of all files of a checkpoint that are there, but for its weights."""
    names = ("config.json", *QUANTIZATION_FILES, MODELOPT_FILE, *INDEXES)
    return (*(name for name in names if (folder / name).is_file()), *list_side_files(folder))


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.endswith("/")


def fetch_description(model: str) -> Source:
    """Download all of a Hub repository that a checkpoint has besides its weights.

    Raises:
        CheckpointError: as `resolve_source`.
    """
    repo, _, revision = model.partition("@")
    templates = f"{CHAT_TEMPLATES}/*.jinja"
    small = ["config.json", *QUANTIZATION_FILES, MODELOPT_FILE, *INDEXES, *SIDE_FILES, templates]
    small.append(MODEL_CARD)
    folder = _fetch(model, repo, revision or None, small)
    return Source(model, folder, folder.name)


def _download(model: str) -> Source:
    described = fetch_description(model)
    # The commit is pinned from here on: a push between two calls cannot mix revisions.
    repo, folder, commit = model.partition("@")[0], described.folder, described.revision
    for index in INDEXES:
        names = list_shards(folder, index)
        folder = _fetch(model, repo, commit, names)
        if all((folder / name).is_file() for name in names):
            break
    return Source(model, folder, commit)


def list_shards(folder: Path, index: str) -> list[str]:
    """Return the names of weight files as literal patterns; what is wrong is left to the reader.

    They are those of the index, or without one the file that needs none. Hub patterns are shell
    patterns, so names with wildcards are left out.

    Raises:
        CheckpointError: a name would lead out of the folder; it also becomes a part of an address,
            to which the token is sent.
    """
    if not (folder / index).is_file():
        return [index.removesuffix(".index.json")]
    try:
        names = set(json.loads((folder / index).read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    plain = sorted(name for name in names if isinstance(name, str) and not set(name) & set("*?["))
    for name in plain:
        join_inside(folder, name)
    return plain


def _fetch(model: str, repo: str, revision: str | None, names: Sequence[str]) -> Path:
    """Bring `names` of a repository into the Hub's cache and return the snapshot's folder."""
    with explaining(model, repo, revision):
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(names),
            # A star of a pattern also stands for slashes, and so for `..`.
            ignore_patterns=[f"{CHAT_TEMPLATES}/*/*"],
        )
        return Path(found)


@contextmanager
def explaining(model: str, repo: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises while it downloads into what the user should read.

    The client's exceptions carry the request, and with it the token: none gets out of here, not
    even as the context of another.

    Raises:
        CheckpointError: there is no such model, it is not accessible, or the Hub is not.
        ResourceError: the disk is full or fails, or too many files are open.
        MissingPackageError: the client is not installed.
    """
    try:
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    except ImportError:
        raise MissingPackageError(
            "huggingface_hub", "a model on the Hub", "pip install huggingface_hub"
        ) from None
    try:
        with masked_logs():
            yield
        return
    except (HTTPError, OSError, ValueError) as error:
        caught = error
    found = _explain(caught, model, repo, revision)
    raise_alone(ResourceError(str(found)) if is_of_machine(caught) else found)


def _explain(error: Exception, model: str, repo: str, revision: str | None) -> QuantkitError:
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return CheckpointError(
            f"model {model!r} is gated: ask for access at https://huggingface.co/{repo}, then log "
            f"in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(
            f"model {model!r} is neither a folder nor a model on the Hub that you may see: check "
            f"the name; if it is private, log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"model {model!r}: {repo} has no revision {revision!r} on the Hub")
    if isinstance(error, HFValidationError):
        return CheckpointError(
            f"model {model!r} is neither a folder nor a valid Hub id (owner/name)"
        )
    if isinstance(error, LocalEntryNotFoundError):
        if isinstance(error.__cause__, HfHubHTTPError):
            return _refusal(model, error.__cause__.response.status_code)
        near = _find_near(Path(model))
        return CheckpointError(
            f"model {model!r} is neither a folder nor in the local Hub cache, and the Hub cannot "
            f"be reached: check the name, the connection and HF_HUB_OFFLINE{near}"
        )
    if isinstance(error, HfHubHTTPError):
        return _refusal(model, error.response.status_code)
    if isinstance(error, HTTPError | OSError):
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return ResourceError(
                f"no space left while downloading {model!r}: free some or set HF_HUB_CACHE"
            )
        why = getattr(error, "strerror", None) or type(error).__name__
        return CheckpointError(f"model {model!r} could not be downloaded: {why}")
    # So it refuses names that lead out of its cache, and so the system refuses a NUL.
    why = (str(error).splitlines() or [""])[0]
    return CheckpointError(f"model {model!r}: the Hub lists a file that is refused: {why}")


def _refusal(model: str, status: int) -> CheckpointError:
    hints = {
        401: "it does not accept the token, which was revoked or has expired, and with a wrong "
        "token it shows nothing at all: log in with `hf auth login`, or set another HF_TOKEN",
        403: "the token has no access to it: take one with the right to read it, and ask for "
        "access on the model's page if it is gated",
        404: "it knows no such model: a name is OWNER/NAME, and a folder's path begins with ./",
        429: "too many requests: the same command goes on in some minutes, and with a token "
        "(`hf auth login` or HF_TOKEN) more of them are allowed",
    }
    hint = hints.get(status, "the same command goes on later")
    return CheckpointError(f"model {model!r}: the Hub answered with status {status}; {hint}")
