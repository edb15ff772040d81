"""Faults that a test plans: cut connections, rate limits, refusals, lost answers."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass

from tests.hub.answers import Answer, error_answer

LFS_PUT = r"^PUT /lfs/"
"""Contents of large files on their way to the storage; parts of a file are each one request."""
LFS_BATCH = r"^POST /\S+\.git/info/lfs/objects/batch"
PREUPLOAD = r"^POST /api/models/\S+/preupload/"
COMMIT = r"^POST /api/models/\S+/commit/"
CREATE_REPO = r"^POST /api/repos/create"
CREATE_TAG = r"^POST /api/models/\S+/tag/"
RESOLVE = r"^(GET|HEAD) /[^/]+/[^/]+/resolve/"
LFS_GET = r"^GET /lfs/"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the requests from the `first` to match, `times` of them.

    `match` is an expression that is searched for in "METHOD /path?query". One of these happens:
    `answer` is given in place of the real one; the connection is cut once `cut_after` bytes of the
    request's body have come, and nothing is stored; the request is done, but the connection is cut
    before the answer (`lose_answer`) or after `cut_answer_after` bytes of the answer's body.
    """

    match: str
    first: int = 1
    times: int = 1
    answer: Answer | None = None
    cut_after: int | None = None
    lose_answer: bool = False
    cut_answer_after: int | None = None


def cut(match: str = LFS_PUT, *, after: int = 1, first: int = 1, times: int = 1) -> Fault:
    """Cut the connection after `after` bytes of the request's body."""
    return Fault(match, first, times, cut_after=after)


def lose_answer(match: str = COMMIT, *, first: int = 1, times: int = 1) -> Fault:
    """Do what is asked, and cut the connection before saying so."""
    return Fault(match, first, times, lose_answer=True)


def refuse_with(
    status: int,
    match: str,
    *,
    message: str = "refused by the test's plan",
    code: str | None = None,
    first: int = 1,
    times: int = 1,
) -> Fault:
    """Answer with an error of the Hub."""
    return Fault(match, first, times, answer=error_answer(status, message, code=code))


def rate_limit(match: str, *, seconds: int = 0, first: int = 1, times: int = 1) -> Fault:
    """Answer 429 with Retry-After; huggingface_hub waits `seconds` and one more."""
    answer = error_answer(
        429,
        "We had to rate limit your IP. To continue using our service, create a HF account.",
        headers={"Retry-After": str(seconds)},
    )
    return Fault(match, first, times, answer=answer)


def storage_full(match: str = LFS_BATCH, *, first: int = 1, times: int = 1) -> Fault:
    """Answer as the Hub does once the storage of an account's private repositories is used up."""
    message = (
        "Private repository storage limit reached, please upgrade your plan to increase your "
        "private storage limit."
    )
    return Fault(match, first, times, answer=error_answer(403, message))


class FaultPlan:
    """The faults of one server, and how often each has matched."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._planned: list[tuple[Fault, re.Pattern[str]]] = []
        self._matches: list[int] = []

    def add(self, fault: Fault) -> None:
        """Plan a fault; requests are counted from now."""
        with self._lock:
            self._planned.append((fault, re.compile(fault.match)))
            self._matches.append(0)

    def clear(self) -> None:
        """Let everything go well from now."""
        with self._lock:
            self._planned.clear()
            self._matches.clear()

    def take(self, line: str) -> Fault | None:
        """Return the fault for the request "METHOD /path", or None; counts the request."""
        found: Fault | None = None
        with self._lock:
            for index, (fault, pattern) in enumerate(self._planned):
                if not pattern.search(line):
                    continue
                self._matches[index] += 1
                due = fault.first <= self._matches[index] < fault.first + fault.times
                if due and found is None:
                    found = fault
        return found
