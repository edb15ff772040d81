"""The one place where secrets are taken out of a text, whoever wrote it and wherever it goes.

What counts as one: whatever looks like a token of the Hub or of a service beside it in a CI job; a
name and a password before a host; an address that is itself a key; and the values of variables of
the environment that are named after what they hold (HF_TOKEN, MLFLOW_TRACKING_PASSWORD), the
passwords in others (PIP_INDEX_URL, HTTPS_PROXY) and the headers that OpenTelemetry is given.
"""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

HIDDEN = "[token]"

_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|(?:hf_oauth|hf_jwt|api_org)_[\w.-]{16,}"
    r"|gh[oprsu]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|gl(?:pat|oas|dt|rt|cbt|ptt|ft)-[\w-]{16,})",
    re.ASCII,
)
"""What tokens of the Hub, and of the services beside it in a CI job, look like. No name of a model
or an account does, as that of hf-internal-testing."""
_BEARER = re.compile(r"(?i)\b(?:bearer|basic)\s+[\w.~+/=-]{16,}", re.ASCII)
_SIGNED = re.compile(
    r"(\b[A-Za-z][A-Za-z0-9+.-]{0,30}://)[^\s/@'\"]+@"
    r"|(?<=\?)[^\s'\"<>]*[Ss]ignature=[^\s'\"<>]*"
)
"""A name and a password before a host; the query of an address that is itself a key."""

_USER = re.compile(r"(?<=://)[^\s/@]*@")

_SECRET_WORDS = frozenset(
    {"TOKEN", "TOKENS", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "KEY", "CREDENTIALS"}
)
_CREDENTIALS = re.compile(r"://([^\s/@]+)@")
_HEADERS = "_HEADERS"
"""End of the names of variables that hold headers of requests: `key=value,key=value`."""
_SHORTEST = 8
"""Characters of a value of the environment that is looked for: a shorter one is in many words."""
_SHORTEST_ALONE = 16
"""And of what stands before a host without a colon: tokens do."""


def hide_tokens(text: str, known: str | None = None) -> str:
    """Return `text` without anything that is or looks like a secret, and without `known`."""
    return _hide(text, [*([known] if known else []), *find_secrets(os.environ)])


def hide_all(value: Any, known: str | None = None) -> Any:
    """Return a JSON document with each of its texts as `hide_tokens` gives it."""
    return _hide_all(value, [*([known] if known else []), *find_secrets(os.environ)])


def plain_address(address: str) -> str:
    """Return an address without the name and the password, or the token, before its host."""
    return _USER.sub("", address)


def clean_line(text: str) -> str:
    """One line without control characters or secrets: another program's words for a terminal."""
    return hide_tokens(" ".join("".join(c if c.isprintable() else " " for c in text).split()))


@contextmanager
def masked_logs() -> Iterator[None]:
    """Take secrets out of all that is logged meanwhile: addresses mostly, and tracebacks."""
    names = ("", "huggingface_hub", "quantkit")
    handlers = [handler for name in names for handler in logging.getLogger(name).handlers]
    if logging.lastResort is not None:
        handlers.append(logging.lastResort)
    for handler in handlers:
        handler.addFilter(_mask)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_mask)


def _mask(record: logging.LogRecord) -> bool:
    record.msg, record.args = hide_tokens(record.getMessage()), None
    if record.exc_info:
        # What a formatter finds here it does not make anew.
        lines = traceback.format_exception(record.exc_info[1])
        record.exc_text = hide_tokens("".join(lines).rstrip())
    return True


def is_secret(variable: str, value: str) -> bool:
    """Whether a variable of the environment is named after a secret, or holds one."""
    return (
        bool(_SECRET_WORDS & set(variable.upper().split("_")))
        or variable.upper().endswith(_HEADERS)
        or bool(_CREDENTIALS.search(value))
    )


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a program that reads strangers' files and needs no secret."""
    return {name: value for name, value in environment.items() if not is_secret(name, value)}


def find_secrets(environment: Mapping[str, str]) -> Collection[str]:
    """Return what in an environment is secret, the longest first.

    A value that is a path, a number or a few letters is none: TOKEN_FILE, SSH_KEY_BITS.
    """
    found = {
        secret
        for secret in _list_secrets(environment)
        if len(secret) >= _SHORTEST and secret[0] not in "/~." and not secret.isdecimal()
    }
    return sorted(found, key=len, reverse=True)


def _list_secrets(environment: Mapping[str, str]) -> Iterator[str]:
    for name, value in environment.items():
        if not is_secret(name, value):
            continue
        if name.upper().endswith(_HEADERS):
            yield from (pair.partition("=")[2].strip() for pair in value.split(","))
            continue
        passwords = [
            password
            for user in _CREDENTIALS.findall(value)
            for _, colon, password in (user.rpartition(":"),)
            # Alone it may be a name, as in postgres://postgres@host.
            if colon or len(password) >= _SHORTEST_ALONE
        ]
        # Whoever fails with one may show it as it is or as it stands in an address.
        yield from passwords
        if "://" not in value:
            yield value.strip()
        yield from map(unquote, passwords)


def _hide(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return _SIGNED.sub(HIDDEN, _BEARER.sub(HIDDEN, _TOKEN.sub(HIDDEN, text)))


def _hide_all(value: Any, secrets: Collection[str]) -> Any:
    if isinstance(value, str):
        return _hide(value, secrets)
    if isinstance(value, dict):
        return {key: _hide_all(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_hide_all(item, secrets) for item in value)
    return value
