"""Whether a checkpoint in ModelOpt's layout is what its readers look for.

The rules are those of TensorRT-LLM (_torch/modules/linear.py, _torch/models/modeling_utils.py) and
of vLLM 0.32 (quantization/modelopt.py): every linear layer that is not excluded has the tensors of
the one algorithm; of layers that they make one of, all or none; such layers round their inputs with
one scale, and under FP8 have one scale for their weights, since codes are rounded again otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.checkpoint.skeleton import build_unchecked, summarize_names, unknown_tensors
from quantkit.errors import CheckpointError, InputError
from quantkit.formats.comparison import Comparison, StoredCodes, compare_artifact
from quantkit.formats.kv_scales import find_attentions
from quantkit.formats.layouts import INPUT_SCALE, SCALE
from quantkit.formats.modelopt.layout import AWQ, FP8, FP8_ROWS, SMOOTHQUANT, name_scales
from quantkit.formats.reader_rules import find_fused
from quantkit.formats.readers.fitting import fit_model
from quantkit.formats.readers.stored import StoredModel, read_weight
from quantkit.formats.runtimes import Answer, RuntimeSupport, Serves
from quantkit.formats.stored_values import check_cache_scales, check_values
from quantkit.schemes import MODELOPT_GROUP_SIZES


@dataclass(frozen=True)
class CheckedModel:
    """What was found out about the tensors of a checkpoint."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    runtimes: tuple[RuntimeSupport, ...]
    comparison: Comparison | None


def check_modelopt(model: StoredModel, base: Checkpoint | None) -> CheckedModel:
    """Check a checkpoint of ModelOpt's for its readers; every tensor is read.

    Args:
        model: from `open_stored`; its own problems are not told again.
        base: the checkpoint that it was made from, to compare with.

    Raises:
        CheckpointError: the base is quantized or damaged.
    """
    artifact = model.checkpoint
    problems: list[str] = []
    notes: list[str] = []
    try:
        fit = fit_model(model, "BF16", keeps_cache=True)
    except InputError as error:
        problems.append(str(error))
    else:
        problems += _check_exclusions(model, fit.linears)
        unknown = unknown_tensors(fit.plain, build_unchecked(fit.plain))
        if unknown:
            names = ", ".join(summarize_names(unknown)[:3])
            notes.append(f"{len(unknown)} tensors have no place in the model: {names}")
    problems += _check_cache(model)
    problems += check_values(artifact)
    problems += check_cache_scales(artifact)
    try:
        found = list(_find_unequal(model))
    except CheckpointError:
        # What is damaged is told by the check of all values.
        found = []
    notes += found
    comparison = None
    if base is not None:
        comparison = compare_artifact(artifact, base, _find_codes(model))
        problems += comparison.problems
    return CheckedModel(tuple(problems), tuple(notes), (*_find_support(model),), comparison)


def _find_codes(model: StoredModel) -> StoredCodes:
    def read(name: str) -> tuple[Tensor, int]:
        return read_weight(model, name), model.layers[name].bits

    parts = (tensor for layer in model.layers.values() for tensor in layer.parts.values())
    return StoredCodes(tuple(model.layers), frozenset(parts), read)


def _check_exclusions(model: StoredModel, linears: Sequence[str]) -> Iterator[str]:
    """Yield linear layers that readers take for quantized ones, and that are not."""
    quantization = model.quantization
    tensors, left_out = model.checkpoint.tensors, quantization.list_left_out(linears)
    for name in linears:
        if f"{name}.weight" not in tensors or name in model.layers or name in model.broken:
            continue
        if name not in left_out:
            yield f"layer {name} is not quantized, but {quantization.where} does not exclude it"
    for members in find_fused(dict.fromkeys(linears)):
        if 0 < sum(name in model.layers for name in members) < len(members):
            names = ", ".join(members)
            yield f"servers make one layer of {names}, of which some are quantized and some not"


def _check_cache(model: StoredModel) -> Iterator[str]:
    """Compare the described key/value cache with the scales that are stored."""
    kv_cache, where = model.quantization.kv_cache, model.quantization.where
    if kv_cache not in ("none", "fp8"):
        yield f"{where} describes a key/value cache that quantkit does not know: {kv_cache}"
        return
    stored = set(model.cache_scales)
    if kv_cache == "none":
        if stored:
            yield (
                f"{len(stored)} scales of a key/value cache are stored, for instance "
                f"{min(stored)}, but {where} describes none: servers leave the cache in 16 bits"
            )
        return
    names = name_scales(name for name in find_attentions(model.checkpoint) if "_proj" not in name)
    missing = [name for name in names if name not in stored]
    if missing or not names:
        first = f", for instance {missing[0]}" if missing else ""
        yield (
            f"{where} describes a quantized KV cache, but {len(missing) or 'all'} of its scales "
            f"are missing{first}: servers take 1.0 for them without a word"
        )
    for name in stored & set(names):
        shape = model.checkpoint.tensors[name].shape
        if shape not in ((), (1,)):
            yield f"tensor {name} has the shape {list(shape)}, not []"


def _find_unequal(model: StoredModel) -> Iterator[str]:
    """Yield layers that servers make one of and whose scales differ where they may not.

    Raises:
        CheckpointError: a scale cannot be read.
    """
    parts = {FP8: (SCALE, INPUT_SCALE), SMOOTHQUANT: (INPUT_SCALE,)}
    for part in parts.get(model.quantization.algorithm, ()):
        for members in find_fused(model.layers):
            names = [model.layers[name].parts[part] for name in members]
            scales = {float(read_tensor(model.checkpoint, name).reshape(())) for name in names}
            if len(scales) > 1:
                what = "rounded again" if part == SCALE else "with inputs rounded more coarsely"
                yield (
                    f"{members[0]} and the layers that servers make one of with it have "
                    f"{len(scales)} values of {part}: the largest is taken, and all are {what}"
                )


_LINEAR = "_torch/modules/linear.py"
_VLLM = "quantization/modelopt.py"


def _find_support(model: StoredModel) -> Iterator[RuntimeSupport]:
    """Say what TensorRT-LLM, vLLM and transformers make of the checkpoint."""
    algorithm = model.quantization.algorithm
    rows: dict[str, tuple[Serves, str, str]] = {
        "tensorrt-llm": ("yes", "", _LINEAR),
        "vllm-cuda": ("no", "its reader of this layout knows FP8 alone", _VLLM),
        "transformers": ("no", "it has no reader of this layout", "quantizers/auto.py"),
    }
    if algorithm in (FP8, FP8_ROWS):
        words = "compute capability 8.9 (Ada, Hopper) or later"
        rows["tensorrt-llm"] = ("yes", words, _LINEAR)
        rows["vllm-cuda"] = ("yes", words, _VLLM)
    if algorithm == AWQ:
        sizes = {layer.group_size for layer in model.layers.values()}
        if sizes - set(MODELOPT_GROUP_SIZES):
            words = f"groups of {', '.join(map(str, sorted(map(int, filter(None, sizes)))))}"
            known = " and ".join(map(str, MODELOPT_GROUP_SIZES))
            rows["tensorrt-llm"] = ("no", f"{words}; its kernels have {known}", _LINEAR)
    if algorithm == SMOOTHQUANT:
        words = "its engines have it, its PyTorch backend refuses it"
        rows["tensorrt-llm"] = ("partly", words, _LINEAR)
    for runtime, (serves, words, source) in rows.items():
        answers = [Answer(serves, words, source, algorithm)]
        if runtime == "tensorrt-llm" and model.quantization.kv_cache == "fp8" and serves == "yes":
            serves = "partly"
            words = "its PyTorch backend takes 1 for the stored scales"
            answers.append(Answer("partly", words, "_torch/modules/attention.py", "kv cache fp8"))
        yield RuntimeSupport(runtime, serves, tuple(answers))
