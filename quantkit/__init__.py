"""quantkit: quantize a language model and prove that it is still the same model.

    import quantkit

    result = quantkit.quantize("awq4", model="path/to/model", output="artifacts/model-awq4")
    assert result.verdict == "PASS"

Importing the package starts nothing, opens nothing and imports no torch: each name is loaded from
its home when it is first used.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.artifacts import gate as gate
    from quantkit.artifacts import inspect as inspect
    from quantkit.artifacts import verify as verify
    from quantkit.bisection import bisect as bisect
    from quantkit.comparing import compare as compare
    from quantkit.conversion import convert as convert
    from quantkit.errors import ArtifactError as ArtifactError
    from quantkit.errors import CalibrationError as CalibrationError
    from quantkit.errors import CheckpointError as CheckpointError
    from quantkit.errors import InputError as InputError
    from quantkit.errors import Interrupted as Interrupted
    from quantkit.errors import MissingPackageError as MissingPackageError
    from quantkit.errors import NotYetError as NotYetError
    from quantkit.errors import OutputError as OutputError
    from quantkit.errors import PlanError as PlanError
    from quantkit.errors import QuantkitError as QuantkitError
    from quantkit.errors import RecipeError as RecipeError
    from quantkit.errors import ResourceError as ResourceError
    from quantkit.errors import WorkerError as WorkerError
    from quantkit.pipeline import plan as plan
    from quantkit.pipeline import quantize as quantize
    from quantkit.recipe import Recipe as Recipe
    from quantkit.recipe import json_schema as recipe_schema
    from quantkit.recipe import load_recipe as load_recipe
    from quantkit.records import Event as Event
    from quantkit.records import Plan as Plan
    from quantkit.records import Report as Report
    from quantkit.records import Result as Result
    from quantkit.sweeping.run import sweep as sweep

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "CheckpointError",
    "Event",
    "InputError",
    "Interrupted",
    "MissingPackageError",
    "NotYetError",
    "OutputError",
    "Plan",
    "PlanError",
    "QuantkitError",
    "Recipe",
    "RecipeError",
    "Report",
    "ResourceError",
    "Result",
    "WorkerError",
    "__version__",
    "bisect",
    "compare",
    "convert",
    "gate",
    "inspect",
    "load_recipe",
    "plan",
    "quantize",
    "recipe_schema",
    "sweep",
    "verify",
]

_ARTIFACTS = frozenset({"gate", "inspect", "verify"})
_PIPELINE = frozenset({"plan", "quantize"})
_RECIPE = {"Recipe": "Recipe", "load_recipe": "load_recipe", "recipe_schema": "json_schema"}
_RECORDS = frozenset({"Event", "Plan", "Report", "Result"})


def __getattr__(name: str) -> Any:
    """Load a public name from its home."""
    if name not in __all__:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    with _collector_at_rest():
        return _load(name)


def _load(name: str) -> Any:
    if name in _ARTIFACTS:
        return getattr(import_module("quantkit.artifacts"), name)
    if name == "bisect":
        return import_module("quantkit.bisection").bisect
    if name == "compare":
        return import_module("quantkit.comparing").compare
    if name == "convert":
        return import_module("quantkit.conversion").convert
    if name == "sweep":
        return import_module("quantkit.sweeping.run").sweep
    if name in _PIPELINE:
        return getattr(import_module("quantkit.pipeline"), name)
    if name in _RECIPE:
        return getattr(import_module("quantkit.recipe"), _RECIPE[name])
    if name in _RECORDS:
        return getattr(import_module("quantkit.records"), name)
    return getattr(import_module("quantkit.errors"), name)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Look for no garbage while modules are loaded: a fifth of the time it takes, for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def __dir__() -> list[str]:
    return sorted(__all__)
