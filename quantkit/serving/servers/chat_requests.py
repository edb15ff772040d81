"""What a request for a chat completion asks for, and what of it is refused.

Part of onnxruntime_server.py; the standard library alone is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_STOPS = 16

ROLES = ("system", "developer", "user", "assistant", "tool")
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "audio": (None,),
    "modalities": (None, ["text"]),
}
"""Parameters that this server has not, and the values with which they ask for nothing."""


class Refusal(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.document = {
            "error": {"message": message, "type": kind, "param": param, "code": code or None}
        }


@dataclass(frozen=True)
class ChatRequest:
    """What a caller asks for, checked. None: the model's own default."""

    messages: list[dict[str, str]]
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    repetition_penalty: float | None
    seed: int | None
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


def read_request(body: Any, model: str) -> ChatRequest:
    """Check the body of a chat completion.

    Raises:
        Refusal: it is no such body, is for another model, or asks for what this server has not.
    """
    if not isinstance(body, dict):
        raise Refusal(400, "the request is not a JSON object")
    named = body.get("model", model)
    if named != model:
        message = f"there is no model {str(named)[:80]!r} here; the model is {model!r}"
        raise Refusal(404, message, "model", "model_not_found")
    for name, values in NEUTRAL.items():
        if body.get(name) not in values:
            raise Refusal(400, f"{name} is not supported by this server", name, "unsupported")
    limit = body.get("max_completion_tokens")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise Refusal(400, "stream_options is not an object", "stream_options")
    return ChatRequest(
        messages=_read_messages(body.get("messages")),
        max_tokens=_whole(body, "max_tokens", 1)
        if limit is None
        else _whole(body, "max_completion_tokens", 1),
        temperature=_number(body, "temperature", 0, 2),
        top_p=_number(body, "top_p", 0, 1),
        top_k=_whole(body, "top_k", 1),
        repetition_penalty=_number(body, "repetition_penalty", 0.01, 10),
        seed=_whole(body, "seed", 0),
        stops=_read_stops(body.get("stop")),
        stream=_flag(body, "stream"),
        include_usage=_flag(options or {}, "include_usage"),
    )


def _read_messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages is not a list with at least one message", "messages")
    found = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise Refusal(400, f"{where} has no role of {', '.join(ROLES)}", where)
        if message.get("tool_calls"):
            raise Refusal(400, f"{where}: tool calls are not supported by this server", where)
        # Chat templates know the older name.
        role = "system" if role == "developer" else role
        found.append({"role": role, "content": _read_content(message.get("content"), where)})
    return found


def _read_content(content: Any, where: str) -> str:
    """The text of a message, which may come in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refusal(400, f"{where} has no content", where)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise Refusal(400, f"{where} has content that is no text", where)
        texts.append(text)
    return "".join(texts)


def _read_stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    fits = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not fits or not all(isinstance(each, str) and each for each in stops):
        raise Refusal(400, f"stop is not a text or a list of up to {MAX_STOPS} texts", "stop")
    return tuple(stops)


def _whole(body: Mapping[str, Any], name: str, least: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not least <= value < 1 << 31:
        raise Refusal(400, f"{name} is not a whole number from {least} on", name)
    return value


def _number(body: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not least <= value <= most:
        raise Refusal(400, f"{name} is not a number from {least} to {most}", name)
    return float(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise Refusal(400, f"{name} is neither true nor false", name)
    return bool(value)
