"""May this token write there? Asked before any work, so that hours of it are not in vain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.errors import PublishError
from quantkit.publishing.client import LOG_IN, Hub, ask

_TOKENS = "https://huggingface.co/settings/tokens"


def check_right_to_write(hub: Hub, repo: str, *, pull_request: bool = False) -> None:
    """Refuse a token that cannot change `repo`, or make it where it does not exist.

    Args:
        pull_request: whether the right to propose a change is enough.

    Raises:
        PublishError: there is no token, it is not valid, or it has no right to write.
        HubError: the Hub cannot be asked.
    """
    what = f"publish to {repo}"
    if hub.token is None:
        raise PublishError(f"could not {what}: there is no token; {LOG_IN}")
    account = ask(hub, what, repo, lambda: hub.api.whoami(hub.token))
    if _role_of(account) == "read":
        raise PublishError(
            f"could not {what}: the token may only read; take one with the right to write "
            f"({_TOKENS})"
        )
    if pull_request:
        return
    if not ask(hub, what, repo, lambda: _may_write(hub, repo)):
        _check_namespace(account, repo)


def _may_write(hub: Hub, repo: str) -> bool:
    """Whether the repository is there and the token may write to it; the client raises if not."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        hub.api.auth_check(repo, write=True)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        return False
    return True


def _check_namespace(account: Mapping[str, Any], repo: str) -> None:
    """Refuse a repository that does not exist, below a name that is not the account's."""
    owner = repo.partition("/")[0]
    groups = account.get("orgs")
    names = [account.get("name"), *(each.get("name") for each in groups or () if each)]
    if owner not in names:
        known = ", ".join(str(name) for name in names if name)
        raise PublishError(
            f"{repo} is not there, and {owner} is no account that the token may make it in "
            f"(it may in: {known}); check the name, and whose token it is (`hf auth whoami`)"
        )


def _role_of(account: Mapping[str, Any]) -> object:
    found: Any = account
    for key in ("auth", "accessToken", "role"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
