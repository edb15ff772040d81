"""Spans and metrics of a command, sent where the OTEL_* variables of OpenTelemetry say.

The command line uses this. An application that has providers of its own calls
`quantkit.tracing.traced`, and nothing of here.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from quantkit import __version__
from quantkit.errors import InputError, MissingPackageError
from quantkit.masking import hide_tokens
from quantkit.tracing import INSTALL, traced

SWITCH = "QUANTKIT_OTEL"
"""Environment variable that stands for `--otel`; jobs of a sweep are switched on by it."""

_TRACES, _METRICS = "OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER"
_PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"
_EXPORTERS = ("otlp", "console", "none")
_HTTP = "http/protobuf"


@contextmanager
def exported(environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Record what quantkit does inside, and send it.

    Where it goes: OTEL_TRACES_EXPORTER and OTEL_METRICS_EXPORTER are `otlp` (the default, by HTTP),
    `console` (stderr) or `none`; the packages of OpenTelemetry read the other variables. Spans
    begin below TRACEPARENT, where that is set. What a collector did not take is told on stderr and
    is no error.

    Args:
        environment: by default that of the process.

    Raises:
        MissingPackageError: the extra `otel` is not installed.
        InputError: a variable asks for an exporter or a protocol that there is not.
    """
    found = os.environ if environment is None else environment
    _check(found)
    tracer_provider, meter_provider = _make_providers(found)
    with _heard() as complaints:
        try:
            with (
                _below(found),
                traced(
                    tracer_provider=tracer_provider,
                    meter_provider=meter_provider,
                    children={SWITCH: "1"},
                ),
            ):
                yield
        finally:
            for provider in (tracer_provider, meter_provider):
                provider.shutdown()
            if complaints:
                words = hide_tokens(complaints[0])
                sys.stderr.write(f"note: not all spans and metrics were sent: {words}\n")


def _check(environment: Mapping[str, str]) -> None:
    for name in (_TRACES, _METRICS):
        if environment.get(name, "otlp") not in _EXPORTERS:
            raise InputError(
                f"{name}={environment[name]}: quantkit sends to {', '.join(_EXPORTERS)} alone"
            )
    protocol = environment.get(_PROTOCOL, _HTTP)
    if protocol != _HTTP:
        raise InputError(
            f"{_PROTOCOL}={protocol}: quantkit speaks {_HTTP} alone, to port 4318 of a collector"
        )


def _make_providers(environment: Mapping[str, str]) -> tuple[Any, Any]:
    """Return providers of traces and of metrics."""
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import (
            ConsoleMetricExporter,
            PeriodicExportingMetricReader,
        )
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
    except ImportError:
        raise MissingPackageError("opentelemetry-sdk", "--otel", INSTALL) from None
    resource = Resource.create({"service.version": __version__})
    if str(resource.attributes.get("service.name", "unknown")).startswith("unknown"):
        resource = resource.merge(Resource({"service.name": "quantkit"}))
    traces, readers = TracerProvider(resource=resource), []
    # stdout is for the reply.
    match environment.get(_TRACES, "otlp"):
        case "otlp":
            traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        case "console":
            traces.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter(out=sys.stderr)))
    match environment.get(_METRICS, "otlp"):
        case "otlp":
            readers.append(PeriodicExportingMetricReader(OTLPMetricExporter()))
        case "console":
            readers.append(PeriodicExportingMetricReader(ConsoleMetricExporter(out=sys.stderr)))
    return traces, MeterProvider(metric_readers=readers, resource=resource)


@contextmanager
def _below(environment: Mapping[str, str]) -> Iterator[None]:
    """Let spans begin below the one that TRACEPARENT names, if it does."""
    from opentelemetry import context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {
        name: environment[name.upper()]
        for name in ("traceparent", "tracestate")
        if name.upper() in environment
    }
    token = context.attach(TraceContextTextMapPropagator().extract(carrier))
    try:
        yield
    finally:
        context.detach(token)


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Keep the last warning of OpenTelemetry, which would stand between the lines of progress."""
    last: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        last[:] = record.getMessage().splitlines()[:1]
        return False

    handler, logger = logging.Handler(logging.WARNING), logging.getLogger("opentelemetry")
    handler.addFilter(keep)
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield last
    finally:
        logger.propagate = before
        logger.removeHandler(handler)
