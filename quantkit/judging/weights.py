"""Every weight of an artifact against the original's (docs/gate.md, "Weights").

A layer among many may be wrong and cost less than the limits allow, and a token that the text does
not hold costs nothing. Numbers do not tell of these; the files do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import ArtifactError, CheckpointError, blame_machine
from quantkit.formats.decode import open_artifact
from quantkit.formats.inspect import COMPRESSED_TENSORS, inspect_artifact
from quantkit.formats.verify import is_verifiable, verify_artifact
from quantkit.records import Event, Progress

TRANSFORMS, SPARSITY = "transform_config", "sparsity_config"
"""Parts of a `quantization_config` with which the stored weights are no roundings of the
original's: rotations, and weights that were set to zero."""

_MOST = 8
"""Problems that are told of: where all layers are wrong, each has one."""


@dataclass(frozen=True)
class WeightFindings:
    """What the comparison found: what fails the artifact, or why nothing was compared."""

    suspicions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def compare_weights(baseline: Checkpoint, artifact: Path, tell: Progress) -> WeightFindings:
    """Compare an artifact's weights with the original's, as `quantkit verify --against` does.

    Reads every tensor of both. What cannot be compared (GPTQ, AWQ and FP8 folders of other tools, a
    quantized baseline) is a note.

    Args:
        baseline: the original.
        artifact: folder or file.
        tell: called at the beginning and at the end.
    """
    tell(Event("weights", 0, 1, "comparing each weight with the original's"))
    try:
        findings = _compare(baseline, artifact)
    except ArtifactError as error:
        blame_machine(error)
        findings = WeightFindings((str(error),))
    except CheckpointError as error:
        blame_machine(error)
        findings = _leave(str(error))
    tell(Event("weights", 1, 1))
    return findings


def _compare(baseline: Checkpoint, artifact: Path) -> WeightFindings:
    if baseline.config.get("quantization_config") is not None:
        return _leave("the baseline is quantized itself")
    found = inspect_artifact(artifact)
    if not is_verifiable(found):
        return _leave(f"quantkit does not verify {found.format}")
    if found.format == COMPRESSED_TENSORS:
        others = _find_other_numbers(open_artifact(found.folder).config)
        if others:
            return _leave(f"its quantization_config has a {others}")
    problems = verify_artifact(artifact, str(baseline.source.folder)).problems
    more = len(problems) - _MOST
    rest = (f"{more} more problems: `quantkit verify` lists them",) if more > 0 else ()
    return WeightFindings((*problems[:_MOST], *rest))


def _find_other_numbers(config: Mapping[str, Any]) -> str:
    """Name what makes an artifact's numbers others than rounded weights; empty: nothing."""
    described = config.get("quantization_config")
    if not isinstance(described, dict):
        return ""
    sparsity = described.get(SPARSITY)
    # llm-compressor describes what is not sparse as well.
    is_sparse = isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense"
    return TRANSFORMS if described.get(TRANSFORMS) else SPARSITY * is_sparse


def _leave(reason: str) -> WeightFindings:
    return WeightFindings(notes=(f"its weights were not compared with the original's: {reason}",))
