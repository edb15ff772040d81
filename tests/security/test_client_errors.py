"""The exceptions of the Hub's client carry the token: none is behind one of ours."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import errors as client_errors

from quantkit.calibration.rows import open_rows
from quantkit.calibration.sources import Columns
from quantkit.checkpoint.source import explaining
from quantkit.errors import (
    CalibrationError,
    CheckpointError,
    HubError,
    QuantkitError,
    ResourceError,
)
from quantkit.publishing.client import Hub, ask
from quantkit.serving.target import _count_hub_bytes

TOKEN = "hf_plantedplantedplanted"


def make_error(kind: str, status: int, headers: Any = ()) -> Exception:
    """An exception of the client, about an answer to a request with the token."""
    http: Any = importlib.import_module(client_errors.HTTPError.__module__.partition(".")[0])  # type: ignore[attr-defined]
    request = http.Request("GET", "https://host/x", headers={"authorization": f"Bearer {TOKEN}"})
    response = http.Response(status, headers=headers, request=request)
    found: Exception = getattr(client_errors, kind)("no", response=response)
    return found


def list_behind(error: BaseException) -> Iterator[BaseException]:
    """All that travels along with an exception, whether a traceback shows it or not."""
    for behind in (error.__cause__, error.__context__):
        if behind is not None:
            yield behind
            yield from list_behind(behind)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("GatedRepoError", 403),
        ("RepositoryNotFoundError", 404),
        ("RevisionNotFoundError", 404),
        ("HfHubHTTPError", 500),
    ],
)
def test_a_download_that_is_refused_leaves_no_request_behind(kind: str, status: int) -> None:
    """Not even as the context, which `from None` only hides."""
    with pytest.raises(CheckpointError) as caught, explaining("a/b", "a/b", None):
        raise make_error(kind, status)
    assert not list(list_behind(caught.value))


def test_a_machine_that_fails_a_download_is_still_blamed() -> None:
    """Though the system's error does not travel along."""
    with (
        pytest.raises(ResourceError, match="could not be downloaded") as caught,
        explaining("a/b", "a/b", None),
    ):
        raise ConnectionError("no connection") from OSError(24, "Too many open files")
    assert not list(list_behind(caught.value))


def test_sizes_that_the_hub_does_not_say_leave_no_request_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a download."""

    def refuse(*_: object, **__: object) -> None:
        raise make_error("HfHubHTTPError", 500)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(CheckpointError, match="how large") as caught:
        _count_hub_bytes("a/b", "a/b", None)
    assert not list(list_behind(caught.value))


def test_a_dataset_that_the_hub_refuses_leaves_no_request_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The package `datasets` has the client's exception behind its own."""

    def refuse(*_: object, **__: object) -> None:
        raise DatasetNotFoundError("no") from make_error("HfHubHTTPError", 500)

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(CalibrationError, match="cannot load the dataset") as caught:
        open_rows("a/b", "hub", "train", Columns("text", False))
    assert not list(list_behind(caught.value))


@pytest.mark.parametrize(
    "headers",
    [[(b"retry-after", b"\xb2")], [(b"retry-after", b"9" * 400)], [(b"ratelimit", b"t=\xb2")]],
    ids=["superscript", "endless", "limit"],
)
def test_an_odd_time_to_wait_is_no_defect(
    headers: list[tuple[bytes, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever looks like digits."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def call() -> None:
        raise make_error("HfHubHTTPError", 429, headers)

    assert not list(list_behind(fail_to_ask(call)))


def test_a_defect_leaves_no_request_behind_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be in what explains the client's exception."""

    def break_down(*_: object) -> None:
        raise KeyError("x")

    def call() -> None:
        raise make_error("HfHubHTTPError", 500)

    monkeypatch.setattr("quantkit.publishing.client._explain", break_down)
    with pytest.raises(KeyError) as caught:
        ask(Hub(None, TOKEN, "https://host"), "try", "a/b", call)  # type: ignore[arg-type]
    assert not list(list_behind(caught.value))


def fail_to_ask(call: Callable[[], None]) -> QuantkitError:
    """Return what `ask` raises."""
    with pytest.raises(HubError) as caught:
        ask(Hub(None, TOKEN, "https://host"), "try", "a/b", call)  # type: ignore[arg-type]
    return caught.value
