"""Judging an encoder's graph, in a job or later, and timing it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantkit.checkpoint.reader import Checkpoint
from quantkit.encoders.model import load_encoder
from quantkit.environments.places import find_python
from quantkit.errors import InputError, ResourceError, WorkerError
from quantkit.formats.onnx.encoder import write_float_encoder
from quantkit.judging.checks import fail_worker, note_no_speed
from quantkit.judging.encoder_verdict import judge_encoder
from quantkit.judging.encoders import evaluate_encoder
from quantkit.judging.places import ONNX_RUNTIME
from quantkit.judging.speed import measure_encoder_speed
from quantkit.recipe import GateSpec
from quantkit.records import EncoderInfo, Judgement, Progress, TextRows


def judge_graph(
    baseline: Path,
    graph: Path,
    rows: TextRows,
    info: EncoderInfo,
    spec: GateSpec,
    *,
    quantized: bool,
    suspicions: Sequence[str],
    device: str,
    tell: Progress,
) -> Judgement:
    """Run an encoder and its graph in worker processes and judge; a worker that fails is a FAIL.

    Args:
        baseline: folder of the original.
        graph: the artifact's file, or the folder that holds it.
        rows: the texts.
        info: what the encoder is.
        spec: the limits, and the interpreters.
        quantized: whether the graph holds codes.
        suspicions: what fails it whatever its numbers are.
        device: `cpu` or `cuda`.
        tell: called after each step.
    """
    try:
        result = evaluate_encoder(
            baseline,
            graph,
            rows,
            info,
            top_k=spec.top_k,
            python=find_python(ONNX_RUNTIME, spec.python),
            baseline_python=find_python("transformers", spec.python),
            timeout_seconds=spec.timeout_seconds,
            device=device,
            progress=tell,
        )
    except WorkerError as error:
        return fail_worker(error, spec.confidence, suspicions)
    return judge_encoder(result, spec, suspicions=suspicions, quantized=quantized)


def add_speed(
    judgement: Judgement,
    float_graph: Path,
    graph: Path,
    rows: TextRows,
    info: EncoderInfo,
    spec: GateSpec,
    tell: Progress,
) -> Judgement:
    """Time a judged graph beside the one in float; where that cannot be done, a note says why."""
    if not judgement.measures:
        return note_no_speed(judgement, "the texts could not be run")
    try:
        speed = measure_encoder_speed(
            float_graph,
            graph,
            rows,
            info,
            python=find_python(ONNX_RUNTIME, spec.python),
            timeout_seconds=spec.timeout_seconds,
            progress=tell,
        )
    except (InputError, ResourceError, WorkerError) as error:
        return note_no_speed(judgement, str(error))
    return replace(judgement, speed=(speed,))


def time_encoder(
    judgement: Judgement,
    checkpoint: Checkpoint,
    graph: Path,
    rows: TextRows,
    info: EncoderInfo,
    spec: GateSpec,
    scratch: Path,
    tell: Progress,
) -> Judgement:
    """Time a judged graph of which there is no job; the one in float is written to `scratch`.

    Where that cannot be done, a note says why.
    """
    if not judgement.measures:
        return note_no_speed(judgement, "the texts could not be run")
    with tempfile.TemporaryDirectory(prefix=".float-", dir=scratch) as name:
        try:
            model = load_encoder(checkpoint, info)
            float_graph = write_float_encoder(checkpoint, info, Path(name), model)
            del model
        except (InputError, ResourceError) as error:
            return note_no_speed(judgement, str(error))
        return add_speed(judgement, float_graph, graph, rows, info, spec, tell)
