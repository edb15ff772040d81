"""Is an ONNX file sound: its graph in order, its numbers possible, and would a runtime load it?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from quantkit.formats.onnx.blocks import OnnxLayer
from quantkit.formats.onnx.container import OnnxFile
from quantkit.formats.onnx.genai import check_genai, read_genai_config
from quantkit.formats.onnx.inspection import find_config, find_kind, list_folders
from quantkit.formats.onnx.loading import Trial, try_loading
from quantkit.formats.onnx.operators import find_layers
from quantkit.formats.onnx.ordering import check_order
from quantkit.formats.onnx.stored_numbers import check_numbers
from quantkit.formats.runtimes import Answer, RuntimeSupport, Serves

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "vocab.txt")
_MOST = 5
"""Lines of one kind."""
_CLAIM = re.compile(r"(^|[._-])(u?int[248]|q[248]|bnb4|quant|quantized)($|[._-])")
"""Parts of the names of files that are quantized."""


@dataclass(frozen=True)
class OnnxCheck:
    """What was checked, and what came of it."""

    problems: tuple[str, ...]
    """What makes the file unfit, one line each."""
    notes: tuple[str, ...]
    """What should be known and is no fault."""
    runtimes: tuple[RuntimeSupport, ...]


def check_onnx(file: OnnxFile) -> OnnxCheck:
    """Check the graph and every number of an opened file, and let ONNX Runtime load it.

    Raises:
        ArtifactError: genai_config.json is damaged, or names code or files outside of the folder.
    """
    layers = find_layers(file).layers
    problems = [*check_order(file), *check_numbers(file, layers), *_check_claim(file, layers)]
    notes: list[str] = []
    config, beside = read_genai_config(file.path.parent), find_config(file.path, problems)
    if config is not None:
        problems += check_genai(file, config, beside)
    if find_kind(file) != "other" and not _has_tokenizer(file):
        notes.append("there is no tokenizer: whoever runs the model needs one")
    # A folder that is known to be wrong is not tried: the library ends the process over some.
    genai = file.path.parent if config is not None and not problems else None
    trial = try_loading(file, genai)
    problems += _judge_trial(trial)
    return OnnxCheck(tuple(problems), tuple(notes), tuple(_list_support(trial, layers)))


def _has_tokenizer(file: OnnxFile) -> bool:
    folders = list_folders(file.path)
    return any((folder / name).is_file() for folder in folders for name in TOKENIZERS)


def _check_claim(file: OnnxFile, layers: tuple[OnnxLayer, ...]) -> Iterator[str]:
    """A file that says it is quantized has something quantized."""
    if layers:
        return
    # onnx.quantize is also the producer of graphs that were only prepared.
    claim = _CLAIM.search(file.path.stem.lower())
    if claim is not None:
        yield f"the file calls itself quantized ({claim[2]!r}), but no operator reads codes"


def _judge_trial(trial: Trial) -> Iterator[str]:
    for error in trial.errors.get("checker", ()):
        yield f"onnx's checker: {error}"
    if not trial.loads:
        missing = trial.errors.get("kernels", ())
        if missing:
            yield f"ONNX Runtime has no kernel on the CPU for {', '.join(missing[:_MOST])}"
        for error in trial.errors.get("session", ()):
            yield f"ONNX Runtime does not load it: {error}"
    for error in trial.errors.get("genai", ()):
        yield f"onnxruntime-genai does not load it: {error}"
    if trial.died is not None:
        step, how = trial.died
        yield f"the process that tried to load it {how}, at {step!r}"


def _list_support(trial: Trial, layers: tuple[OnnxLayer, ...]) -> Iterator[RuntimeSupport]:
    kinds = sorted({layer.operator for layer in layers}) or ["graph"]
    serves: Serves = "yes" if trial.loads else "no"
    words = "a session was created on the CPU" if trial.loads else "no session on the CPU"
    answers = tuple(Answer(serves, words, "", kind) for kind in kinds)
    yield RuntimeSupport("onnxruntime", serves, answers)
    if "genai" in trial.errors:
        loads = not trial.errors["genai"]
        serves = "yes" if loads else "no"
        words = "model and tokenizer were loaded" if loads else "it was not loaded"
        yield RuntimeSupport("onnxruntime-genai", serves, (Answer(serves, words, "", "folder"),))
