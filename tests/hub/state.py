"""What the server knows: tokens, repositories, and who may do what."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs

from tests.hub.answers import refuse
from tests.hub.repos import Repo


@dataclass(frozen=True)
class Token:
    """Whose a token is, and what it may do; `none` is a fine-grained one without any right."""

    user: str
    role: Literal["read", "write", "none"]
    organizations: tuple[str, ...] = ()
    """Organizations in which the user may write."""

    def writes(self, namespace: str) -> bool:
        """Whether the token may change repositories of a user or an organization."""
        return self.role == "write" and namespace in (self.user, *self.organizations)

    def sees(self, namespace: str) -> bool:
        """Whether the token may read private repositories of a user or an organization."""
        return self.role != "none" and namespace in (self.user, *self.organizations)


@dataclass(frozen=True)
class Call:
    """One request, parsed: `segments` are the decoded pieces of its path."""

    method: str
    segments: tuple[str, ...]
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    def asks(self, name: str) -> bool:
        """Whether a query parameter is switched on."""
        return self.query.get(name, ["0"])[-1].lower() in ("1", "true")

    def form(self) -> dict[str, list[str]]:
        """The body as a web form."""
        return parse_qs(self.body.decode(), keep_blank_values=True)


@dataclass
class Upload:
    """A large file that is sent in parts."""

    repo: Repo
    sha256: str
    parts: dict[int, bytes] = field(default_factory=dict)


@dataclass
class HubState:
    """Everything that the server keeps; `lock` is held while a request is answered."""

    tokens: dict[str, Token]
    repos: dict[str, Repo] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    multipart_above: int = 64 * 1024**2
    part_bytes: int = 16 * 1024**2
    page_entries: int = 1000
    endpoint: str = ""
    storage_endpoint: str = ""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def account(self, call: Call) -> Token | None:
        """Return the token's account, None for a request without one."""
        kind, _, secret = call.headers.get("authorization", "").partition(" ")
        if not kind:
            return None
        if kind != "Bearer" or secret not in self.tokens:
            raise refuse(401, "Invalid credentials in Authorization header")
        return self.tokens[secret]

    def visible(self, call: Call, id: str) -> Repo:
        """Return the repository whose name and files' names the caller may see."""
        account, repo = self.account(call), self.repos.get(id)
        hidden = repo is None or (
            repo.private and not (account is not None and account.sees(repo.owner))
        )
        if not hidden and repo is not None:
            return repo
        if account is None:
            raise refuse(401, "Invalid username or password.", code="RepoNotFound")
        raise refuse(404, "Repository not found", code="RepoNotFound")

    def readable(self, call: Call, id: str) -> Repo:
        """Return the repository whose contents the caller may read."""
        account, repo = self.account(call), self.visible(call, id)
        if not repo.gated or (account is not None and account.sees(repo.owner)):
            return repo
        if account is None:
            message = f"Access to model {id} is restricted. You must be authenticated to access it."
            raise refuse(401, message, code="GatedRepo")
        if account.user not in repo.accepted:
            message = (
                f"Access to model {id} is restricted and you are not in the authorized list. "
                f"Visit {self.endpoint}/{id} to ask for access."
            )
            raise refuse(403, message, code="GatedRepo")
        return repo

    def writable(self, call: Call, id: str, *, by_pull_request: bool = False) -> Repo:
        """Return the repository that the caller may change, or propose a change to."""
        account, repo = self.account(call), self.visible(call, id)
        if account is None:
            raise refuse(401, "Invalid username or password.")
        if account.role != "write":
            raise refuse(403, "Forbidden: you must use a write token to upload to a repository.")
        if account.writes(repo.owner) or by_pull_request:
            return repo
        message = (
            "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request. "
            f"If you are a member of {repo.owner}, ask an admin for the right to write."
        )
        raise refuse(403, message)

    def author(self, call: Call) -> str:
        """Return the name of the caller, who has been admitted."""
        account = self.account(call)
        return account.user if account else "anonymous"


def describe_account(token: Token) -> dict[str, Any]:
    """What /api/whoami-v2 says of a token."""
    granted: dict[str, Any] = {"displayName": "tests", "role": token.role}
    if token.role == "none":
        scope = {"canReadGatedRepos": False, "global": [], "scoped": []}
        granted = {"displayName": "tests", "role": "fineGrained", "fineGrained": scope}
    return {
        "type": "user",
        "id": f"id-of-{token.user}",
        "name": token.user,
        "fullname": token.user.title(),
        "isPro": False,
        "orgs": [
            {"type": "org", "name": name, "fullname": name, "roleInOrg": "write"}
            for name in token.organizations
        ],
        "auth": {"type": "access_token", "accessToken": granted},
    }
