"""What the outputs of an encoder and its artifact have in common, by task.

Letters of shapes: N texts, H width of an embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from quantkit.errors import CalibrationError
from quantkit.judging.encoder_metrics import (
    cosines,
    distinct_rows,
    find_collapse,
    neighbour_overlap,
)
from quantkit.records import EncoderResult, TextRows


@dataclass(frozen=True)
class Outputs:
    """What one model answered, in the order of the data.

    vectors: float32 [N, H] or [N, C]; None for token classification. labels: the most probable
    class, of each text or of each of its counted tokens.
    """

    vectors: np.ndarray | None
    labels: tuple[np.ndarray, ...]


def compare_outputs(
    result: EncoderResult, outputs: tuple[Outputs, Outputs], rows: TextRows, top_k: int
) -> EncoderResult:
    """Return `result` with what its task is judged by.

    Args:
        result: what is known already.
        outputs: the baseline's and the artifact's.
        rows: the texts, in the order of the outputs.
        top_k: nearest texts that retrieval compares.

    Raises:
        CalibrationError: the labels of the data are none that the model can be judged by.
    """
    first, second = outputs
    if result.task == "embedding":
        assert first.vectors is not None
        assert second.vectors is not None
        return _compare_embeddings(result, first.vectors, second.vectors, rows, top_k)
    if first.vectors is not None and first.vectors.shape[1] == 1:
        assert second.vectors is not None
        return _compare_scores(result, first.vectors[:, 0], second.vectors[:, 0], rows)
    agreement = tuple(
        float((a == b).mean()) for a, b in zip(first.labels, second.labels, strict=True) if a.size
    )
    result = replace(result, agreement=agreement)
    if not rows.labels:
        return result
    if first.vectors is None:
        raise CalibrationError(
            f"{rows.source}: token classification is judged without labels: leave "
            "gate.label_column out"
        )
    predicted = [np.concatenate(each.labels) for each in outputs]
    labels = _class_labels(rows, first.vectors.shape[1])
    scores = [(found == labels).astype(float) for found in predicted]
    return replace(
        result,
        labels=tuple(rows.labels),
        baseline_labels=tuple(predicted[0].tolist()),
        candidate_labels=tuple(predicted[1].tolist()),
        baseline_score=tuple(scores[0].tolist()),
        candidate_score=tuple(scores[1].tolist()),
    )


def _compare_embeddings(
    result: EncoderResult, first: np.ndarray, second: np.ndarray, rows: TextRows, top_k: int
) -> EncoderResult:
    distinct = distinct_rows(rows.ids)
    overlap: tuple[float, ...] = ()
    notes = result.notes
    if len(distinct) > top_k + 1:
        overlap = tuple(neighbour_overlap(first[distinct], second[distinct], top_k).tolist())
    else:
        notes += (
            f"retrieval overlap was not measured: there are {len(distinct)} different texts, and "
            f"the nearest {top_k} need at least {top_k + 2}",
        )
    result = replace(
        result,
        cosine=tuple(cosines(first, second).tolist()),
        overlap=overlap,
        suspicions=result.suspicions + find_collapse(first[distinct], second[distinct]),
        notes=notes,
    )
    if not rows.labels:
        return result
    if len(rows.pairs) != len(rows.labels):
        raise CalibrationError(
            f"{rows.source}: embeddings are judged by the similarities of pairs: name the second "
            "text with gate.text_pair_column, or leave gate.label_column out"
        )
    left, right = np.array(rows.pairs).T
    scores = [cosines(vectors[left], vectors[right]) for vectors in (first, second)]
    return _with_scores(result, scores, rows)


def _compare_scores(
    result: EncoderResult, first: np.ndarray, second: np.ndarray, rows: TextRows
) -> EncoderResult:
    """Compare models that give one number a text, which only has a rank."""
    if rows.labels:
        return _with_scores(result, [first, second], rows)
    note = (
        "the model gives one number a text and no label, so nothing was compared: name "
        "gate.label_column, and its rank correlation is judged"
    )
    return replace(result, notes=(*result.notes, note))


def _with_scores(
    result: EncoderResult, scores: Sequence[np.ndarray], rows: TextRows
) -> EncoderResult:
    if len(set(rows.labels)) < 2:
        raise CalibrationError(
            f"{rows.source}: all similarities are equal, so nothing can be correlated with them"
        )
    return replace(
        result,
        labels=tuple(rows.labels),
        baseline_score=tuple(scores[0].tolist()),
        candidate_score=tuple(scores[1].tolist()),
    )


def _class_labels(rows: TextRows, classes: int) -> np.ndarray:
    labels = np.array(rows.labels)
    if not ((labels >= 0) & (labels < classes) & (labels == np.floor(labels))).all():
        wrong = next(x for x in rows.labels if x not in range(classes))
        raise CalibrationError(
            f"{rows.source}: the label {wrong:g} is none of the model's {classes} classes, which "
            "count from 0"
        )
    return labels.astype(int)
