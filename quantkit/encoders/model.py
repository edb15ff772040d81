"""An encoder's checkpoint: what its files say, and the model with its weights in float32.

Letters of shapes: B texts, T tokens of the longest one, H hidden features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from quantkit.checkpoint.headers import MAX_HEADER_BYTES, parse_json, read_json
from quantkit.checkpoint.paths import join_inside
from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.checkpoint.skeleton import build_on_meta, parse_config, summarize_names
from quantkit.checkpoint.source import TRANSFORMER_FILES
from quantkit.encoders.architectures import (
    ARCHITECTURES,
    FAMILIES,
    TASKS,
    EncoderFamily,
    find_architecture,
    is_encoder,
)
from quantkit.errors import CheckpointError, nearest
from quantkit.records.encoders import EncoderInfo, Pooling

__all__ = [
    "build_encoder",
    "describe_encoder",
    "find_family",
    "is_encoder",
    "load_encoder",
    "pool",
    "run_encoder",
    "tensor_names",
]

_CLASSES: Mapping[str, Any] = {
    "embedding": AutoModel,
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
}

_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}
"""Key of sentence-transformers' pooling -> our name of it."""

_MODULES = "modules.json"
_PRETRAINED = "ForMaskedLM"
_FLOATS = ("F64", "F32", "F16", "BF16")

# The names that BERT's first checkpoints have for the parameters of a norm.
_OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


def find_family(info: EncoderInfo) -> EncoderFamily:
    """Return the row of the encoder's family."""
    return FAMILIES[ARCHITECTURES[info.architecture][0]]


def describe_encoder(checkpoint: Checkpoint) -> EncoderInfo:
    """Say what an encoder is for, how its vectors are pooled, and what it takes.

    How token vectors become one is read from the files of sentence-transformers (modules.json and
    the folder of its pooling module); without them it is their mean, divided by its length, and a
    note says so. The longest text is what sentence-transformers' or the tokenizer's files say, and
    no longer than the model's positions.

    Raises:
        CheckpointError: the architecture is none that is built, a file is damaged, or a module
            follows the encoder that is not built.
    """
    architecture = _find_class(checkpoint)
    if architecture is None or architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{checkpoint.source.folder / 'config.json'}: {architecture} is no encoder that is "
            f"built{nearest(str(architecture), ARCHITECTURES)} (built: {', '.join(FAMILIES)}, each "
            f"with {', '.join(TASKS)})"
        )
    family_name, ending = ARCHITECTURES[architecture]
    family, task = FAMILIES[family_name], TASKS[ending]
    if checkpoint.config.get("model_type") != family.model_type:
        raise CheckpointError(
            f"{checkpoint.source.folder / 'config.json'}: {architecture} is of model_type "
            f"{family.model_type}, and the file says {checkpoint.config.get('model_type')!r}"
        )
    config = parse_config(checkpoint)
    if getattr(config, "is_decoder", False):
        raise CheckpointError(
            f"{checkpoint.source.folder / 'config.json'}: is_decoder is set, and a model whose "
            f"attention looks back alone is no encoder"
        )
    folder = checkpoint.source.folder
    notes: list[str] = []
    pooling: Pooling | None = None
    labels: tuple[str, ...] = ()
    if task == "embedding":
        pooling = _read_pooling(folder, notes)
    else:
        labels = _read_labels(checkpoint, config, notes)
    types = family.has_types and int(getattr(config, "type_vocab_size", 1)) > 1
    return EncoderInfo(
        architecture=architecture,
        task=task,
        pooling=pooling,
        max_length=_find_max_length(folder, config, family, notes),
        labels=labels,
        inputs=("input_ids", "attention_mask", *(("token_type_ids",) if types else ())),
        notes=tuple(notes),
        pad_id=int(config.pad_token_id or 0),
        multi_label=task != "embedding" and _has_several_labels(checkpoint),
    )


def _find_class(checkpoint: Checkpoint) -> str | None:
    """Return the class that the config names.

    Sentence encoders may name the one with the head of their pretraining, of which
    sentence-transformers takes the bare model: so does this where its files are there.
    """
    name = find_architecture(checkpoint.config)
    family = (name or "").removesuffix(_PRETRAINED)
    bare = family != name and family in FAMILIES
    if bare and join_inside(checkpoint.source.folder, _MODULES).is_file():
        return f"{family}Model"
    return name


def build_encoder(checkpoint: Checkpoint, info: EncoderInfo) -> nn.Module:
    """Build the encoder with parameters on the meta device, without an unused pooler.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    config = parse_config(checkpoint)
    make = _CLASSES[info.task].from_config
    model = build_on_meta(
        checkpoint, lambda: make(config, trust_remote_code=False, dtype=torch.float32)
    )
    if info.task == "embedding" and getattr(model, "pooler", None) is not None:
        # transformers' forward leaves it out then; token vectors alone are pooled.
        model.pooler = None  # type: ignore[assignment]
    return model


def load_encoder(checkpoint: Checkpoint, info: EncoderInfo) -> nn.Module:
    """Return the encoder with its weights, float32, in evaluation mode.

    Raises:
        CheckpointError: a tensor is missing, of another shape, of no floating-point type, or holds
            a NaN or an infinity.
    """
    model = build_encoder(checkpoint, info)
    places = tensor_names(checkpoint, info, model)
    tensors = {name: read_tensor(checkpoint, stored).float() for name, stored in places.items()}
    buffers = {name for name, _ in model.named_buffers()}
    missing, _ = model.load_state_dict(tensors, strict=False, assign=True)
    lost = sorted(set(missing) - buffers)
    if lost:
        raise CheckpointError(f"{checkpoint.source.name} lacks {', '.join(lost[:3])}")
    return model.requires_grad_(False).eval()


def tensor_names(checkpoint: Checkpoint, info: EncoderInfo, model: nn.Module) -> Mapping[str, str]:
    """Return parameter of the model -> the tensor of the checkpoint that it comes from.

    Names in the checkpoint may have or lack the prefix of the base model, as transformers accepts.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or of no floating-point type.
    """
    base = f"{find_family(info).base}."
    stored: dict[str, str] = {}
    for name in checkpoint.tensors:
        other = stored.setdefault(_without_base(_modern(name), base), name)
        if other != name:
            raise CheckpointError(
                f"{checkpoint.source.name} has both {other} and {name}: one tensor of two names"
            )
    found, missing = {}, []
    for name, parameter in model.named_parameters():
        tensor = stored.get(_without_base(name, base))
        if tensor is None:
            missing.append(name)
            continue
        place = checkpoint.tensors[tensor]
        if place.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"tensor {tensor} in {place.file} has the shape {list(place.shape)}, but "
                f"config.json describes {list(parameter.shape)}"
            )
        if place.dtype not in _FLOATS:
            raise CheckpointError(
                f"tensor {tensor} in {place.file} is {place.dtype}: an encoder starts from "
                f"weights in {', '.join(_FLOATS)}"
            )
        found[name] = tensor
    if missing:
        shown = ", ".join(summarize_names(missing)[:3])
        raise CheckpointError(
            f"{checkpoint.source.name} lacks {len(missing)} "
            f"tensor{'s' if len(missing) != 1 else ''} of {info.architecture}: {shown}; names "
            f"must be those of transformers' modules"
        )
    return found


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Return the vectors of texts [B, H] from those of their tokens.

    As sentence-transformers pools: the mean or the largest value over the tokens that are not
    padding, or the vector of the first token; divided by its length where `pooling` says so.

    Args:
        hidden: [B, T, H].
        mask: [B, T], 0 for padding.
        pooling: how.
    """
    if pooling.mode == "cls":
        vectors = hidden[:, 0]
    elif pooling.mode == "max":
        kept = mask.unsqueeze(-1).to(torch.bool)
        vectors = hidden.masked_fill(~kept, -1e9).amax(dim=1)
    else:
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        vectors = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
    return nn.functional.normalize(vectors, dim=-1) if pooling.normalize else vectors


def run_encoder(model: nn.Module, info: EncoderInfo, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the embeddings [B, H] of a padded batch, or its logits: [B, C], of tokens [B, T, C].

    Args:
        model: of `load_encoder`.
        info: what it is.
        batch: what `info.inputs` names, int64 [B, T].
    """
    output = model(**{name: batch[name] for name in info.inputs})
    if info.pooling is None:
        logits: Tensor = output.logits
        return logits
    return pool(output.last_hidden_state, batch["attention_mask"], info.pooling)


def _modern(name: str) -> str:
    for old, new in _OLD_NAMES:
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _without_base(name: str, base: str) -> str:
    return name.removeprefix(base)


def _read_pooling(folder: Path, notes: list[str]) -> Pooling:
    path = join_inside(folder, _MODULES)
    if not path.is_file():
        notes.append(
            "no modules.json of sentence-transformers: the vector of a text is taken to be the "
            "mean of its tokens' vectors, divided by its length"
        )
        return Pooling("mean", normalize=True)
    modules = list(_read_modules(path))
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointError(
            f"{path} lists the modules {', '.join(kinds) or 'none'}: what is built is Transformer, "
            f"then Pooling, then Normalize or nothing"
        )
    if modules[0][1]:
        raise CheckpointError(f"{path}: the encoder lies in {modules[0][1]!r}: name that folder")
    place = join_inside(folder, f"{modules[1][1]}/config.json")
    _note_prompts(folder, notes)
    return Pooling(_read_pooling_mode(place), normalize=len(kinds) == 3)


def _read_modules(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (last part of the class's name, folder) of each module of sentence-transformers."""
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_HEADER_BYTES} bytes")
    # The file holds a list, and the bounded reader of this package takes objects.
    modules = parse_json(b'{"modules":' + path.read_bytes() + b"}", str(path))["modules"]
    for module in modules if isinstance(modules, list) else [None]:
        kind, place = (
            (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
        )
        if not isinstance(kind, str) or not isinstance(place, str):
            raise CheckpointError(f"{path} is not a list of modules with a type and a path")
        yield kind.rpartition(".")[2], place


def _read_pooling_mode(path: Path) -> Any:
    """Return mean, cls or max, from the keys of old or new files of the pooling module."""
    config = read_json(path)
    modes = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
    named = config.get("pooling_mode")
    if named is not None:
        modes = [str(mode) for mode in (named if isinstance(named, list) else [named])]
    found = [_POOLINGS.get(mode, mode) for mode in modes]
    if len(found) != 1 or found[0] not in _POOLINGS.values():
        raise CheckpointError(
            f"{path}: the pooling {' + '.join(found) or 'none'} is not built (built: "
            f"{', '.join(_POOLINGS.values())}, one of them)"
        )
    return found[0]


def _note_prompts(folder: Path, notes: list[str]) -> None:
    path = join_inside(folder, "config_sentence_transformers.json")
    if not path.is_file():
        return
    config = read_json(path)
    prompts = config.get("prompts")
    if isinstance(prompts, dict) and any(prompts.values()):
        notes.append(
            f"the model has prompts ({', '.join(sorted(prompts))}), which are not added: "
            f"calibration and evaluation texts should begin with theirs"
        )


def _read_labels(checkpoint: Checkpoint, config: Any, notes: list[str]) -> tuple[str, ...]:
    count = int(config.num_labels)
    names = config.id2label or {}
    labels = tuple(str(names.get(index, f"LABEL_{index}")) for index in range(count))
    if len(set(labels)) < count:
        raise CheckpointError(
            f"{checkpoint.source.folder / 'config.json'}: id2label gives two classes one name"
        )
    if _has_several_labels(checkpoint):
        notes.append(
            "texts can have several labels, and the gate compares the most probable one alone"
        )
    return labels


def _has_several_labels(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.config.get("problem_type") == "multi_label_classification")


def _find_max_length(folder: Path, config: Any, family: EncoderFamily, notes: list[str]) -> int:
    limit = int(config.max_position_embeddings)
    if family.padded_positions:
        limit -= int(config.pad_token_id or 0) + 1
    for name in (*TRANSFORMER_FILES, "tokenizer_config.json"):
        path = join_inside(folder, name)
        tree = read_json(path) if path.is_file() else {}
        key = "max_seq_length" if name in TRANSFORMER_FILES else "model_max_length"
        length = tree.get(key)
        if tree.get("do_lower_case") is True and name in TRANSFORMER_FILES:
            notes.append(f"{name} asks for small letters, which the tokenizer has to make")
        # Tokenizers without a limit say 1e30.
        if isinstance(length, int) and 0 < length < 10**9:
            if length > limit:
                notes.append(
                    f"{name} says {key} {length}, and the model has positions for {limit} tokens"
                )
            return min(length, limit)
    return limit
