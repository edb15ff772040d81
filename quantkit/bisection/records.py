"""What a bisection works with and what it found.

Shapes: O output features, I input features, N windows, T tokens of a window, S scored positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from quantkit.records import Judgement
from quantkit.schemes import Scheme

Remedy = str
"""What takes the place of a unit's weights: `ORIGINAL`, `AGAIN`, or the scheme or type with eight
bits that `remedies.py` names."""

ORIGINAL: Remedy = "original"
"""The original's weights, with what was folded into them."""
AGAIN: Remedy = "again"
"""The original's weights rounded to nearest under the scheme that the unit has."""

Trial = Mapping[str, Remedy]
"""Name of each unit that is replaced -> by what; the others are the artifact's."""

Outcome = Literal["passes", "config", "defect", "budget", "unsolved"]


@dataclass(frozen=True)
class Form:
    """How a layer's weight is stored.

    scheme: quantkit's name of it, or the type in a GGUF file; `none` for floating point.
    activations: the scheme by which inputs are rounded; None: they are not, or it is not measured.
    input_scale: [1], for static ones.
    """

    scheme: str
    bits: int
    group_size: int | None
    size: int
    """Bytes of the weight with its scales."""
    activations: Scheme | None = None
    input_scale: Tensor | None = None


@dataclass(frozen=True)
class Scales:
    """What was folded into a module; float32 rows [O] (of a norm [I]) and columns [I], or None."""

    rows: Tensor | None = None
    columns: Tensor | None = None


@dataclass(frozen=True)
class Unit:
    """A module whose weights can be put back alone: a linear layer, a norm, a table."""

    name: str
    block: int | None
    """Index of its decoder block; None: outside of them."""
    tensors: tuple[str, ...]
    """Full names of its weight and bias."""
    form: Form
    scales: Scales
    relative_error: float
    """||W' - W|| / ||W||, where W is the original's weight with what was folded into it."""
    usual_error: float
    """The same of plain rounding under the same scheme; its own error, if larger, where the nearer
    half of its columns is a rounding's; 0 where the weight is not quantized or the scheme is not
    known."""
    flaw: str | None
    """Why no rounding explains its weight; None: one may."""
    plain_size: int
    """Bytes of its weight in the original."""

    @property
    def kind(self) -> str:
        """Its name within its block."""
        return self.name if self.block is None else self.name.split(f".{self.block}.", 1)[-1]

    @property
    def quantized(self) -> bool:
        """Whether its weight has codes."""
        return self.form.scheme != "none"


@dataclass(frozen=True)
class Suspect:
    """A block or unit with its original weights back, everything else as it was."""

    name: str
    kl: float
    """Mean KL to the baseline, nats per token, with it restored."""
    share: float
    """Of the loss that this takes away; negative where it makes things worse."""
    relative_error: float | None
    """Of a unit's weight; None for blocks and config.json."""
    added_bytes: int
    """What its original weights would take more."""
    flaw: str | None = None


@dataclass(frozen=True)
class Proposal:
    """What would pass, as it was measured."""

    scheme: str
    """What the layers get."""
    layers: tuple[str, ...]
    recipe: str
    """YAML to be put into the recipe; empty where the same recipe does."""
    tensor_bytes: int
    bits_per_weight: float
    judgement: Judgement
    """Of the artifact with the layers replaced, on all windows."""


@dataclass(frozen=True)
class Bisection:
    """What is wrong with an artifact, and what would mend it."""

    artifact: str
    baseline: str
    format: str
    scheme: str
    outcome: Outcome
    summary: str
    """The answer in a sentence or two."""
    windows: int
    window_tokens: int
    kl: float
    """Of the artifact as it is, on these windows, nats per token."""
    kl_restored: float
    """With every weight restored; what is left is no weight's fault."""
    perplexity_increase: float
    top1_agreement: float
    limits: Mapping[str, float]
    blocks: tuple[Suspect, ...]
    """Blocks, and what stands outside of them, by what restoring each alone takes away."""
    units: tuple[Suspect, ...]
    """The same for the layers and norms of the guiltiest blocks."""
    guilty: tuple[str, ...]
    """What is broken, or what shall have more bits."""
    proposal: Proposal | None
    judgement: Judgement | None
    """Of the artifact as it is, on all windows; None where the first ones were enough."""
    tensor_bytes: int
    bits_per_weight: float
    notes: tuple[str, ...]
    """What was not looked at."""
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 where there is an answer, 4 where there is none."""
        return 4 if self.outcome == "unsolved" else 0
