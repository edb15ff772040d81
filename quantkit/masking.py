"""The one place where secrets are taken out of a text, whoever wrote it and wherever it goes.

What counts as one: whatever looks like a token of the Hub or of a service beside it in a CI job; a
name and a password before a host; an address that is itself a key; and the values of variables of
the environment that are named after what they hold (HF_TOKEN, MLFLOW_TRACKING_PASSWORD), the
passwords in others (PIP_INDEX_URL, HTTPS_PROXY) and the headers that OpenTelemetry is given.
"""

from __future__ import annotations

import json
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
    r"(?<![A-Za-z0-9+.-])[A-Za-z0-9+.-]*://[^\s/'\"]+@"
    r"|(?<=\?)[^\s'\"<>?]*[Ss]ignature=[^\s'\"<>]*"
)
"""A name and a password before a host; the query of an address that is itself a key.

A password may hold an @. Strangers choose the texts, of a megabyte and more, and while one is
searched no other thread runs: no letter is passed from more than one beginning."""
_UNFINISHED = re.compile(r"(?:://[^\s/'\"]*|\?[^\s'\"<>?]*)\Z")
"""Either of them, cut before what it is known by."""

_USER = re.compile(r"(?<=://)[^\s/]*@")

_SECRET_NAME = re.compile(
    r"TOKEN(?!I[SZ])|SECRET|PASSW|PASSPHRASE|_P(?:ASS|WD)$|CREDENTIAL|KEYS?(?![A-Z])", re.ASCII
)
"""Within the names of variables that hold a secret: PGPASSWORD, OPENAI_APIKEY; but not
TOKENIZERS_PARALLELISM or KEYBOARD."""
_PLACE_NAME = re.compile(r"(?:FILE|PATH|DIR)S?$")
"""At the end of the names of those that say where one is."""
_CREDENTIALS = re.compile(r"://([^\s/]+)@")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*")
_HEADERS = "_HEADERS"
"""End of the names of variables that hold headers of requests: `key=value,key=value`."""
_SHORTEST = 8
"""Characters of a value of the environment that is looked for: a shorter one is in many words."""
_SHORTEST_ALONE = 16
"""And of what stands before a host without a colon: tokens do."""
_LONGEST_BEGINNING = 64
"""Characters of what a token looks like that do not make it one yet."""


def hide_tokens(text: str, known: str | None = None) -> str:
    """Return `text` without anything that is or looks like a secret, and without `known`."""
    return _hide(text, [*([known] if known else []), *find_secrets(os.environ)])


def hide_beginning(text: str, letters: int) -> str:
    """Return about the first `letters` of a long text, without secrets or a piece of one.

    Of a secret that the cut goes through, the first piece does not look like one.
    """
    secrets = find_secrets(os.environ)
    margin = max([_LONGEST_BEGINNING, *map(len, secrets)])
    # Twice: what follows on a long secret is to be shown too.
    start = _UNFINISHED.sub("", text[: letters + 2 * margin])
    return _hide(start, secrets)[:-margin]


def hide_all(value: Any, known: str | None = None) -> Any:
    """Return a JSON document with each of its texts as `hide_tokens` gives it."""
    return _hide_all(value, [*([known] if known else []), *find_secrets(os.environ)])


def plain_address(address: str) -> str:
    """Return an address without the name and the password, or the token, before its host."""
    return _USER.sub("", address)


def clean_line(text: str) -> str:
    """One line without control characters or secrets: another program's words for a terminal."""
    # Twice: blanks are a part of some secrets, and control characters stand before others.
    clean = "".join(c if c.isprintable() else " " for c in hide_tokens(text))
    return hide_tokens(" ".join(clean.split()))


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
        _is_named(variable)
        or variable.upper().endswith(_HEADERS)
        or bool(_CREDENTIALS.search(value))
    )


def _is_named(variable: str) -> bool:
    return bool(_SECRET_NAME.search(variable.upper()))


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a program that reads strangers' files and needs no secret."""
    return {name: value for name, value in environment.items() if not is_secret(name, value)}


def find_secrets(environment: Mapping[str, str]) -> Collection[str]:
    """Return what in an environment is secret, the longest first.

    A value that is a path, a number or a few letters is none: TOKEN_FILE, SSH_KEY_BITS.
    """
    found = {
        shown
        for secret in _list_secrets(environment)
        if len(secret) >= _SHORTEST and not secret.isdecimal()
        # As it is, and as Python and JSON quote it.
        for shown in (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1])
    }
    return sorted(found, key=len, reverse=True)


def _list_secrets(environment: Mapping[str, str]) -> Iterator[str]:
    for name, value in environment.items():
        if name.upper().endswith(_HEADERS):
            yield from (pair.partition("=")[2].strip() for pair in value.split(","))
            continue
        # Whoever fails with one may show it as it is or as it stands in an address.
        for password in _list_passwords(value):
            yield password
            yield unquote(password)
        if _is_named(name):
            # A key has several lines, which others show one by one.
            lines = [value, *value.splitlines()] if "\n" in value.strip() else [value]
            yield from (
                line
                for line in map(str.strip, lines)
                if not _ADDRESS.fullmatch(line) and not _is_place(name, line)
            )


def _list_passwords(value: str) -> Iterator[str]:
    """What stands before the hosts of a value's addresses."""
    for user in _CREDENTIALS.findall(value):
        # An @ may be one of the password's letters, or the next address has begun.
        for each in (user, user.partition("@")[0]):
            _, colon, password = each.partition(":")
            if colon:
                yield password
            # Alone it may be a name, as in postgres://postgres@host.
            elif len(each) >= _SHORTEST_ALONE:
                yield each


def _is_place(name: str, value: str) -> bool:
    """Whether a value says where a secret is; random letters begin with a slash as well."""
    return value.startswith(("/", "~", ".")) and (
        bool(_PLACE_NAME.search(name.upper())) or os.path.exists(os.path.expanduser(value))
    )


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
