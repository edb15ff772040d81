"""The protocol of quantkit's own server, over real connections."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port

ECHO = Path(__file__).with_name("echo_server.py")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Where an echo server listens."""
    number = free_port()
    with subprocess.Popen(
        [sys.executable, str(ECHO), str(number), "echo", "ok"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            _await(number)
            yield number
        finally:
            process.kill()


def _await(port: int) -> None:
    for _ in range(200):
        try:
            if ask(port, "GET", "/health")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError("the echo server does not listen")


def ask(port: int, method: str, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
    """Send a request and return status and document; bytes are sent as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, sent, {"Content-Type": "application/json", **named})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text)


def chat(port: int, content: object, **more: object) -> tuple[int, Any]:
    """Ask for a chat completion."""
    body = {"model": "echo", "messages": [{"role": "user", "content": content}], **more}
    return ask(port, "POST", "/v1/chat/completions", body)


def stream(port: int, content: str, **more: object) -> list[Any]:
    """Ask for a stream and return its events; the last one is text."""
    body = {"messages": [{"role": "user", "content": content}], "stream": True, **more}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    kind = {"Content-Type": "application/json; charset=utf-8"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), kind)
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    events = answer.read().decode().split("\n\n")
    connection.close()
    assert events.pop() == ""
    texts = [event.removeprefix("data: ") for event in events]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def test_a_completion_has_the_fields_of_openai(port: int) -> None:
    """And the tokens are counted."""
    status, document = chat(port, "one two three", temperature=0)
    assert status == 200
    assert document["object"] == "chat.completion"
    assert document["model"] == "echo"
    assert document["id"].startswith("chatcmpl-")
    (choice,) = document["choices"]
    assert choice["message"] == {"role": "assistant", "content": "one two three"}
    assert choice["finish_reason"] == "stop"
    assert document["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    _, cut = chat(port, [{"type": "text", "text": "one two"}, {"type": "text", "text": " x"}])
    assert cut["choices"][0]["message"]["content"] == "one two x"
    _, cut = chat(port, "one two three", max_completion_tokens=2)
    assert cut["choices"][0]["finish_reason"] == "length"


def test_a_stream_says_the_same_in_pieces(port: int) -> None:
    """With its usage where that is asked for."""
    events = stream(port, "one two three", stream_options={"include_usage": True})
    assert events.pop() == "[DONE]"
    usage = events.pop()
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 6)
    assert all(event["object"] == "chat.completion.chunk" for event in events)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [delta["content"] for delta in deltas[1:-1]] == ["one ", "two ", "three"]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert "usage" not in stream(port, "one")[0]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "LOCALHOST:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content_Type": "application/json;charset=UTF-8"}, 200),
    ],
)
def test_a_page_of_a_browser_is_not_answered(
    port: int, headers: dict[str, str], status: int
) -> None:
    """Neither under a name that was pointed here, nor by a form, which needs no leave."""
    message = {"messages": [{"role": "user", "content": "one"}]}
    assert ask(port, "POST", "/v1/chat/completions", message, **headers)[0] == status
    if "Host" in headers:
        assert ask(port, "GET", "/v1/models", **headers)[0] == status


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("two", "one "), (["e t", "x"], "on"), ("one", ""), (["absent"], "one two three")],
)
def test_a_text_that_stops_is_cut_before_it(port: int, stop: object, expected: str) -> None:
    """In a stream too, where its beginning may have come with the piece before."""
    _, document = chat(port, "one two three", stop=stop)
    assert document["choices"][0]["message"]["content"] == expected
    assert document["choices"][0]["finish_reason"] == "stop"
    deltas = [
        event["choices"][0]["delta"] for event in stream(port, "one two three", stop=stop)[:-1]
    ]
    assert "".join(delta.get("content", "") for delta in deltas) == expected


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "not a JSON object"),
        (b"[" * 100_000, 400, "not JSON"),
        ({"messages": []}, 400, "at least one message"),
        ({"messages": "hello"}, 400, "at least one message"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "no role of"),
        ({"messages": [{"role": "user"}]}, 400, "no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "no text"),
        ({"model": "other", "messages": []}, 404, "no model 'other'"),
        ({"messages": [{"role": "user", "content": "refuse"}]}, 400, "is refused"),
        ({"messages": [{"role": "user", "content": "fail"}]}, 500, "runtime has failed"),
    ],
)
def test_an_error_is_json(port: int, body: object, status: int, words: str) -> None:
    """In OpenAI's form."""
    found, document = ask(port, "POST", "/v1/chat/completions", body)
    assert found == status
    assert words in document["error"]["message"]
    assert document["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function"}]},
        {"n": 2},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"frequency_penalty": 0.5},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"temperature": -1},
        {"temperature": "hot"},
        {"stop": [""]},
        {"stop": ["x"] * 17},
        {"stream": "yes"},
        {"seed": -1},
        {"stream_options": 3},
    ],
)
def test_what_cannot_be_done_is_refused(port: int, more: dict[str, object]) -> None:
    """By the name of the parameter, rather than ignored."""
    status, document = chat(port, "one", **more)
    assert status == 400
    assert document["error"]["param"] == next(iter(more))
    assert chat(port, "one", n=1, tools=[], frequency_penalty=0, logprobs=False)[0] == 200


def test_the_model_and_the_unknown_are_answered(port: int) -> None:
    """Clients ask for the list of models first."""
    status, document = ask(port, "GET", "/v1/models")
    assert (status, [model["id"] for model in document["data"]]) == (200, ["echo"])
    assert ask(port, "GET", "/v1/models/echo")[1]["object"] == "model"
    for method, path in (("GET", "/x"), ("POST", "/v1/completions"), ("DELETE", "/health")):
        status, document = ask(port, method, path)
        assert status in (400, 404, 501)
        assert document["error"]["message"]


def test_too_long_a_request_is_not_read(port: int) -> None:
    """A length that is announced is enough."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", str(1 << 40))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_an_error_in_the_middle_of_a_stream_is_an_event(port: int) -> None:
    """And no end of an answer follows."""
    events = stream(port, "one break three")
    assert "failed in the middle" in events[-1]["error"]["message"]
    assert "[DONE]" not in events


def test_requests_take_turns_and_none_is_lost(port: int) -> None:
    """More of them than are answered at a time."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: chat(port, f"slow {number}"), range(8)))
    texts = [document["choices"][0]["message"]["content"] for _, document in answers]
    assert texts == [f"slow {number}" for number in range(8)]


def test_a_caller_that_leaves_does_not_stop_the_server(port: int) -> None:
    """In the middle of its stream."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    body = {"messages": [{"role": "user", "content": "slow " * 40}], "stream": True}
    kind = {"Content-Type": "application/json; charset=utf-8"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), kind)
    connection.getresponse().read(10)
    connection.close()
    assert chat(port, "still here")[0] == 200
