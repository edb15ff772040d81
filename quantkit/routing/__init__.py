"""A LiteLLM configuration: one stable name over pinned revisions, quantized first.

Clients ask for the alias. Behind it are the servers of quantized artifacts that passed their gate;
where none of them answers, the 16-bit original does. Every server is asked for by a name that holds
the revision, so that another one than the gate saw does not answer unnoticed.

Format: https://docs.litellm.ai/docs/proxy/configs and .../proxy/reliability.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import yaml

from quantkit.errors import InputError
from quantkit.records import Progress
from quantkit.routing.pinning import Pinned, pin_baseline, pin_quantized
from quantkit.running import silent

BASELINE_SUFFIX = "-16bit"
MASTER_KEY = "LITELLM_MASTER_KEY"
"""Variable of the environment with the key that clients of the proxy show."""

_ALIAS = re.compile(r"[\w.-]{1,96}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_COOLDOWN_SECONDS = 30


@dataclass(frozen=True)
class Route:
    """A model and the OpenAI-style server that has it."""

    model: str
    """Folder, file, Hub id or id@revision."""
    url: str
    """Its API, for instance http://127.0.0.1:8000/v1."""


@dataclass(frozen=True)
class GatewayConfig:
    """The configuration of a proxy."""

    alias: str
    config: dict[str, Any]
    """JSON-ready."""
    pinned: tuple[Pinned, ...]
    """What answers, in the order in which it is asked."""

    @property
    def text(self) -> str:
        """The YAML file, with the commands that start the servers in its comments."""
        lines = [f"# {self.alias}: quantized artifacts that passed, then the 16-bit original."]
        for each in self.pinned:
            name = f"--model-name {each.name}"
            fetch = f"{shlex.join(each.download)} && " if each.download else ""
            serve = f"quantkit serve {shlex.quote(each.location)} --with {each.runtime} {name}"
            # A folder may have a line break in its name, and what follows is no comment.
            lines.append(f"# {' '.join((fetch + serve).splitlines())}")
        return "\n".join(lines) + "\n" + yaml.safe_dump(self.config, sort_keys=False)


def gateway(
    alias: str,
    *,
    quantized: Sequence[Route],
    baseline: Route,
    api_key_variable: str | None = None,
    unproven: bool = False,
    progress: Progress | None = None,
) -> GatewayConfig:
    """Return the configuration of a LiteLLM proxy with `alias` over pinned revisions.

    Args:
        alias: the name that clients ask for; the original is `<alias>-16bit`.
        quantized: artifacts and their servers, which share the requests.
        baseline: the 16-bit original and its server: the fallback.
        api_key_variable: variable of the proxy's environment with the key of the servers.
        unproven: accept artifacts that did not pass, or of which nobody knows.
        progress: called while files are hashed.

    Raises:
        InputError: a name or an address makes no sense, a model is not there, or an artifact has no
            PASS.
    """
    if not _ALIAS.fullmatch(alias):
        raise InputError(f"alias {alias!r}: letters, digits, '.', '_' and '-' can be in it")
    if api_key_variable is not None and not _VARIABLE.fullmatch(api_key_variable):
        raise InputError(
            f"--api-key-variable {api_key_variable!r} is no name of a variable: name the variable, "
            f"not the key, which must not stand in a configuration"
        )
    if not quantized:
        raise InputError("no quantized artifact: name one with --quantized ARTIFACT=URL")
    for route in (*quantized, baseline):
        _check_url(route.url)
    tell = progress or silent
    artifacts = [pin_quantized(route.model, unproven=unproven, tell=tell) for route in quantized]
    original = pin_baseline(baseline.model)
    key = "none" if api_key_variable is None else f"os.environ/{api_key_variable}"
    plain = f"{alias}{BASELINE_SUFFIX}"
    models = [
        *(
            _deployment(alias, pinned, route.url, key)
            for pinned, route in zip(artifacts, quantized, strict=True)
        ),
        _deployment(plain, original, baseline.url, key),
    ]
    _tell_apart(models)
    config = {
        "model_list": models,
        "router_settings": {
            "fallbacks": [{alias: [plain]}],
            "num_retries": 0,
            "allowed_fails": 1,
            "cooldown_time": _COOLDOWN_SECONDS,
        },
        "litellm_settings": {"telemetry": False},
        "general_settings": {"master_key": f"os.environ/{MASTER_KEY}"},
    }
    return GatewayConfig(alias, config, (*artifacts, original))


def _deployment(name: str, pinned: Pinned, url: str, key: str) -> dict[str, Any]:
    return {
        "model_name": name,
        "litellm_params": {
            "model": f"openai/{pinned.name}",
            "api_base": url.rstrip("/"),
            "api_key": key,
        },
        "model_info": {
            "id": pinned.name,
            "revision": pinned.revision,
            "verdict": pinned.verdict or "baseline",
        },
    }


def _tell_apart(models: Sequence[dict[str, Any]]) -> None:
    """Number the ids of servers of one artifact: LiteLLM leaves out a server by its id."""
    met: Counter[str] = Counter()
    for model in models:
        name = model["model_info"]["id"]
        met[name] += 1
        if met[name] > 1:
            model["model_info"]["id"] = f"{name}-{met[name]}"


def _check_url(url: str) -> None:
    """Refuse what is no address of a server, and addresses with secrets in them.

    Raises:
        InputError: it is one of these.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (raises where it is none)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{_without_user(url)!r} is no address: http://HOST:PORT/v1")
    if parts.username or parts.password or parts.query:
        raise InputError(
            f"{_without_user(url)!r}: keys do not go into an address; name a variable with "
            f"--api-key-variable"
        )


def _without_user(url: str) -> str:
    """Drop what may be a secret from an address that is shown."""
    return re.sub(r"//[^/@]*@", "//...@", url).partition("?")[0]
