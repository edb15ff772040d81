"""A chat template as its parts, where it is no more than text before and after each message.

Ollama's templates are Go's, so a Jinja template cannot be handed over; it is taken apart instead.
It is rendered (in transformers' sandbox) with messages that are told apart from the template's own
text, the parts are read off, and the parts put together have to give what the template gives for
several other conversations. A template that does more (tools aside, which are not looked at) is not
taken apart at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Message = dict[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""Conversation and whether the answer is begun -> text; ValueError where the template refuses."""


@dataclass(frozen=True)
class ChatStyle:
    """Text around the messages of a conversation."""

    start: str
    """Before the first message of a conversation without a system message."""
    user: tuple[str, str]
    """Before and after a message of the user."""
    assistant: tuple[str, str]
    answer: str
    """Begins the answer."""
    system: tuple[str, str] | None
    """Around a system message, which is the first; None where the template refuses it."""

    def render(self, conversation: Sequence[Message], answer: bool) -> str:
        """Return the text of a conversation, as the template is expected to give it."""
        around = {"user": self.user, "assistant": self.assistant, "system": self.system}
        text = "" if conversation[0]["role"] == "system" else self.start
        for message in conversation:
            before, after = around[message["role"]] or ("", "")
            text += before + message["content"] + after
        return text + (self.answer if answer else "")


_SYSTEM, _FIRST, _REPLY, _SECOND = "qkSys0q", "qkAsk1q", "qkSay2q", "qkAsk3q"


def read_chat_style(render: Render) -> ChatStyle | None:
    """Return the parts of a template; None where it is not made of parts alone."""
    try:
        style = _read_parts(render)
        conversations = [_talk("u"), _talk("ua"), _talk("uau"), _talk("uauau")]
        if style.system is not None:
            conversations += [_talk("su"), _talk("suau")]
        for conversation in conversations:
            for answer in (False, True):
                if style.render(conversation, answer) != render(conversation, answer):
                    return None
    # One that refuses plain conversations has no such parts either.
    except ValueError:
        return None
    return style


def _read_parts(render: Render) -> ChatStyle:
    first, reply, second = (_message("user", _FIRST), _message("assistant", _REPLY), _SECOND)
    whole = render([first, reply, _message("user", second)], True)
    head, rest = _cut(whole, _FIRST)
    to_reply, rest = _cut(rest, _REPLY)
    to_second, tail = _cut(rest, _SECOND)
    after_user = _cut(render([first], False), _FIRST)[1]
    after_reply = _cut(render([first, reply], False), _REPLY)[1]
    before_user = _less(to_second, after_reply)
    if not head.endswith(before_user):
        raise ValueError("the first message of the user is written in another way")
    return ChatStyle(
        start=head.removesuffix(before_user),
        user=(before_user, after_user),
        assistant=(_less(to_reply, after_user), after_reply),
        answer=_less(tail, after_user),
        system=_read_system(render, first, before_user),
    )


def _read_system(render: Render, first: Message, before_user: str) -> tuple[str, str] | None:
    try:
        text = render([_message("system", _SYSTEM), first], False)
        before, rest = _cut(text, _SYSTEM)
        between = _cut(rest, _FIRST)[0]
    # Gemma's template raises, others leave the message out.
    except ValueError:
        return None
    return (before, between.removesuffix(before_user)) if between.endswith(before_user) else None


def _cut(text: str, at: str) -> tuple[str, str]:
    before, found, after = text.partition(at)
    if not found:
        raise ValueError("a message is missing")
    return before, after


def _less(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError("the end of a message depends on what follows")
    return text.removeprefix(start)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _talk(roles: str) -> list[Message]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [
        _message(names[role], f"{place}. A line of 'text'.\n\nAnd <b>more</b> {role}")
        for place, role in enumerate(roles)
    ]
