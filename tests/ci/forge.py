"""The other side of a comment: GitHub's and GitLab's HTTP API, as far as the steps ask it."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

OURS = "github-actions[bot]"


@dataclass(frozen=True)
class ForgeRequest:
    """One request; `token` is what authorized it, as it came."""

    method: str
    path: str
    token: str
    document: Any


@dataclass
class Forge:
    """Comments of one pull request, or notes of one merge request.

    `refusal` is the status that changes are answered with, where they are refused.
    """

    people: str = "user"
    """Key of a comment's writer: `user` on GitHub, `author` on GitLab."""
    comments: list[dict[str, Any]] = field(default_factory=list)
    requests: list[ForgeRequest] = field(default_factory=list)
    refusal: int | None = None
    login: str = OURS
    """The account behind the token."""

    def __enter__(self) -> Forge:
        forge = self

        class Handler(_Handler):
            owner = forge

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Its address, without a slash at the end."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, body: str, login: str) -> int:
        """Put a comment of somebody's there and return its number."""
        number = 1000 + len(self.comments)
        writer = {"login": login} if self.people == "user" else {"username": login}
        self.comments.append({"id": number, "body": body, self.people: writer})
        return number

    def bodies(self, login: str = OURS) -> list[str]:
        """The texts of an account's comments."""
        key = "login" if self.people == "user" else "username"
        return [each["body"] for each in self.comments if each[self.people][key] == login]

    def answer(self, request: ForgeRequest) -> tuple[int, Any]:
        """Return the status and the document for a request."""
        split = urlsplit(request.path)
        if request.method == "GET" and split.path.endswith("/user"):
            return 200, {"username": self.login}
        if request.method == "GET":
            query = parse_qs(split.query)
            start = (int(query["page"][0]) - 1) * int(query["per_page"][0])
            return 200, self.comments[start : start + int(query["per_page"][0])]
        if self.refusal is not None:
            return self.refusal, {"message": "Resource not accessible by integration"}
        if request.method == "POST":
            self.add(request.document["body"], self.login)
            return 201, self.comments[-1]
        number = int(re.search(r"\d+$", split.path)[0])  # type: ignore[index]
        [comment] = [each for each in self.comments if each["id"] == number]
        comment["body"] = request.document["body"]
        return 200, comment


class _Handler(BaseHTTPRequestHandler):
    owner: Forge

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization") or self.headers.get("PRIVATE-TOKEN") or ""
        request = ForgeRequest(self.command, self.path, token, json.loads(body) if body else None)
        self.owner.requests.append(request)
        status, document = self.owner.answer(request)
        text = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = do_PUT = _handle  # noqa: N815
