"""quantkit inside other tools: each part needs the tool, and is loaded when it is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.integrations.trainer import QuantizeCallback as QuantizeCallback

__all__ = ["QuantizeCallback"]


def __getattr__(name: str) -> Any:
    """Load a public name from its home."""
    if name != "QuantizeCallback":
        raise AttributeError(f"module 'quantkit.integrations' has no attribute {name!r}")
    from quantkit.integrations.trainer import QuantizeCallback

    return QuantizeCallback


def __dir__() -> list[str]:
    return __all__
