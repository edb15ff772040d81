"""Secrets of all shapes in texts that strangers chose, and what such texts cost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from quantkit.errors import InputError, clean_message
from quantkit.judging.worker import child_environment
from quantkit.masking import clean_line, find_secrets, hide_tokens, is_secret, plain_address

LETTERS = 1 << 17
"""An eighth of the longest line of a worker: what grows with the square is found all the same."""
PIECES = (
    *("?", "&", ":", "/", "@", "a", "=", "-", " ", "'", "\n", "a.", "?&", "://", "a://", "://a@"),
    *("?S", "?Signature", "Signature=", "hf_", "bearer ", "basic a ", "bearer\t"),
)
LINES = {
    **{repr(piece): piece * (LETTERS // len(piece)) for piece in PIECES},
    "blanks": "bearer" + " " * LETTERS,
    "query": "?" + "S" * LETTERS,
    "schemes": "a." * (LETTERS // 2) + "://" + "a" * LETTERS,
    "passwords": "://" + "a@" * (LETTERS // 2) + "'",
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_no_line_takes_long(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While an expression is searched, no other thread runs: not even the one that times out."""
    monkeypatch.setenv("MY_PASSWORD", "correct horse")
    for clean in (hide_tokens, clean_line, clean_message, plain_address):
        start = time.process_time()
        clean(line)
        assert time.process_time() - start < 0.5, clean


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PGPASSWORD", "hunter2-hunter2"),
        ("OPENAI_APIKEY", "sk-abcdefgh"),
        ("MY_AUTHTOKEN", "plain-looking"),
        ("MYSQL_PWD", "plain-looking"),
        ("API_KEY2", "abc'def\\ghi\"jkl"),
        ("AWS_SECRET_ACCESS_KEY", "/Abcd1234EFGH5678ijkl9012MNOP3456qrst7890"),
        ("DB_PASSWORD", "correct  horse"),
        ("GOOGLE_CREDENTIALS", '{"token_uri": "https://host/x", "key": "abcdef"}'),
        ("DEPLOY_KEY", "-----BEGIN KEY-----\n/AAABBBBCCCC\nDDDD\n-----END KEY-----\n"),
    ],
)
def test_the_value_of_a_variable_is_in_no_text(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is quoted, and whatever it begins with; nor do workers get it."""
    monkeypatch.setenv(name, value)
    assert name not in child_environment({name: value}, 1)
    for shown in (f"x {value.strip()} y", f"x {value.strip()!r} y"):
        for text in (str(InputError(shown)), clean_line(shown), hide_tokens(shown)):
            assert text.strip("x y'\"") == "[token]"
    for line in value.split("\n"):
        assert len(line) < 8 or line not in str(InputError(f"x {line} y"))


def test_what_is_no_secret_goes_on(tmp_path: Path) -> None:
    """Paths, and names that only sound like one."""
    for name in ("TOKENIZERS_PARALLELISM", "KEYBOARD", "TOKENIZER_THREADS"):
        assert not is_secret(name, "something")
    places = {"GOOGLE_CREDENTIALS": str(tmp_path), "TOKEN_FILE": "/not/there", "KEY_DIR": "~/.keys"}
    assert not find_secrets(places)


def test_a_password_may_hold_what_stands_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last @ is the one before the host."""
    address = "https://user:p@ssw0rd-of-mine@host/simple"
    assert hide_tokens(f"at {address}, {address}") == "at [token]host/simple, [token]host/simple"
    assert plain_address(address) == "https://host/simple"
    document = '{"url":"https://host","mail":"me@host"}'
    assert hide_tokens(document) == document
    monkeypatch.setenv("PIP_INDEX_URL", address)
    assert hide_tokens("wrong: p@ssw0rd-of-mine") == "wrong: [token]"


def test_of_a_secret_that_is_cut_no_piece_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though what stands before it shrinks, so that it comes into sight."""
    password = "correct-horse-battery-staple-2026"
    monkeypatch.setenv("DB_PASSWORD", password)
    signed = f"https://host/f?Signature={'a' * 1400}"
    for secret in (
        password,
        f"https://me:{password}@host",
        f"https://host/f?{password}&Signature=",
    ):
        for length in range(2950, 3200, 7):
            line = f"{signed} {signed} ".ljust(length) + secret + " z" * 3000
            shown = str(InputError(line))
            assert shown.startswith("https://host/f?[token] https://host/f?[token]")
            assert "corr" not in shown
    assert str(InputError("x" * 9000)) == "x" * 1500 + "..."
