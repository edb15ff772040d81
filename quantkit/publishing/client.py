"""The Hub's own client, and what its refusals mean to the user.

An exception of the client carries the request, and with it the token and signed addresses. So none
of them gets out of here, not even as the cause of another: what is said is made from the status
and the Hub's own words, without what looks like a token.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from quantkit import __version__
from quantkit.errors import HubError, MissingPackageError, PublishError, QuantkitError
from quantkit.masking import hide_tokens, plain_address
from quantkit.records import Event

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

Answer = TypeVar("Answer")

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

_A_TOKEN = re.compile(r"[!-~]+")
_AGAIN = "the same command goes on, and sends nothing again that has arrived"
_MOST_WORDS = 300
_HTTP_LOGS = ("httpx", "httpx2", "httpcore", "httpcore2")
_MOST_WAITS = 5
_LONGEST_WAIT = 300.0
"""Seconds: the window of the Hub's rate limits."""


@dataclass(frozen=True)
class Hub:
    """A connection to the Hub. The token is the client's; it is here to be hidden."""

    api: HfApi
    token: str | None
    endpoint: str

    def __repr__(self) -> str:
        return f"Hub({self.endpoint})"

    def page(self, repo: str, revision: str | None = None) -> str:
        """Return the address of a repository, or of one revision of it."""
        return f"{self.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")


def open_hub() -> Hub:
    """Return the Hub that HF_ENDPOINT names, with the token of the environment or the client.

    Nothing is asked of it yet.

    Raises:
        PublishError: what is there as a token cannot be one.
    """
    try:
        from huggingface_hub import HfApi, get_token
    except ImportError:
        raise MissingPackageError(
            "huggingface_hub", "publishing", "pip install huggingface_hub"
        ) from None
    api = HfApi(library_name="quantkit", library_version=__version__)
    token = get_token()
    if token is not None and not _A_TOKEN.fullmatch(token):
        raise PublishError(f"the token holds characters that no token has; {LOG_IN}")
    return Hub(api, token, plain_address(api.endpoint))


def say_nothing(_: Event) -> None:
    """Progress that nobody watches; `quantkit.running` has its own, and takes torch along."""


def check_repo_name(repo: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        PublishError: it is not `owner/name`.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise PublishError(
            f"{repo!r} is no name of a repository: write OWNER/NAME, of letters, digits, '-', '_' "
            f"and '.', at most 96 in all"
        )


def ask(hub: Hub, what: str, repo: str, call: Callable[[], Answer]) -> Answer:
    """Return what `call` returns; what the client raises becomes what the user should see.

    Where it meets a rate limit, it waits as the Hub says and calls again. The client does so itself
    for reading and uploading, and not for commits, tags and branches. A request that meets a rate
    limit has done nothing, so it is safe to repeat.

    Args:
        what: is being done, after "could not".

    Raises:
        PublishError: the user has to mend something.
        HubError: the same will go well later.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    for waits in range(_MOST_WAITS + 1):
        try:
            return call()
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            caught = error
        # Outside of the handler: else the client's exception would travel along as context, of a
        # defect of ours too.
        seconds = _wait_for(caught) if waits < _MOST_WAITS else None
        if seconds is None:
            raise _explain(caught, hub, what, repo)
        logging.getLogger("huggingface_hub").warning("Rate limited. Waiting %gs.", seconds)
        time.sleep(seconds)
    raise AssertionError("the last turn returns or raises")


def _wait_for(error: Exception) -> float | None:
    """Seconds that the Hub wants one to wait; None where waiting does not help."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError) or error.response.status_code != 429:
        return None
    after = error.response.headers.get("retry-after", "")
    reset = re.search(r"\bt=(\d+)", error.response.headers.get("ratelimit", ""), re.ASCII)
    # Without the first, what only looks like digits would be some, as a superscript.
    plain = after.isascii() and after.isdecimal()
    seconds = float(after) if plain else float(reset.group(1)) if reset else 8.0
    return seconds + 1 if seconds <= _LONGEST_WAIT else None


@contextmanager
def quiet_client(tell: Callable[[str], None]) -> Iterator[None]:
    """Keep the client's bars off the terminal, and what it logs away from it.

    Its log names signed addresses; that it waits or tries again is told through `tell`.
    """
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    log = logging.getLogger("huggingface_hub")
    handlers, propagates, bars = log.handlers[:], log.propagate, not are_progress_bars_disabled()
    others = {each: each.level for each in map(logging.getLogger, _HTTP_LOGS)}
    log.handlers, log.propagate = [_listen(tell)], False
    for each in others:
        each.setLevel(logging.WARNING)
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        log.handlers, log.propagate = handlers, propagates
        for each, level in others.items():
            each.setLevel(level)
        if bars:
            enable_progress_bars()


def _listen(tell: Callable[[str], None]) -> logging.Handler:
    """Return what takes the client's warnings, and says of them only that it waits."""

    def say(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        wait = re.search(r"(?:Waiting|Retrying in) (\d+(?:\.\d+)?)s", message, re.ASCII)
        if wait:
            reason = "the Hub is busy" if message.startswith("Rate") else "no answer from the Hub"
            tell(f"{reason}: trying again in {float(wait.group(1)):g} s")
        return False

    handler = logging.Handler(logging.WARNING)
    handler.addFilter(say)
    return handler


def _explain(error: Exception, hub: Hub, what: str, repo: str) -> QuantkitError:
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HfHubHTTPError):
        # So the client says which large file it is that was refused.
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error, hub, what, repo)
    if isinstance(error, OfflineModeIsEnabled):
        return PublishError(f"could not {what}: HF_HUB_OFFLINE is set; unset it to publish")
    if isinstance(error, LocalTokenNotFoundError):
        return PublishError(f"could not {what}: there is no token; {LOG_IN}")
    if isinstance(error, HFValidationError):
        return PublishError(f"could not {what}: {_words(str(error), hub)}")
    if isinstance(error, OSError) and error.filename:
        return PublishError(f"could not {what}: cannot read {error.filename}: {error.strerror}")
    if isinstance(error, ValueError):
        # The client's own refusals, and those of the Hub on metadata and large files.
        return PublishError(f"could not {what}: {_words(str(error), hub)}")
    return HubError(
        f"could not {what}: the connection to {hub.endpoint} failed ({type(error).__name__}); "
        f"{_AGAIN}"
    )


def _explain_status(error: HfHubHTTPError, hub: Hub, what: str, repo: str) -> QuantkitError:
    status, said = error.response.status_code, _words(error.server_message or "", hub)
    code = error.response.headers.get("x-error-code", "")
    said = f" ({said})" if said else ""
    begin = f"could not {what}: "
    if not plain_address(str(error.response.url)).startswith(f"{hub.endpoint}/"):
        return HubError(
            f"{begin}the Hub's storage answered with status {status}{said}; run the same command "
            f"again, which asks for new addresses"
        )
    if status == 429 or status >= 500:
        why = "too many requests" if status == 429 else f"it answered with status {status}"
        return HubError(f"{begin}the Hub is busy: {why}{said}; later {_AGAIN}")
    if code == "GatedRepo":
        return PublishError(
            f"{begin}{repo} is gated: ask for access at {hub.page(repo)}, with the account of the "
            f"token{said}"
        )
    if status == 401:
        known = "the Hub does not accept the token: it was revoked or has expired"
        return PublishError(
            f"{begin}{known if hub.token else 'there is no token'}{said}; {LOG_IN}, with a token "
            f"that may write to {repo}"
        )
    reasons = {
        403: f"the token may not do that{said}: take one of an account that may write to {repo}, "
        f"and with the right to write (https://huggingface.co/settings/tokens)",
        404: f"{repo} or its revision is not there, or the token may not see it{said}: check the "
        f"name, and whose token it is (`hf auth whoami`)",
        409: f"it is there already{said}",
        412: f"somebody has changed {repo} in the meantime, so this was not done: run the same "
        f"command again to look at what is there now",
        413: f"the Hub refuses so large a request{said}",
    }
    return PublishError(f"{begin}{reasons.get(status, f'the Hub refuses (status {status}){said}')}")


def _words(text: str, hub: Hub) -> str:
    """The Hub's own words on one line, with nothing secret in them."""
    line = " ".join(hide_tokens(text, hub.token).split())
    line = re.sub(r"https?://\S+\?\S+", "[address]", line)
    return line if len(line) <= _MOST_WORDS else f"{line[:_MOST_WORDS]}…"
