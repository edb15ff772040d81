"""What a job has to do besides its plan, in numbers: the data, and the model's tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantkit.checkpoint.reader import Checkpoint
from quantkit.records import Plan, TensorInfo


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a checkpoint's tensors, from the headers; bytes are those of the files."""

    hidden: int
    vocabulary: int
    file_bytes: int
    outside_bytes: int
    """Of the tensors outside of all blocks."""
    outside_parameters: int
    embedding_bytes: int
    block_bytes: int
    """Of the largest block."""
    item_bytes: int
    """Of a weight in the blocks."""


@dataclass(frozen=True)
class Workload:
    """The numbers that a prediction needs besides a plan and a probe."""

    model: ModelSizes
    calibration_windows: int
    """0: nothing looks at calibration data."""
    calibration_length: int
    gate_windows: int
    """Of the first look; 0: nothing is judged."""
    gate_length: int
    probed: bool
    """Whether the gate looks at how both models behave on prompts."""
    formats: tuple[str, ...]
    """Of the exports, in their order."""
    data_bytes: int
    """Of the files with text."""
    compute_bytes: int
    """Of a number in the forward passes: 2 or 4."""
    on_device: bool = False
    """Whether the walk runs on an accelerator."""
    compiled: bool = False
    """Whether numba is there to compile the loops over columns."""
    compiled_sums: bool = False
    """Whether it compiles the sums of second moments as well, and attention."""
    room_bytes: int | None = None
    """What suspended forwards may hold where they run; the rest is parked. None: all fits."""

    @property
    def tokens(self) -> int:
        """Of all calibration windows."""
        return self.calibration_windows * self.calibration_length

    @property
    def gate_tokens(self) -> int:
        """Of all windows of the gate's first look."""
        return self.gate_windows * self.gate_length


def measure_model(checkpoint: Checkpoint, plan: Plan) -> ModelSizes:
    """Return the sizes of a checkpoint's tensors.

    The largest matrix outside of the blocks is taken for the embedding.
    """
    blocks = {f"{block.prefix}.": 0 for block in plan.blocks}
    outside: list[TensorInfo] = []
    items: list[int] = []
    for name, info in checkpoint.tensors.items():
        prefix = next((each for each in blocks if name.startswith(each)), None)
        if prefix is None:
            outside.append(info)
        else:
            blocks[prefix] += info.size
            items.append(info.size // max(1, math.prod(info.shape)))
    matrices = [info for info in outside if len(info.shape) == 2]
    largest = max(matrices, key=lambda info: info.size, default=None)
    vocabulary, hidden = (1, 1) if largest is None else largest.shape
    return ModelSizes(
        hidden=hidden,
        vocabulary=vocabulary,
        file_bytes=sum(info.size for info in checkpoint.tensors.values()),
        outside_bytes=sum(info.size for info in outside),
        outside_parameters=sum(math.prod(info.shape) for info in outside),
        embedding_bytes=0 if largest is None else largest.size,
        block_bytes=max(blocks.values(), default=0),
        item_bytes=max(items, default=2),
    )
