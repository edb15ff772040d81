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
    from quantkit.calibrating import calibrate as calibrate
    from quantkit.comparing import compare as compare
    from quantkit.conversion import convert as convert
    from quantkit.errors import ArtifactError as ArtifactError
    from quantkit.errors import CalibrationError as CalibrationError
    from quantkit.errors import CheckpointError as CheckpointError
    from quantkit.errors import HubError as HubError
    from quantkit.errors import InputError as InputError
    from quantkit.errors import Interrupted as Interrupted
    from quantkit.errors import MissingPackageError as MissingPackageError
    from quantkit.errors import NotYetError as NotYetError
    from quantkit.errors import OutputError as OutputError
    from quantkit.errors import PlanError as PlanError
    from quantkit.errors import PublishError as PublishError
    from quantkit.errors import QuantkitError as QuantkitError
    from quantkit.errors import RecipeError as RecipeError
    from quantkit.errors import ResourceError as ResourceError
    from quantkit.errors import TrackingError as TrackingError
    from quantkit.errors import WorkerError as WorkerError
    from quantkit.estimating import estimate as estimate
    from quantkit.judging.handles import ModelHandle as ModelHandle
    from quantkit.judging.handles import RuntimeHandle as RuntimeHandle
    from quantkit.pipeline import plan as plan
    from quantkit.pipeline import quantize as quantize
    from quantkit.publishing import promote as promote
    from quantkit.publishing import publish as publish
    from quantkit.recipe import Recipe as Recipe
    from quantkit.recipe import json_schema as recipe_schema
    from quantkit.recipe import load_recipe as load_recipe
    from quantkit.records import CheckOutcome as CheckOutcome
    from quantkit.records import Event as Event
    from quantkit.records import LayerStats as LayerStats
    from quantkit.records import Plan as Plan
    from quantkit.records import Report as Report
    from quantkit.records import Result as Result
    from quantkit.records import SolvedWeight as SolvedWeight
    from quantkit.records import Statistics as Statistics
    from quantkit.records import WeightForm as WeightForm
    from quantkit.routing import gateway as gateway
    from quantkit.schemes import Solver as Solver
    from quantkit.serving import serve_command as serve_command
    from quantkit.sweeping.run import sweep as sweep

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "CheckOutcome",
    "CheckpointError",
    "Event",
    "HubError",
    "InputError",
    "Interrupted",
    "LayerStats",
    "MissingPackageError",
    "ModelHandle",
    "NotYetError",
    "OutputError",
    "Plan",
    "PlanError",
    "PublishError",
    "QuantkitError",
    "Recipe",
    "RecipeError",
    "Report",
    "ResourceError",
    "Result",
    "RuntimeHandle",
    "SolvedWeight",
    "Solver",
    "Statistics",
    "TrackingError",
    "WeightForm",
    "WorkerError",
    "__version__",
    "bisect",
    "calibrate",
    "compare",
    "convert",
    "estimate",
    "gate",
    "gateway",
    "inspect",
    "load_recipe",
    "plan",
    "promote",
    "publish",
    "quantize",
    "recipe_schema",
    "serve_command",
    "sweep",
    "verify",
]

_NAMES_OF_HOMES = {
    "artifacts": ("gate", "inspect", "verify"),
    "bisection": ("bisect",),
    "calibrating": ("calibrate",),
    "comparing": ("compare",),
    "conversion": ("convert",),
    "estimating": ("estimate",),
    "judging.handles": ("ModelHandle", "RuntimeHandle"),
    "pipeline": ("plan", "quantize"),
    "publishing": ("promote", "publish"),
    "recipe": ("Recipe", "load_recipe"),
    "records": (
        "CheckOutcome",
        "Event",
        "LayerStats",
        "Plan",
        "Report",
        "Result",
        "SolvedWeight",
        "Statistics",
        "WeightForm",
    ),
    "routing": ("gateway",),
    "schemes": ("Solver",),
    "serving": ("serve_command",),
    "sweeping.run": ("sweep",),
}
_HOMES = {name: home for home, names in _NAMES_OF_HOMES.items() for name in names}
"""Public name -> the module that it is loaded from; the rest are errors."""


def __getattr__(name: str) -> Any:
    """Load a public name from its home."""
    if name not in __all__:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    with collector_at_rest():
        return _load(name)


def _load(name: str) -> Any:
    if name == "recipe_schema":
        return import_module("quantkit.recipe").json_schema
    return getattr(import_module(f"quantkit.{_HOMES.get(name, 'errors')}"), name)


@contextmanager
def collector_at_rest() -> Iterator[None]:
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
