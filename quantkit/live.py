"""A model that is already in memory, as files: the gate judges files against files.

`save_pretrained` of transformers writes them, since only it knows how a model's parameters are
called in a checkpoint (it undoes what loading has merged). They lie beside the output for as long
as the job takes, under a name that follows from the output's:

    <output>.in-memory/
      lock                 held while a job uses the files
      model/               config.json, model-0000x-of-0000y.safetensors, tokenizer

The model stays as it is: nothing is moved, converted or run, no random number is drawn, and the
two keys of its config that `save_pretrained` sets are set back.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.errors import CheckpointError, InputError, OutputError, ResourceError, writing
from quantkit.locking import locked
from quantkit.records import IN_MEMORY, Source
from quantkit.staging import PARTS_OF_SAVED
from quantkit.workspace import as_os_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHARD = "2GB"
"""At the most of a shard, which is in the processor's memory while it is written."""

_TOKENIZER_BYTES = 100_000_000
"""What the disk must have besides the weights."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class LiveModel:
    """A model in memory that can be written.

    name: what evidence and reports call it. loaded_from: the Hub id by which it was loaded; None
    where it has none. Its weights may have changed since, so nothing follows from it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    loaded_from: str | None


def take_live(model: object, tokenizer: object = None) -> LiveModel:
    """Look at what the caller has in memory, and take off what DDP and torch.compile put around it.

    Args:
        model: a model of transformers.
        tokenizer: its tokenizer, or None where no text is read.

    Raises:
        InputError: it is no model of transformers, it is in parts (FSDP, DeepSpeed, tensor
            parallel), or the tokenizer is none.
        CheckpointError: it has adapters, is quantized, brings its own code, or lacks weights.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    inner = _unwrap(model)
    if hasattr(inner, "peft_config") or getattr(inner, "_hf_peft_config_loaded", False):
        raise CheckpointError(
            f"the model in memory has adapters ({type(inner).__name__}): merge them first, with "
            f"model = model.merge_and_unload()"
        )
    if not isinstance(inner, PreTrainedModel):
        raise InputError(
            f"model is of type {_name_type(inner)}: pass the name of a model (a folder, a Hub id) "
            f"or a model of transformers (PreTrainedModel)"
        )
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        within = getattr(tokenizer, "tokenizer", None)
        hint = "pass its .tokenizer" if within is not None else "pass one of transformers"
        raise InputError(f"tokenizer is of type {_name_type(tokenizer)}: {hint}")
    name = type(inner).__name__.removeprefix("FSDP")
    _refuse_state(inner)
    origin = str(getattr(inner, "name_or_path", "") or "")
    is_id = bool(_HUB_ID.fullmatch(origin)) and not Path(origin).exists()
    return LiveModel(inner, tokenizer, f"{IN_MEMORY}{name}", origin if is_id else None)


def place_of(output: Path) -> Path:
    """The folder beside `output` that a model in memory is written into."""
    return output.with_name(f"{output.name}.in-memory")


@contextmanager
def saved(model: object, tokenizer: object, beside: Path) -> Iterator[Path]:
    """Write a model in memory as a checkpoint beside `beside`, and remove it at the end.

    Weights are written in their own dtype, in shards of at most 2 GB, from whatever device they
    are on. The same weights give the same bytes, so that a job that was interrupted goes on when
    the call is repeated. What a killed job has left there is written anew.

    Args:
        model: as of `take_live`.
        tokenizer: the model's; None: the folder has none.
        beside: an output; the folder is on the same disk.

    Yields:
        The folder of the checkpoint.

    Raises:
        InputError, CheckpointError: as `take_live`; or a weight is NaN or infinite.
        OutputError: another job uses the folder, or it is not quantkit's, or cannot be written.
        ResourceError: the disk is too small, by how much.
    """
    live = take_live(model, tokenizer)
    place = place_of(beside)
    if place.is_symlink() or (place.exists() and not _is_ours(place)):
        raise OutputError(f"{place} is in the way, and quantkit did not write it: move it")
    folder = place / "model"
    with locked(place):
        try:
            with writing(folder):
                shutil.rmtree(folder, ignore_errors=True)
                _check_weights(live.model)
                _check_room(live.model, place)
                folder.mkdir()
                _write(live, folder)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(place, ignore_errors=True)


@contextmanager
def opened(live: LiveModel, beside: Path) -> Iterator[Checkpoint]:
    """Open what `saved` writes; in evidence it has the name of the model, not of the folder.

    Raises:
        QuantkitError: as `saved`.
    """
    with saved(live.model, live.tokenizer, beside) as folder:
        yield open_checkpoint(Source(live.name, folder, None, live.loaded_from))


def _is_ours(place: Path) -> bool:
    return place.is_dir() and {path.name for path in place.iterdir()} <= PARTS_OF_SAVED


def _name_type(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _unwrap(model: object) -> object:
    """Take off the wrappers whose inside is the whole model."""
    inner: Any = model
    while True:
        kind = type(inner)
        if isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        elif kind.__name__ == "OptimizedModule" and isinstance(inner, nn.Module):
            inner = inner._orig_mod
        elif kind.__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine"):
            raise InputError(
                f"the model in memory is a {kind.__name__}, and each process has a part of it: "
                f"save it whole with the trainer's own means and pass the folder"
            )
        else:
            return inner


def _refuse_state(model: PreTrainedModel) -> None:
    """Refuse a model whose parameters are not its plain weights."""
    config: Any = model.config
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None or getattr(model, "is_quantized", False):
        raise CheckpointError("the model in memory is quantized already: pass its 16-bit original")
    if getattr(config, "auto_map", None) or type(model).__module__.startswith(
        "transformers_modules"
    ):
        raise CheckpointError(
            f"the model in memory ({type(model).__name__}) brings its own code (auto_map), which "
            f"quantkit does not run"
        )
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise CheckpointError(
                f"{name} of the model in memory is on the meta device or offloaded: load the model "
                f"without a device_map that offloads, or pass its folder"
            )
        if hasattr(tensor, "ds_id") or hasattr(tensor, "placements"):
            raise InputError(
                f"{name} of the model in memory is in parts, of which this process has one: save "
                f"the model whole with the trainer's own means and pass the folder"
            )


def _stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters and buffers of a checkpoint, those that are tied once."""
    found: dict[str, Tensor] = {}
    # Kept, so that no other tensor takes an id that was seen.
    state = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def _check_weights(model: PreTrainedModel) -> None:
    """Refuse NaN and infinities before gigabytes are written.

    Raises:
        CheckpointError: there is one; the tensor is named.
    """
    for name, tensor in _stored_tensors(model).items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            raise CheckpointError(
                f"tensor {name} of the model in memory holds NaN or infinite values: go back to "
                f"weights from before it diverged"
            )


def _check_room(model: PreTrainedModel, place: Path) -> None:
    """Refuse a disk that cannot hold the weights a second time.

    Raises:
        ResourceError: it cannot.
    """
    tensors: Iterable[Tensor] = _stored_tensors(model).values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) + _TOKENIZER_BYTES
    free = shutil.disk_usage(place).free
    if free < size:
        raise ResourceError(
            f"the model in memory takes {size:,} bytes as files in {place}, while the job runs, "
            f"and {free:,} are free: free some space or choose another --output"
        )


def _write(live: LiveModel, folder: Path) -> None:
    """Let transformers write the model and its tokenizer.

    Raises:
        CheckpointError: it refuses, for instance a generation config that contradicts itself.
    """
    config = vars(live.model.config)
    before = dict(config)
    try:
        live.model.save_pretrained(folder, max_shard_size=_SHARD)
        if live.tokenizer is not None:
            with _forgetting_calls(live):
                live.tokenizer.save_pretrained(str(folder))
    except SafetensorError as error:
        raise as_os_error(error) from error
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"the model in memory cannot be saved: {reason}") from error
    finally:
        config.clear()
        config.update(before)


@contextmanager
def _forgetting_calls(live: LiveModel) -> Iterator[None]:
    """Take off meanwhile what the tokenizer has kept of its last call: truncation and padding.

    In tokenizer.json they would cut and fill the prompts of whatever reads that file by itself.
    Tokenizers of encoders keep them, as they are part of many of those.
    """
    backend: Any = getattr(live.tokenizer, "backend_tokenizer", None)
    if backend is None or not live.model.can_generate():
        yield
        return
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        yield
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
