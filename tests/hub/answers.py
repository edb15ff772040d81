"""What the server says: plain answers, and errors in the form that the Hub gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One HTTP answer."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Refused(Exception):
    """A request that is answered by an error."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


def json_answer(document: Any, *, status: int = 200, headers: Mapping[str, str] = {}) -> Answer:
    """An answer in JSON."""
    content_type = {"Content-Type": "application/json; charset=utf-8"}
    return Answer(status, json.dumps(document).encode(), {**content_type, **headers})


def error_answer(
    status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] = {}
) -> Answer:
    """An error with the headers by which the client tells one from another.

    `code` is the Hub's own, such as RepoNotFound, GatedRepo, RevisionNotFound or EntryNotFound.
    """
    named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return json_answer({"error": message}, status=status, headers={**named, **headers})


def storage_error(status: int, code: str, message: str) -> Answer:
    """An error of the object store behind the Hub, which speaks XML."""
    text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return Answer(status, text.encode(), {"Content-Type": "application/xml"})


def refuse(status: int, message: str, *, code: str | None = None) -> Refused:
    """The exception for `error_answer`, to be raised."""
    return Refused(error_answer(status, message, code=code))
