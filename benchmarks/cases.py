"""The jobs that run.py measures, and what is promised of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from shapes import SHAPES, Shape

OURS, RIVAL = "quantkit", "llm-compressor"


@dataclass(frozen=True)
class Promises:
    """What a case must keep to; None: nothing is promised of it."""

    speed_up: float | None = None
    """So many times faster than the rival, at least."""
    memory_share: float | None = None
    """Peak resident memory over the rival's, at most."""
    bound_ratio: float | None = None
    """Seconds over those of the arithmetic bound, at most."""
    memory_bytes: int | None = None
    """Peak resident memory, at most."""
    device_bytes: int | None = None
    """Peak memory of the GPU, at most."""
    seconds: float | None = None
    """At most."""


@dataclass(frozen=True)
class Case:
    """One job: a method on a model with so many calibration windows."""

    name: str
    shape: Shape
    method: str
    scheme: str = "w4a16"
    windows: int = 0
    length: int = 0
    effort: str = "normal"
    memory: str | None = None
    """As --memory; the rival has nothing like it."""
    device: str = "cpu"
    promises: Promises = Promises()
    has_rival: bool = True

    @property
    def calibrated(self) -> bool:
        """Whether it reads calibration windows."""
        return self.windows > 0

    @property
    def whole(self) -> bool:
        """Whether its model has all of the shape's blocks."""
        return self.shape.layers == SHAPES[self.shape.name].layers

    def shortened(self, layers: int) -> Case:
        """Return the same job on the first blocks of its model.

        Raises:
            SystemExit: the model has no such number of blocks, or is the bundled one.
        """
        if self.shape.name == "demo":
            raise SystemExit(f"{self.name}: the bundled model is measured whole, without --layers")
        if not 1 <= layers <= self.shape.layers:
            raise SystemExit(f"{self.name}: --layers must be 1 to {self.shape.layers}")
        return replace(self, shape=self.shape.shortened(layers))

    def tiny(self) -> Case:
        """Return the same way through the harness on a model of a megabyte: promises nothing."""
        windows, length = (4, 64) if self.calibrated else (0, 0)
        return replace(
            self, shape=SHAPES["tiny"], windows=windows, length=length, promises=Promises()
        )


def _table(*rows: Case) -> Mapping[str, Case]:
    return MappingProxyType({row.name: row for row in rows})


_GPTQ = Promises(speed_up=3.0, memory_share=0.5)
_AWQ = Promises(speed_up=5.0, memory_share=0.5)
_GPU = "cuda"

CASES: Mapping[str, Case] = _table(
    Case("gptq-demo", SHAPES["demo"], "gptq", windows=128, length=512, promises=_GPTQ),
    Case(
        "awq-demo",
        SHAPES["demo"],
        "awq",
        windows=128,
        length=512,
        memory="0.83GB",
        promises=_AWQ,
    ),
    Case(
        "gptq-0.5b",
        SHAPES["0.5b"],
        "gptq",
        windows=64,
        length=512,
        memory="1.25GB",
        promises=replace(_GPTQ, bound_ratio=2.0),
    ),
    # Of the same quality as the rival's at least: llm_compressor.py has it beside it.
    Case(
        "gptq-demo-fast",
        SHAPES["demo"],
        "gptq",
        windows=128,
        length=512,
        effort="fast",
        promises=_GPTQ,
    ),
    Case(
        "gptq-0.5b-fast",
        SHAPES["0.5b"],
        "gptq",
        windows=64,
        length=512,
        effort="fast",
        memory="1.4GB",
        promises=replace(_GPTQ, bound_ratio=2.0),
    ),
    Case(
        "awq-0.5b",
        SHAPES["0.5b"],
        "awq",
        windows=64,
        length=512,
        memory="1.4GB",
        promises=_AWQ,
    ),
    Case(
        "rtn-16gb",
        SHAPES["16gb"],
        "rtn",
        promises=Promises(memory_bytes=3_000_000_000),
        has_rival=False,
    ),
    Case(
        "fp8-16gb",
        SHAPES["16gb"],
        "rtn",
        scheme="fp8_dynamic",
        promises=Promises(memory_bytes=3_000_000_000),
        has_rival=False,
    ),
    Case(
        "gptq-16gb-short",
        SHAPES["16gb"],
        "gptq",
        windows=4,
        length=512,
        effort="fast",
        promises=Promises(memory_bytes=6_000_000_000),
        has_rival=False,
    ),
    Case(
        "gptq-8b",
        SHAPES["16gb"],
        "gptq",
        windows=512,
        length=2048,
        device=_GPU,
        promises=Promises(
            speed_up=5.0, bound_ratio=1.6, device_bytes=24_000_000_000, seconds=120.0
        ),
    ),
    Case("fp8-8b", SHAPES["16gb"], "rtn", scheme="fp8_dynamic", device=_GPU),
    Case("rtn-8b", SHAPES["16gb"], "rtn", device=_GPU),
    Case(
        "gptq-70b-block",
        SHAPES["70b-block"],
        "gptq",
        windows=512,
        length=2048,
        device=_GPU,
        promises=Promises(bound_ratio=1.6),
        has_rival=False,
    ),
)
