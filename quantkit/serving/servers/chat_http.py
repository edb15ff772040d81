"""OpenAI-style chat completions over HTTP, with the standard library alone.

Part of onnxruntime_server.py, which runs under the interpreter that has the runtime.

    GET  /health                {"status": "ok"}
    GET  /v1/models             the one model
    POST /v1/chat/completions   whole, or as server-sent events with "stream": true

A page in a browser must not reach what listens on this machine alone: a body has to be announced as
JSON, which browsers let no other site's page do unasked, and a server of the loopback address
answers to its own names only, not to one that a stranger's DNS has pointed there.

Requests and answers have the fields of OpenAI's API reference. What cannot be done is refused with
status 400 and the name of the parameter, never ignored: a caller that asks for tools must not get
an answer that has not seen them. Errors are JSON: {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from chat_requests import (  # type: ignore[import-not-found]
    ChatRequest,
    Refusal,
    read_request,
)

MAX_BODY = 16 * 1024 * 1024
"""Bytes of a request; a longer one is refused before it is read."""
IDLE_SECONDS = 120
"""How long a connection may say nothing."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""The names of this machine to itself."""


@dataclass
class Answer:
    """An answer that is being made: its text piece by piece, and then how it ended."""

    prompt_tokens: int
    pieces: Iterator[str]
    completion_tokens: int = 0
    finish_reason: str = "stop"
    """`length` where the limit of tokens came first; known when `pieces` has ended."""
    model: str = ""
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))


Begin = Callable[[ChatRequest], Answer]
"""Starts an answer; raises `Refusal`."""


@dataclass
class Served:
    """The one model that is served."""

    model: str
    """Its name in requests."""
    turns: threading.BoundedSemaphore
    """As many answers as are made at a time."""
    begin: Begin | None = None
    """None: it is still being loaded."""
    hosts: frozenset[str] | None = None
    """The names by which it may be called; None: by any."""
    created: int = field(default_factory=lambda: int(time.time()))


def listen(host: str, port: int, served: Served) -> ThreadingHTTPServer:
    """Return a server that listens; it answers with what `served` holds by then.

    Raises:
        OSError: it cannot listen there.
    """
    served.hosts = LOOPBACK if host in LOOPBACK else None
    return ThreadingHTTPServer((host, port), partial(ChatHandler, served))


class ChatHandler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "quantkit"
    sys_version = ""
    timeout = IDLE_SECONDS

    def __init__(self, served: Served, *arguments: Any) -> None:
        self.served = served
        self.is_streaming = False
        # It answers all requests of the connection.
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Say that the model is there, or which one."""
        if not self._is_called_by_its_name():
            return
        path = self.path.partition("?")[0].rstrip("/")
        if path in ("/health", "/v1/health"):
            ready = self.served.begin is not None
            self._send(200 if ready else 503, {"status": "ok" if ready else "loading"})
        elif path == "/v1/models":
            self._send(200, {"object": "list", "data": [self._model()]})
        elif path == f"/v1/models/{self.served.model}":
            self._send(200, self._model())
        else:
            self._refuse(self._not_found(path))

    def do_POST(self) -> None:
        """Answer a conversation."""
        if not self._is_called_by_its_name():
            return
        try:
            body = self._read_body()
            path = self.path.partition("?")[0].rstrip("/")
            if path != "/v1/chat/completions":
                raise self._not_found(path)
            request = read_request(body, self.served.model)
            if self.served.begin is None:
                raise Refusal(503, "the model is still being loaded")
            with self.served.turns:
                self._answer(self.served.begin(request), request)
        except Refusal as refusal:
            self._refuse(refusal)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            # The caller has gone: what was not generated yet never will be.
            self.close_connection = True
        except Exception as error:
            # The server's own log gets the whole of it.
            self.close_connection = True
            failure = Refusal(500, f"{type(error).__name__}: {error}")
            if self.is_streaming:
                self._event(failure.document)
            else:
                self._refuse(failure)
            raise

    def _answer(self, answer: Answer, request: ChatRequest) -> None:
        answer.model = self.served.model
        pieces = cut_at_stops(answer, request.stops)
        if request.stream:
            self._stream(answer, pieces, request.include_usage)
            return
        text = "".join(pieces)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }
        document = _head(answer, "chat.completion")
        self._send(200, {**document, "choices": [choice], "usage": _usage(answer)})

    def _stream(self, answer: Answer, pieces: Iterator[str], include_usage: bool) -> None:
        """Send the pieces as they come; an error behind the first is an event of its own."""
        head = _head(answer, "chat.completion.chunk")
        if include_usage:
            head["usage"] = None
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        # Without a length, the end of the connection is the end of the answer.
        self.send_header("Connection", "close")
        self.end_headers()
        self.is_streaming = True
        self._event({**head, "choices": [_delta({"role": "assistant", "content": ""})]})
        for piece in pieces:
            self._event({**head, "choices": [_delta({"content": piece})]})
        self._event({**head, "choices": [_delta({}, answer.finish_reason)]})
        if include_usage:
            self._event({**head, "choices": [], "usage": _usage(answer)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, document: Mapping[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(document).encode() + b"\n\n")
        self.wfile.flush()

    def _is_called_by_its_name(self) -> bool:
        """Refuse a request to another host, as a page sends it whose name was pointed here."""
        hosts = self.served.hosts
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        except ValueError:
            host = None
        if hosts is None or host in hosts:
            return True
        self.close_connection = True
        self._refuse(Refusal(403, "this server listens on its own machine, as localhost, alone"))
        return False

    def _read_body(self) -> Any:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            # What follows cannot be told from the next request.
            self.close_connection = True
            raise Refusal(411, "the request has no Content-Length")
        if int(length) > MAX_BODY:
            self.close_connection = True
            raise Refusal(413, f"the request is longer than {MAX_BODY} bytes")
        kind = self.headers.get_content_type()
        body = self.rfile.read(int(length))
        if kind != "application/json":
            raise Refusal(415, f"the request is {kind[:80]}: send Content-Type: application/json")
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise Refusal(400, "the request is not JSON") from None

    def _model(self) -> dict[str, Any]:
        made = self.served.created
        return {
            "id": self.served.model,
            "object": "model",
            "created": made,
            "owned_by": "quantkit",
        }

    def _not_found(self, path: str) -> Refusal:
        known = "GET /health, GET /v1/models, POST /v1/chat/completions"
        return Refusal(404, f"there is no {self.command} {path[:80]} here (there is: {known})")

    def _refuse(self, refusal: Refusal) -> None:
        self._send(refusal.status, refusal.document)

    def _send(self, status: int, document: Mapping[str, Any]) -> None:
        body = json.dumps(document).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what the parser of HTTP refuses, in JSON too."""
        self.close_connection = True
        self._refuse(Refusal(code, message or explain or "the request is malformed"))

    def log_message(self, format: str, *arguments: Any) -> None:
        """One line a request; no contents."""
        line = "".join(c if c.isprintable() else "?" for c in format % arguments)
        sys.stderr.write(f"{self.address_string()} {line}\n")


def cut_at_stops(answer: Answer, stops: tuple[str, ...]) -> Iterator[str]:
    """Yield the text up to the first of `stops`; what may be the beginning of one is held back."""
    held = ""
    for piece in answer.pieces:
        held += piece
        places = [place for stop in stops if (place := held.find(stop)) >= 0]
        if places:
            answer.finish_reason = "stop"
            held = held[: min(places)]
            break
        kept = max((_overlap(held, stop) for stop in stops), default=0)
        ready, held = held[: len(held) - kept], held[len(held) - kept :]
        if ready:
            yield ready
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """How many of the last letters of `text` are the first of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": answer.created, "model": answer.model}


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def _delta(delta: Mapping[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
