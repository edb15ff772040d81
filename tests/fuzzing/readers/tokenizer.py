"""Tokenizers: their JSON files, as jobs and GGUF files take them."""

from __future__ import annotations

import random
from pathlib import Path

from quantkit.calibration.chat import encode_chat
from quantkit.calibration.tokenizer import encode, find_bos, load_tokenizer
from quantkit.formats.gguf.tokenizer import read_tokenizer
from quantkit.judging.side_files import find_ends
from tests.fuzzing.corpus import copying, pico_model
from tests.fuzzing.damage import BYTES
from tests.fuzzing.reader import Reader
from tests.fuzzing.trees import damage_json

_CHAT = ({"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."})


def _read(folder: Path) -> None:
    find_ends(folder)
    tokenizer = load_tokenizer(folder)
    find_bos(tokenizer)
    encode(tokenizer, "Some text, é.", special=True, where="text")
    if tokenizer.chat_template:
        encode_chat(tokenizer, _CHAT, "chat", assistant_only=True)


def _read_for_gguf(folder: Path) -> object:
    return read_tokenizer(folder, 300)


_BOMBS = (
    *(
        "{{ 'a' * 10**11 }}",
        "{{ 9**(9**9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'a'.ljust(10**10) }}",
    ),
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(10**12) %}{% endfor %}",
    "{% set s = namespace(v='ab') %}{% for i in range(60) %}{% set s.v = s.v ~ s.v %}{% endfor %}",
    "{% set s = namespace(v=3) %}{% for i in range(99) %}{% set s.v = s.v * s.v %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('no\x1b[2J' * 999) }}",
    "{{ messages.append({'role': 'user'}) }}",
    "{{ lipsum(n=10**9) }}",
    "{{ messages | tojson(indent=10**10) }}",
    "{{ '\ud800' }}",
    "{{ ('a' * 10**7).replace('a', 'b' * 10**7) }}",
)
_WORDS = (
    *(
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "#}",
        "for",
        "if",
        "endif",
        "endfor",
        "messages",
        "(",
        ")",
        "|",
    ),
    *("loop.index0", "message", "[0]", "['role']", "+", "~", "*", "is defined", "not", "None", "'"),
    *("{% generation %}", "{% endgeneration %}", "namespace()", "strftime_now('%Y')", "%", "-%}"),
)


def _set_bomb(draw: random.Random, content: bytes) -> bytes:
    """Put in what loops, grows, or looks for what a template must not see."""
    return _put_in(draw, content, draw.choice(_BOMBS))


def _add_words(draw: random.Random, content: bytes) -> bytes:
    """Put in words of the language."""
    words = " ".join(draw.choices(_WORDS, k=draw.randint(1, 6)))
    return _put_in(draw, content, words)


def _put_in(draw: random.Random, content: bytes, words: str) -> bytes:
    at = draw.choice((0, len(content), draw.randint(0, len(content))))
    return content[:at] + words.encode("utf-8", "surrogatepass") + content[at:]


_JSON = (*[damage_json] * 20, *BYTES)
_FILES = {
    "tokenizer.json": _JSON,
    "tokenizer_config.json": _JSON,
    "generation_config.json": _JSON,
    "special_tokens_map.json": _JSON,
}

_STARTS = frozenset({"os.fork"})
"""Templates are applied in a process of their own."""

READERS = (
    Reader(
        name="tokenizer", build=copying(pico=pico_model), damages=_FILES, read=_read, starts=_STARTS
    ),
    Reader(
        name="tokenizer-gguf",
        build=copying(pico=pico_model),
        damages=_FILES,
        read=_read_for_gguf,
    ),
    Reader(
        name="chat-template",
        build=copying(pico=pico_model),
        damages={"chat_template.jinja": (_set_bomb, *[_add_words] * 40, *BYTES, *BYTES)},
        read=_read,
        starts=_STARTS,
    ),
)
