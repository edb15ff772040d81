"""Checks of the user's own, run while both models are loaded (docs/python.md, "Your own checks").

A job of hours does not end at a check that raises: whatever it raises is why the artifact fails.
"""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Callable, Sequence

import numpy as np

from quantkit.errors import InputError, Interrupted
from quantkit.functions import check_function, describe_function, name_function
from quantkit.judging.handles import Connection, RuntimeHandle
from quantkit.masking import masked_logs
from quantkit.records import CheckOutcome, CustomCheck, Event, Progress

GateCheck = Callable[[RuntimeHandle], CheckOutcome | bool]

LONGEST_NAME = 100
"""Characters of a check's name."""
LONGEST_DETAIL = 500
"""Characters of what it found; the rest is cut off."""

CHECKS_ASK_DECODERS = "and checks of your own ask models that generate text: leave `checks` out"
"""Behind what is none."""

_REMEDY = "a check takes a quantkit.RuntimeHandle and returns a quantkit.CheckOutcome, or a bool"


def read_checks(checks: Sequence[GateCheck]) -> tuple[GateCheck, ...]:
    """Return the checks of a job, each of which can be called as one.

    Raises:
        InputError: one cannot, or is named twice.
    """
    given: object = checks
    if not isinstance(given, list | tuple):
        raise InputError(f"checks is a {type(given).__name__}: write a list, checks=[my_check]")
    found = tuple(checks)
    for number, check in enumerate(found):
        check_function(check, f"checks[{number}]", 1, _REMEDY)
        if check in found[:number]:
            raise InputError(f"checks[{number}] {name_function(check)} is there twice")
    return found


def run_checks(
    checks: Sequence[GateCheck], handle: RuntimeHandle, connection: Connection, tell: Progress
) -> tuple[CustomCheck, ...]:
    """Run each check, one after the other.

    Args:
        checks: as of `read_checks`.
        handle: whose workers are idle.
        connection: of the handle; closed afterwards.
        tell: called after each check.

    Raises:
        WorkerError, ResourceError: a worker failed, whatever the check made of that.
    """
    found = []
    try:
        for number, check in enumerate(checks):
            tell(Event("gate", number, len(checks), f"check {name_function(check)}"))
            found.append(_run(check, handle, connection))
        tell(Event("gate", len(checks), len(checks), "your own checks"))
    finally:
        connection.close()
    return tuple(found)


def _run(check: GateCheck, handle: RuntimeHandle, connection: Connection) -> CustomCheck:
    name = name_function(check)
    try:
        outcome = _read(check(handle), name)
    except (KeyboardInterrupt, Interrupted):
        raise
    except BaseException as error:
        if connection.failure is None:
            with masked_logs():
                logging.getLogger(__name__).error("the check %s raised:", name, exc_info=error)
        words = _one_line(f"{type(error).__name__}: {error}").removesuffix(":")
        outcome = CheckOutcome(name, False, detail=words)
    if connection.failure is not None:
        raise connection.failure
    source = describe_function(check)
    return CustomCheck(
        name=outcome.name,
        value=outcome.value,
        limit=outcome.limit,
        verdict="PASS" if outcome.passed else "FAIL",
        detail=outcome.detail,
        function=source.name,
        sha256=source.sha256,
    )


def _read(returned: object, name: str) -> CheckOutcome:
    """Return what a check answered; an answer that cannot be read is no pass.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(returned, bool | np.bool_):
        return CheckOutcome(name, bool(returned))
    if not isinstance(returned, CheckOutcome):
        kind = "None" if returned is None else f"a {type(returned).__name__}"
        raise TypeError(f"it returned {kind}: {_REMEDY}")
    if not isinstance(returned.passed, bool | np.bool_):
        raise TypeError(f"CheckOutcome.passed is {returned.passed!r}, not True or False")
    title, detail = " ".join(str(returned.name).split()), _one_line(str(returned.detail))
    if not title or len(title) > LONGEST_NAME:
        raise ValueError(f"CheckOutcome.name has {len(title)} characters, not 1 to {LONGEST_NAME}")
    return CheckOutcome(
        title,
        bool(returned.passed),
        _number("value", returned.value),
        _number("limit", returned.limit),
        detail,
    )


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_DETAIL else f"{line[: LONGEST_DETAIL - 1]}…"


def _number(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real | np.generic):
        raise TypeError(f"CheckOutcome.{name} is a {type(value).__name__}, not a number")
    found = float(value)
    if not math.isfinite(found):
        raise ValueError(f"CheckOutcome.{name} is {found}, which decides nothing")
    return found


def explain_custom(check: CustomCheck) -> str:
    """Return one sentence on a check that failed."""
    figures = [
        f"{name} {value:.6g}"
        for name, value in (("value", check.value), ("limit", check.limit))
        if value is not None
    ]
    found = "; ".join(part for part in (", ".join(figures), check.detail) if part)
    return f"check {check.name} failed{f': {found}' if found else ''}"
