"""ONNX Runtime's own quantization of an encoder: what onnx_encoder.py compares with.

Every variant starts from the same float32 graph and, where it needs data, from the same texts, one
text at a time, so that no padding is observed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

Texts = Sequence[Mapping[str, np.ndarray]]
"""Inputs of the graph by name, int64 [1, T], one entry a text."""


@dataclass
class Reader:
    """Gives one text after the other, as `CalibrationDataReader` does.

    rest: the texts that come next, of those last chosen by `set_range`.
    """

    texts: Texts
    rest: Iterator[Mapping[str, np.ndarray]] = field(default_factory=lambda: iter(()))

    def __len__(self) -> int:
        return len(self.texts)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Choose the texts that come next."""
        self.rest = iter(self.texts[start_index:end_index])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next text, or None after the last one chosen."""
        return next((dict(text) for text in self.rest), None)


@dataclass(frozen=True)
class Variant:
    """One way to call ONNX Runtime's quantization.

    operations: `linear` quantizes the layers and tables that quantkit quantizes; `default` whatever
    the tool quantizes when nothing is said.
    """

    mode: Literal["dynamic", "static"]
    operations: Literal["linear", "default"]
    per_channel: bool
    calibration: str = ""
    """Static only: MinMax, Percentile or Entropy."""

    @property
    def name(self) -> str:
        """What the tables say."""
        scales = "per channel" if self.per_channel else "per tensor"
        parts = [f"quantize_{self.mode}", self.calibration.lower(), scales]
        return ", ".join([*filter(None, parts), f"{self.operations} operations"])

    @property
    def key(self) -> str:
        """A file name."""
        scales = "channel" if self.per_channel else "tensor"
        return "-".join(
            filter(None, (self.mode, self.calibration.lower(), scales, self.operations))
        )


VARIANTS = (
    Variant("dynamic", "default", per_channel=False),
    Variant("dynamic", "default", per_channel=True),
    *(
        Variant("static", operations, per_channel=True, calibration=calibration)
        for operations in ("linear", "default")
        for calibration in ("MinMax", "Percentile", "Entropy")
    ),
)


def prepare_graph(source: Path, target: Path) -> None:
    """Run the step that ONNX Runtime asks for in front: shapes inferred, constants folded."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(source), str(target), skip_symbolic_shape=True)


def quantize_graph(source: Path, target: Path, variant: Variant, texts: Texts) -> None:
    """Write what ONNX Runtime makes of a float32 graph.

    Args:
        source: from `prepare_graph`.
        target: the file to write.
        variant: how.
        texts: read by static variants alone.
    """
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    # It warns about every run that had no preparation of its own kind.
    logging.getLogger().setLevel(logging.ERROR)
    linear = variant.operations == "linear"
    shared: dict[str, Any] = {
        "per_channel": variant.per_channel,
        "weight_type": QuantType.QInt8,
        "op_types_to_quantize": ["MatMul", "Gemm", "Gather"] if linear else None,
    }
    options: dict[str, Any] = {"MatMulConstBOnly": True} if linear else {}
    if variant.mode == "dynamic":
        quantize_dynamic(str(source), str(target), extra_options=options, **shared)
        return
    quantize_static(
        str(source),
        str(target),
        Reader(texts),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        calibrate_method=CalibrationMethod[variant.calibration],
        # One text at a time: its histograms cannot join inputs of different shapes.
        extra_options={**options, "CalibStridedMinMax": 1},
        **shared,
    )
