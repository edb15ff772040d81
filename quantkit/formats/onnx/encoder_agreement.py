"""Does a written graph compute what its model does? Asked of ONNX Runtime in a fresh process.

The process has nothing but ONNX Runtime and NumPy, as a server has that the file is made for.
Letters of shapes: B texts, T tokens of the longest one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from quantkit.encoders.data import pad_texts
from quantkit.encoders.model import run_encoder
from quantkit.errors import ArtifactError, ResourceError, writing
from quantkit.formats.onnx.encoder_export import LOGITS, SENTENCE, make_batch
from quantkit.masking import without_secrets
from quantkit.records.encoders import EncoderInfo, TextRows

Batch = Mapping[str, Tensor]

CLOSEST, FARTHEST = 0.25, 1.5
"""How far the outputs of an INT8 graph may be from those of its codes, relative to what rounding
costs: on the batch that agrees best, and on every one. Measured on MiniLM: 1e-6 and 0.7."""

_LEAST_COST = 1e-3
"""Distance that rounding may cost anyhow."""

_LONGEST = 512
"""Tokens of a text that a graph is checked with, at the most: attention grows with their square."""

_TEXTS = 4
"""Texts of the user's data that a graph is checked with."""

_SECONDS = 600
"""What a graph may take for a handful of texts."""


def make_batches(model: nn.Module, info: EncoderInfo, rows: TextRows | None) -> list[Batch]:
    """Return batches to compare a graph and its model on: short texts, texts of different lengths
    beside the longest one; then some of the user's.

    Made-up texts reach tokens and positions that no one's data has.
    """
    vocabulary = int(model.config.vocab_size)  # type: ignore[arg-type, union-attr]
    longest = min(info.max_length, _LONGEST)
    lengths = ((1,), (2,), (min(5, longest),), (longest, max(1, longest // 2), 1))
    batches = [make_batch(info, each, vocabulary) for each in lengths]
    if rows is not None and rows.ids:
        batches.append(_batch_rows(rows, info))
    return batches


def run_model(model: nn.Module, info: EncoderInfo, batches: Sequence[Batch]) -> list[np.ndarray]:
    """Return the model's embeddings or logits of each batch, float32, padding left out.

    Raises:
        ArtifactError: one is not finite, so that there is nothing to compare a graph with.
    """
    with torch.no_grad():
        outputs = [run_encoder(model, info, batch).float().numpy() for batch in batches]
    found = _without_padding(outputs, info, batches)
    if not all(np.isfinite(each).all() for each in found):
        raise ArtifactError(
            f"{info.architecture} computes NaN or infinite outputs in PyTorch, from its weights or "
            f"their codes: check the checkpoint"
        )
    return found


def run_graph(graph: Path, info: EncoderInfo, batches: Sequence[Batch]) -> list[np.ndarray]:
    """Return a graph's embeddings or logits of each batch, float32, padding left out.

    Raises:
        ArtifactError: ONNX Runtime cannot load or run the graph, or an output is not finite.
        ResourceError: there is no room for its inputs and outputs.
    """
    name = LOGITS if info.pooling is None else SENTENCE
    runner = Path(__file__).with_name("graph_runner.py")
    with tempfile.TemporaryDirectory(prefix="quantkit-onnx-") as place:
        inputs, outputs = Path(place) / "inputs.npz", Path(place) / "outputs.npz"
        arrays = {
            f"{number}.{key}": tensor.numpy()
            for number, batch in enumerate(batches)
            for key, tensor in batch.items()
        }
        with writing(inputs):
            np.savez(inputs, **arrays)  # type: ignore[arg-type]
        threads = str(torch.get_num_threads())
        _run([sys.executable, *map(str, (runner, graph, inputs, outputs)), threads, name], graph)
        with np.load(outputs, allow_pickle=False) as found:
            results = [found[f"{number}.{name}"] for number in range(len(batches))]
    if not all(np.isfinite(each).all() for each in results):
        raise ArtifactError(f"{graph.name}: ONNX Runtime computes NaN or infinite outputs from it")
    return _without_padding(results, info, batches)


def measure_difference(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Return the largest difference over all batches, relative to the largest output of its own.

    Raises:
        ValueError: the shapes differ.
    """
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            raise ValueError(f"outputs of the shapes {one.shape} and {other.shape}")
        # Other than Python's, this maximum keeps a NaN.
        share = np.abs(one - other).max() / (np.abs(other).max() + 1e-30)
        worst = float(np.maximum(worst, share))
    return worst


def measure_distance(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Return the root mean square of the difference of all outputs, relative to the outputs' own.

    For rounded inputs: two sums in another order may round one value to two neighbouring codes,
    which moves some outputs by much and most by nothing.

    Raises:
        ValueError: the shapes differ.
    """
    error, size = 0.0, 1e-30
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            raise ValueError(f"outputs of the shapes {one.shape} and {other.shape}")
        error += float(((one.astype(np.float64) - other) ** 2).sum())
        size += float((other.astype(np.float64) ** 2).sum())
    return (error / size) ** 0.5


def check_agreement(
    graph: Path,
    info: EncoderInfo,
    batches: Sequence[Batch],
    expected: Sequence[np.ndarray],
    tolerance: float,
) -> None:
    """Refuse a graph that ONNX Runtime does not run, or whose outputs are others than `expected`.

    Raises:
        ArtifactError: so it is; the message has the difference.
        ResourceError: there is no room for inputs and outputs.
    """
    difference = measure_difference(run_graph(graph, info, batches), expected)
    if not difference <= tolerance:
        raise ArtifactError(
            f"{graph.name} computes other outputs in ONNX Runtime than the model does in PyTorch: "
            f"they differ by {difference:.2g} of the largest one, and {tolerance:.2g} is the limit"
        )


def check_rounded(
    graph: Path,
    info: EncoderInfo,
    batches: Sequence[Batch],
    expected: Sequence[np.ndarray],
    exact: Sequence[np.ndarray],
) -> None:
    """Refuse an INT8 graph whose outputs are others than its codes stand for.

    Two sums in another order may round a value to two neighbouring codes, and from there on all
    roundings differ: between two right answers lies as much as rounding costs, at the most. Texts
    of a token or two have so few values that some of them are free of it.

    Args:
        graph: the written file.
        info: what it is.
        batches: what it is run on.
        expected: what its codes stand for.
        exact: what the float model computes, by which the cost of rounding is known.

    Raises:
        ArtifactError: the outputs of a batch are farther off than rounding takes them, or those of
            no batch are close.
        ResourceError: there is no room for inputs and outputs.
    """
    found = run_graph(graph, info, batches)
    ratios = []
    for one, other, right in zip(found, expected, exact, strict=True):
        cost = max(measure_distance([other], [right]), _LEAST_COST)
        ratios.append(measure_distance([one], [other]) / cost)
    if not (min(ratios) <= CLOSEST and max(ratios) <= FARTHEST):
        raise ArtifactError(
            f"{graph.name} computes other outputs in ONNX Runtime than its codes stand for: they "
            f"are {min(ratios):.2g} to {max(ratios):.2g} times as far off as rounding takes them, "
            f"and {CLOSEST} to {FARTHEST} is the limit; if this CPU has no VNNI, whose sums do "
            f"not overflow, set reduce_range: true in the export"
        )


def _run(command: Sequence[str], graph: Path) -> None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            env=without_secrets(os.environ),
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ArtifactError(
            f"{graph.name}: ONNX Runtime has no outputs of a few texts after {_SECONDS} s"
        ) from None
    if done.returncode == 0:
        return
    words = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]
    if "No space left" in words or "bad allocation" in words or "MemoryError" in words:
        raise ResourceError(f"running {graph} in ONNX Runtime: {words}")
    raise ArtifactError(f"{graph.name}: ONNX Runtime cannot run it: {words}")


def _batch_rows(rows: TextRows, info: EncoderInfo) -> Batch:
    """Some texts of the data, spread evenly and not too long, as one padded batch."""
    count = len(rows.ids)
    chosen = sorted({round(k * (count - 1) / (_TEXTS - 1)) for k in range(_TEXTS)})
    ids = [rows.ids[index][:_LONGEST] for index in chosen]
    types = [rows.type_ids[index][:_LONGEST] for index in chosen] if rows.type_ids else None
    return {name: torch.from_numpy(array) for name, array in pad_texts(info, ids, types).items()}


def _without_padding(
    outputs: Sequence[np.ndarray], info: EncoderInfo, batches: Sequence[Batch]
) -> list[np.ndarray]:
    """Keep the logits of tokens that are not padding; nothing else has any."""
    if info.task != "token-classification":
        return list(outputs)
    masks = [batch["attention_mask"].bool().numpy() for batch in batches]
    return [output[mask] for output, mask in zip(outputs, masks, strict=True)]
