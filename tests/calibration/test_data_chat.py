"""Windows of chats, rendered by the model's own template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from quantkit.calibration.chat import encode_chat
from quantkit.errors import CalibrationError

Chat = list[dict[str, str]]

MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")

# As Qwen 3's: thinking is shown in the last turn and dropped from the earlier ones.
THINKING = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat(*turns: str) -> Chat:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


CHATS = [
    chat("ba ce di", "fo gu ha je"),
    [{"role": "system", "content": "lo"}, *chat("mu na", "pe qui", "ro", "su ta ve")],
    chat("wi", "xo yu za bre cli dro flu gra"),
]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in CHATS))
    return path


def counted_text(tokenizer: Any, ids: np.ndarray, weights: np.ndarray) -> str:
    return tokenizer.decode(ids[weights == 1])


def test_chats_are_rendered_by_the_template_with_one_bos(
    chats: Path, tokenizer: Any, load: Any
) -> None:
    """The template writes BOS and the tokenizer would too: it stands there once, with a note."""
    stream: list[int] = []
    for messages in CHATS:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text.startswith("<|begin|>")
        stream += tokenizer(text, add_special_tokens=False).input_ids

    got = load(chats, samples=2, order="sequential")

    assert got.ids[0].tolist() == stream[:16]
    assert got.ids[1, 0] == 0
    assert got.ids[1, 1:].tolist() == stream[16:31]
    assert got.notes[0] == (
        "chats.jsonl: the chat template and the tokenizer both begin with <|begin|>: written "
        "once, by the template"
    )


def test_a_template_that_writes_bos_twice_is_mended(chats: Path, tokenizer: Any, load: Any) -> None:
    """Two BOS at a row's start become one, and the note says in how many rows."""
    once = load(chats, samples=4, sequence_length=24, order="sequential")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template

    twice = load(chats, samples=4, sequence_length=24, order="sequential")

    assert twice.sha256 == once.sha256
    assert any("rows that would begin with <|begin|> twice: 3" in note for note in twice.notes)


def test_a_template_without_bos_gives_rows_without_bos(
    chats: Path, tokenizer: Any, load: Any
) -> None:
    """What a server would send is what is calibrated on."""
    tokenizer.chat_template = THINKING

    got = load(chats, samples=2, order="sequential")

    text = tokenizer.apply_chat_template(CHATS[0], tokenize=False)
    assert got.ids[0].tolist() == tokenizer(text, add_special_tokens=False).input_ids[:16]
    assert not (got.ids == 0).any()


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked", "compared"])
def test_only_what_the_assistant_wrote_counts(tokenizer: Any, template: str) -> None:
    """Both ways of finding the turns give their texts with the end of turn."""
    tokenizer.chat_template = template

    row = encode_chat(tokenizer, CHATS[1], "here", assistant_only=True)

    counted = counted_text(tokenizer, row.ids, row.weights).replace("\n", "")
    assert counted == "pe qui<|end|>su ta ve<|end|>"


def test_both_ways_agree_on_the_ids(tokenizer: Any) -> None:
    """The mask never changes what is read."""
    rows = []
    for template, assistant_only in ((MARKED, True), (UNMARKED, True), (MARKED, False)):
        tokenizer.chat_template = template
        rows.append(encode_chat(tokenizer, CHATS[1], "here", assistant_only))

    assert rows[0].ids.tolist() == rows[1].ids.tolist() == rows[2].ids.tolist()
    assert (rows[2].weights == 1).all()


def test_turns_are_found_where_the_template_drops_earlier_thinking(tokenizer: Any) -> None:
    """The rendering of the first turns is no prefix of the whole; the turns are found anyway."""
    tokenizer.chat_template = THINKING

    row = encode_chat(tokenizer, CHATS[1], "here", assistant_only=True)

    counted = counted_text(tokenizer, row.ids, row.weights)
    assert counted == "pe qui<|end|>\n<think></think>su ta ve<|end|>\n"


def test_a_turn_that_cannot_be_found_is_an_error(tokenizer: Any) -> None:
    """A template that rewrites what was said is not guessed at."""
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    )

    with pytest.raises(CalibrationError, match=r"here: cannot tell which tokens of message 2"):
        encode_chat(tokenizer, chat("a", "b", "c", "d"), "here", assistant_only=True)


def test_assistant_only_windows_say_how_turns_were_found(
    chats: Path, tokenizer: Any, load: Any
) -> None:
    """The notes name the way and the share; a BOS in front of a window does not count."""
    for template, how in ((MARKED, "marked by {% generation %}"), (UNMARKED, "found by comparing")):
        tokenizer.chat_template = template

        got = load(chats, samples=3, order="sequential", assistant_only=True)

        assert set(np.unique(got.weights)) == {0, 1}
        assert (got.weights[got.ids == 0] == 0).all()
        assert any(how in note for note in got.notes)
        assert any(f"{got.weights.mean():.1%} of the tokens" in note for note in got.notes)


def test_the_hash_tells_weights_apart(chats: Path, load: Any) -> None:
    """Same ids with other weights are another calibration."""
    every = load(chats, order="sequential")
    assistant = load(chats, order="sequential", assistant_only=True)

    assert every.ids.tolist() == assistant.ids.tolist()
    assert every.sha256 != assistant.sha256


def test_chats_without_an_assistant_are_refused_for_assistant_only(
    tmp_path: Path, load: Any
) -> None:
    """Weights of nothing but zeros would calibrate on nothing."""
    path = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "ba ce " * 20}]
    path.write_text(json.dumps({"messages": messages}))

    with pytest.raises(CalibrationError, match="the assistant wrote none of the tokens"):
        load(path, assistant_only=True)


def test_chats_without_a_template_are_refused(chats: Path, tokenizer: Any, load: Any) -> None:
    """The row is named, and both ways out."""
    tokenizer.chat_template = None

    with pytest.raises(
        CalibrationError, match=r"chats\.jsonl:1: .* chat_template\.jinja"
    ) as caught:
        load(chats, order="sequential")
    assert "use rows with text" in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for m in messages",
        "{{ messages[7]['content'] + 'x' }}",
        "{{ 'a' + 1 }}",
        "{{ messages.nothing.at_all }}",
        "{{ 1 // 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_a_template_that_fails_names_the_row(
    chats: Path, tokenizer: Any, load: Any, template: str
) -> None:
    """A template is a program from elsewhere: its mistakes, and the sandbox, end in one line."""
    tokenizer.chat_template = template

    with pytest.raises(CalibrationError, match=r"chats\.jsonl:1: the chat template refuses") as e:
        load(chats, order="sequential")
    assert "\n" not in str(e.value)


def test_a_template_that_writes_the_date_is_noted(chats: Path, tokenizer: Any, load: Any) -> None:
    """A recipe that gives other tokens tomorrow says so today."""
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + MARKED

    assert any("today's date" in note for note in load(chats).notes)


def test_assistant_only_is_refused_for_rows_of_text(tmp_path: Path, load: Any) -> None:
    """A text has no roles."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')

    with pytest.raises(
        CalibrationError, match=r"rows\.jsonl:1: assistant_only needs rows with 'me"
    ):
        load(path, assistant_only=True)


def test_rows_with_text_and_messages_count_as_text_with_a_note(tmp_path: Path, load: Any) -> None:
    """The text column is what the recipe names; assistant_only asks for the chat instead."""
    paths = [tmp_path / name for name in ("both.jsonl", "text.jsonl", "chat.jsonl")]
    text, messages = "lo mu na " * 20, chat("ba ce " * 20, "di " * 20)
    for path, row in zip(
        paths,
        ({"text": text, "messages": messages}, {"text": text}, {"messages": messages}),
        strict=True,
    ):
        path.write_text(json.dumps(row))

    both = load(paths[0])

    assert both.sha256 == load(paths[1]).sha256
    assert any(
        "rows with both a text and 'messages': 1; the text was used" in n for n in both.notes
    )
    assert load(paths[0], text_column="messages").sha256 == load(paths[2]).sha256
    chats = [load(path, assistant_only=True).sha256 for path in (paths[0], paths[2])]
    assert chats[0] == chats[1]


def test_rows_of_text_and_rows_of_messages_may_be_mixed(
    tmp_path: Path, tokenizer: Any, load: Any
) -> None:
    """Each row is read as what it is, also where parquet fills the other column with null."""
    rows: Sequence[dict[str, Any]] = [
        {"text": "lo mu na " * 9, "messages": None},
        {"text": None, "messages": CHATS[0]},
    ]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pa.Table.from_pylist(list(rows)), tmp_path / "mixed.parquet")

    stream = tokenizer(rows[0]["text"]).input_ids
    stream += tokenizer.apply_chat_template(CHATS[0], return_dict=False)
    length = len(stream)

    for name in ("mixed.jsonl", "mixed.parquet"):
        got = load(tmp_path / name, samples=1, sequence_length=length, order="sequential")
        assert got.ids.tolist() == [stream]
