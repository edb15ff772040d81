"""Spans and metrics for OpenTelemetry, where the caller has switched them on; else nothing at all.

    with quantkit.tracing.traced():
        quantkit.quantize("awq4", model="path/to/model")

What is called inside `traced` is recorded with the providers of the application, or with those
that it is given. Nothing is recorded elsewhere, whatever the environment says, and opentelemetry is
imported by `traced` alone. Whether it is on stands in a context variable: it ends with the `with`,
and other threads and tasks of the application do not see it.

Names, units and attributes stand in docs/tracking.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

from quantkit.errors import MissingPackageError

P = ParamSpec("P")
R = TypeVar("R")
J = TypeVar("J", bound="Judged")

INSTALL = 'pip install "quantkit[otel]"'
SCOPE = "quantkit"
"""Name of the tracer and the meter, and what names of spans, metrics and attributes begin with."""

Attribute = str | int | float | bool | None
"""None is left out."""


class Value(Protocol):
    """A measured value, as `quantkit.records.Metric`."""

    @property
    def value(self) -> float:
        """The number."""


class Judged(Protocol):
    """The gate's answer, as `quantkit.records.Judgement`."""

    @property
    def verdict(self) -> str:
        """PASS or another one."""

    @property
    def kl(self) -> Value | None:
        """Mean KL divergence in nats, where there is one."""


@dataclass(frozen=True)
class Span:
    """What `span` yields; where nothing is recorded, what it is told is dropped."""

    recorded: Any = None
    """An `opentelemetry.trace.Span`."""

    def tell(self, attributes: Mapping[str, Attribute]) -> None:
        """Add attributes; their names get `quantkit.` in front."""
        if self.recorded is not None:
            self.recorded.set_attributes(_named(attributes))


@dataclass(frozen=True)
class _Recorder:
    """What is recorded with; the fields behind `tracer` are its instruments."""

    tracer: Any
    block_seconds: Any
    blocks: Any
    verdicts: Any
    peak_memory: Any
    error_status: Any
    """`StatusCode.ERROR`."""
    rank: int | None
    children: Mapping[str, str]


@dataclass
class _Watch:
    """Seconds since it was made."""

    start: float = field(default_factory=time.perf_counter)

    def read(self) -> float:
        return time.perf_counter() - self.start


_RECORDER: ContextVar[_Recorder | None] = ContextVar("quantkit recorder", default=None)
_NOTHING: AbstractContextManager[Span] = nullcontext(Span())


@contextmanager
def traced(
    *,
    tracer_provider: Any = None,
    meter_provider: Any = None,
    children: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Record in OpenTelemetry what quantkit does inside.

    Args:
        tracer_provider: an `opentelemetry.trace.TracerProvider`; None: the application's own, as
            `opentelemetry.trace.get_tracer_provider` returns it.
        meter_provider: an `opentelemetry.metrics.MeterProvider`; None: likewise.
        children: what else `child_environment` returns.

    Raises:
        MissingPackageError: opentelemetry-api is not installed.
    """
    try:
        from opentelemetry import metrics, trace
    except ImportError:
        raise MissingPackageError("opentelemetry-api", "tracing", INSTALL) from None
    tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
    meter = metrics.get_meter(SCOPE, meter_provider=meter_provider)
    # torchrun's word; a process alone has no rank that anybody asks for.
    rank = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    recorder = _Recorder(
        tracer=tracer,
        block_seconds=meter.create_histogram(
            f"{SCOPE}.block.duration", "s", "Time that one block took"
        ),
        blocks=meter.create_counter(f"{SCOPE}.blocks", "{block}", "Blocks that are solved"),
        verdicts=meter.create_counter(f"{SCOPE}.verdicts", "{verdict}", "Artifacts judged"),
        peak_memory=meter.create_gauge(
            f"{SCOPE}.memory.peak", "By", "The most that the process has held"
        ),
        error_status=trace.StatusCode.ERROR,
        rank=int(rank) if rank and rank.isdecimal() else None,
        children=dict(children or {}),
    )
    token = _RECORDER.set(recorder)
    try:
        yield
    finally:
        _RECORDER.reset(token)


def span(
    name: str, attributes: Mapping[str, Attribute] | None = None
) -> AbstractContextManager[Span]:
    """Record what happens inside as a span of this name, below the one that is open.

    An error that leaves it becomes its status and an event.
    """
    recorder = _RECORDER.get()
    return _NOTHING if recorder is None else _record(recorder, name, attributes or {})


def block(index: int, name: str) -> AbstractContextManager[Span]:
    """Record a span and the metrics of one block of a model."""
    recorder = _RECORDER.get()
    return _NOTHING if recorder is None else _record_block(recorder, index, name)


def job(command: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function of the public API: each call is a span, with the verdict it returns."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            recorder = _RECORDER.get()
            if recorder is None:
                return function(*args, **kwargs)
            with _record(recorder, f"job.{command}", {}) as whole:
                result = function(*args, **kwargs)
                whole.tell({"verdict": getattr(result, "verdict", None)})
                return result

        return call

    return decorate


def carried(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` for another thread: what it records is below the span that is open now."""
    if _RECORDER.get() is None:
        return function
    context = copy_context()

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # A copy, because a context cannot be entered twice at once.
        return context.copy().run(function, *args, **kwargs)

    return call


def tell(attributes: Mapping[str, Attribute]) -> None:
    """Add attributes to the span that is open."""
    if _RECORDER.get() is not None:
        from opentelemetry import trace

        Span(trace.get_current_span()).tell(attributes)


@contextmanager
def judging(artifact: str, artifact_format: str) -> Iterator[Callable[[J], J]]:
    """Record the judging of an artifact as a span; what is yielded takes the gate's answer."""
    with span("judge", {"artifact": artifact, "format": artifact_format}) as opened:

        def found(judgement: J) -> J:
            recorder = _RECORDER.get()
            if recorder is not None:
                kl = None if judgement.kl is None else judgement.kl.value
                opened.tell({"verdict": judgement.verdict, "kl": kl})
                labels = {"verdict": judgement.verdict, "format": artifact_format}
                recorder.verdicts.add(1, _named(labels))
            return judgement

        yield found


def tell_peak_memory(read: Callable[[], int]) -> None:
    """Say how many bytes the process has held at most; `read` is called where that is recorded."""
    recorder = _RECORDER.get()
    if recorder is not None:
        recorder.peak_memory.set(read(), _named({"rank": recorder.rank}))


def child_environment() -> dict[str, str]:
    """Variables for a process that is started, whose spans are then below the one that is open."""
    recorder = _RECORDER.get()
    if recorder is None:
        return {}
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return {**recorder.children, **{name.upper(): value for name, value in carrier.items()}}


@contextmanager
def _record(recorder: _Recorder, name: str, attributes: Mapping[str, Attribute]) -> Iterator[Span]:
    with recorder.tracer.start_as_current_span(
        f"{SCOPE}.{name}",
        attributes=_named({"rank": recorder.rank, **attributes}),
        record_exception=False,
        set_status_on_exception=False,
    ) as opened:
        try:
            yield Span(opened)
        except BaseException as error:
            # A rank behind the first ends its call by SystemExit when it has nothing left to do.
            if not isinstance(error, SystemExit) or error.code:
                opened.record_exception(error)
                opened.set_status(recorder.error_status, _first_line(error))
            raise


@contextmanager
def _record_block(recorder: _Recorder, index: int, name: str) -> Iterator[Span]:
    watch = _Watch()
    with _record(recorder, "block", {"block.index": index, "block.name": name}) as opened:
        yield opened
    labels = _named({"rank": recorder.rank})
    recorder.block_seconds.record(watch.read(), labels)
    recorder.blocks.add(1, labels)


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _named(attributes: Mapping[str, Attribute]) -> dict[str, str | int | float | bool]:
    return {f"{SCOPE}.{key}": value for key, value in attributes.items() if value is not None}
