"""What the groups of a recipe are made of: closed records, words from a list, fractions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError

from quantkit.errors import nearest


def _fraction(value: object) -> object:
    """Accept `3%` beside 0.03."""
    if isinstance(value, bool):
        raise PydanticCustomError("switch", "a number is expected")
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


def check_choice(kind: str, value: object, known: Collection[str], more: str = "") -> str:
    """Return `value`, which pydantic asks about, if it is one of `known`.

    Args:
        kind: what it is, in messages.
        more: what else could be known, in messages.

    Raises:
        PydanticCustomError: it is not; the nearest one is named.
    """
    # YAML reads a bare `none`-like word as text but `null` and `~` as None.
    word = "none" if value is None and "none" in known else value
    if not isinstance(word, str) or word not in known:
        raise PydanticCustomError(
            "choice",
            "{kind} {value} is unknown{near} (known: {known}{more})",
            {
                "kind": kind,
                "value": repr(value),
                "near": _suggest(str(value), known),
                "known": ", ".join(known),
                "more": more,
            },
        )
    return word


_OTHER_NAMES = {"int4": "w4a16", "int8": "w8a8", "fp8": "fp8_dynamic"}
"""What others call a scheme."""


def _suggest(word: str, known: Collection[str]) -> str:
    """The name that was meant: in other letters, as others say it, or the nearest."""
    lowered = word.lower()
    same = next((each for each in known if each.lower() == lowered), _OTHER_NAMES.get(lowered))
    if same in known:
        return f"; did you mean {same!r}?"
    return nearest(word, known) or nearest(lowered, known)


def choice_of(kind: str, known: Mapping[str, Any]) -> Any:
    """A string type that accepts the keys of `known` and names the nearest one otherwise."""

    def check(value: object) -> str:
        return check_choice(kind, value, known)

    return Annotated[
        str, BeforeValidator(check), WithJsonSchema({"type": "string", "enum": list(known)})
    ]


Fraction = Annotated[
    float,
    BeforeValidator(_fraction),
    PlainSerializer(lambda value: value, return_type=float),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[\d.]+%$"}]}),
]


class Spec(BaseModel):
    """Frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _switch_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse `samples: yes`, which would be read as 1."""
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation in (int, float, float | None):
            raise PydanticCustomError("switch", "a number is expected")
        return value
