"""The HTTP side: two local ports, for the Hub and for its object storage, and a log of requests."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.hub.answers import Answer, Refused
from tests.hub.api import answer_hub
from tests.hub.faults import Fault, FaultPlan
from tests.hub.lfs import answer_storage
from tests.hub.repos import Repo, make_repo
from tests.hub.state import Call, HubState, Token

WRITE_TOKEN = "hf_tokenOfAliceThatMayWrite"
READ_TOKEN = "hf_tokenOfAliceThatMayRead"
IDLE_TOKEN = "hf_tokenOfAliceWithoutAnyRight"
OTHER_TOKEN = "hf_tokenOfBobThatMayWrite"
UNKNOWN_TOKEN = "hf_tokenOfNobodyWasRevoked"

TOKENS: Mapping[str, Token] = {
    WRITE_TOKEN: Token("alice", "write", ("acme",)),
    READ_TOKEN: Token("alice", "read", ("acme",)),
    IDLE_TOKEN: Token("alice", "none"),
    OTHER_TOKEN: Token("bob", "write"),
}
"""What every server knows, unless it is given others."""

_CHUNK = 64 * 1024


@dataclass
class LoggedRequest:
    """One request as it came; headers are kept whole, tokens too, so that tests can look."""

    server: str
    """`hub` or `storage`."""
    method: str
    path: str
    """With its query."""
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes = b""
    """As far as it came; contents of large files are left out (`received` counts them)."""
    received: int = 0
    status: int | None = None
    """None where the connection was cut before an answer."""

    @property
    def line(self) -> str:
        """What faults and searches match against."""
        return f"{self.method} {self.path}"


class HubServer:
    """A Hugging Face Hub of one's own, while the context lasts; all of it is in memory.

    `multipart_above` and `part_bytes` say from which size large files are sent in parts, and how
    large a part is.
    """

    def __init__(
        self,
        *,
        tokens: Mapping[str, Token] = TOKENS,
        multipart_above: int = 64 * 1024**2,
        part_bytes: int = 16 * 1024**2,
        page_entries: int = 1000,
    ) -> None:
        self.state = HubState(
            dict(tokens),
            multipart_above=multipart_above,
            part_bytes=part_bytes,
            page_entries=page_entries,
        )
        self.requests: list[LoggedRequest] = []
        self._faults = FaultPlan()
        self._servers = [_listen(self, name) for name in ("hub", "storage")]
        addresses = [f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers]
        self.state.endpoint, self.state.storage_endpoint = addresses

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        """The address for HF_ENDPOINT."""
        return self.state.endpoint

    @property
    def storage_endpoint(self) -> str:
        """Where contents of large files go and come from; no token belongs there."""
        return self.state.storage_endpoint

    @property
    def tokens(self) -> dict[str, Token]:
        """Whose each token is; may be changed at any time."""
        return self.state.tokens

    @property
    def repos(self) -> dict[str, Repo]:
        """All repositories by id."""
        return self.state.repos

    def add_repo(
        self,
        id: str,
        files: Mapping[str, bytes] = {},
        *,
        private: bool = False,
        gated: bool = False,
    ) -> Repo:
        """Put a repository there; more of its attributes can be set afterwards."""
        owner = id.partition("/")[0]
        repo = make_repo(id, files, author=owner, private=private, gated=gated)
        with self.state.lock:
            self.repos[id] = repo
        return repo

    def files(self, id: str, revision: str = "main") -> dict[str, bytes]:
        """Return what is visible at a revision, .gitattributes left out; empty for no repo."""
        with self.state.lock:
            if id not in self.repos:
                return {}
            found = self.repos[id].find(revision).files
            return {p: file.content for p, file in found.items() if p != ".gitattributes"}

    def fail(self, fault: Fault) -> None:
        """Plan a fault; requests are counted from now."""
        self._faults.add(fault)

    def recover(self) -> None:
        """Forget all faults that are still planned."""
        self._faults.clear()

    def find_requests(self, match: str) -> list[LoggedRequest]:
        """Return the requests so far whose "METHOD /path?query" has `match`, an expression."""
        return [each for each in list(self.requests) if re.search(match, each.line)]

    def environment(self, home: Path, token: str | None = WRITE_TOKEN) -> dict[str, str]:
        """Return what a process needs to talk to this Hub; `home` is its folder for HF_HOME.

        Xet is switched off: a client that has hf_xet uses it without asking the server.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def connect(
        self, patch: pytest.MonkeyPatch, home: Path, token: str | None = WRITE_TOKEN
    ) -> None:
        """Let huggingface_hub in this process talk to this Hub, as `environment` would.

        The client reads most of its variables once, on import; so its constants are set as well.
        """
        from huggingface_hub import constants, hf_api

        for name, value in self.environment(home, token).items():
            patch.setenv(name, value)
        patch.setattr(constants, "ENDPOINT", self.endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", _url_template(self.endpoint))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        patch.setattr(constants, "HF_HOME", str(home))
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
        patch.setattr(hf_api.api, "endpoint", self.endpoint)

    def answer(self, logged: LoggedRequest, body: bytes) -> Answer:
        """Answer one request whose body has come whole."""
        split = urlsplit(logged.path)
        segments = tuple(unquote(piece) for piece in split.path.strip("/").split("/"))
        query = parse_qs(split.query, keep_blank_values=True)
        call = Call(logged.method, segments, query, logged.headers, body)
        answering = answer_hub if logged.server == "hub" else answer_storage
        with self.state.lock:
            try:
                return answering(self.state, call)
            except Refused as refused:
                return refused.answer

    def find_fault(self, logged: LoggedRequest) -> Fault | None:
        """Log a request that begins, and return what goes wrong with it."""
        with self.state.lock:
            self.requests.append(logged)
        return self._faults.take(logged.line)


def _url_template(endpoint: str) -> str:
    return endpoint + "/{repo_id}/resolve/{revision}/{filename}"


def _listen(hub: HubServer, name: str) -> ThreadingHTTPServer:
    class Handler(_Handler):
        owner = hub
        server_name = name

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    return server


class _Cut(Exception):
    """The connection is to be cut now."""


@dataclass
class _Body:
    """A request's body, which comes piece by piece."""

    handler: _Handler
    kept: bytearray = field(default_factory=bytearray)

    def read(self, limit: int | None) -> bytes:
        """Return all of it. Raises _Cut once `limit` bytes have come."""
        for piece in self._pieces(limit):
            self.kept += piece
            if limit is not None and len(self.kept) >= limit:
                raise _Cut
        if limit is not None:
            raise _Cut
        return bytes(self.kept)

    def _pieces(self, limit: int | None) -> Iterator[bytes]:
        stream, headers = self.handler.rfile, self.handler.headers
        step = min(_CHUNK, limit or _CHUNK)
        if headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(stream.readline().split(b";")[0], 16):
                yield stream.read(size)
                stream.readline()
            stream.readline()
            return
        left = int(headers.get("Content-Length", 0))
        while left > 0:
            piece = stream.read(min(step, left))
            if not piece:
                raise _Cut
            left -= len(piece)
            yield piece


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the fault plan have its say, and answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60
    owner: HubServer
    server_name: str

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the requests are in the server's own log."""

    def _handle(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        logged = LoggedRequest(self.server_name, self.command, self.path, headers)
        fault, body = self.owner.find_fault(logged), _Body(self)
        try:
            content = body.read(fault.cut_after if fault else None)
            answer = fault.answer if fault and fault.answer else self.owner.answer(logged, content)
            if fault and fault.lose_answer:
                raise _Cut
            logged.status = answer.status
            self._send(answer, fault.cut_answer_after if fault else None)
        except _Cut:
            self._cut()
        except OSError:
            self.close_connection = True
        finally:
            logged.received = len(body.kept)
            logged.body = bytes(body.kept) if self.server_name == "hub" else b""

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

    def _send(self, answer: Answer, limit: int | None) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if limit is not None and limit < len(answer.body):
            self.wfile.write(answer.body[:limit])
            raise _Cut
        self.wfile.write(answer.body)

    def _cut(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The other side was faster.
            return
