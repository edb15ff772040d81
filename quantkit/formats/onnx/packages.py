"""The optional packages behind ONNX."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec

from quantkit.errors import MissingPackageError

READING = ("onnx", "onnxruntime")
"""Packages that look into graphs and try them."""
ENCODERS = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
"""Packages that write encoders and check them."""
DECODERS = (*ENCODERS, "onnxruntime_genai")
"""Packages that write decoders and check them: all that there are."""


def require_onnx(names: Iterable[str] = DECODERS) -> None:
    """Make sure that packages are there, and switch the telemetry of ONNX Runtime off.

    Args:
        names: modules, as they are imported.

    Raises:
        MissingPackageError: one is not there.
    """
    # ONNX Runtime and onnxruntime-genai collect usage data unless this is set before their import.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    for name in names:
        if find_spec(name) is None:
            raise MissingPackageError(
                name.replace("_", "-"), "the format onnx", 'pip install "quantkit[onnx]"'
            )


def runtime_errors() -> tuple[type[Exception], ...]:
    """Return the classes that ONNX Runtime raises, which have no class of their own in common."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = [each for each in vars(state).values() if isinstance(each, type)]
    return tuple(each for each in found if issubclass(each, Exception))
