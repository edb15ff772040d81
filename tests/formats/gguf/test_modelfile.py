"""Ollama's Modelfile: read back as Ollama reads it, and its templates give what Jinja's give."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment

from quantkit.errors import CheckpointError
from quantkit.formats.gguf.chat_style import ChatStyle, read_chat_style
from quantkit.formats.gguf.header import MetadataValue, Value
from quantkit.formats.gguf.modelfile import compose_modelfile, quote, write_go_template
from quantkit.formats.gguf.tokenizer import read_tokenizer
from tests.formats.gguf.trained_tokenizers import write_byte_level, write_json

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
QWEN25 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}" + CHATML
)
TEMPLATES = {
    "chatml": CHATML,
    "llama-3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "phi-3": PHI3,
    "zephyr": ZEPHYR,
    "qwen-2.5": QWEN25,
    "braces": CHATML.replace("<|im_start|>", "{{ '{{' }}"),
}
TALKS = ("u", "uau", "uauau", "su", "suau")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("checkpoint"))


def describe(folder: Path, template: str | None) -> dict[str, MetadataValue]:
    metadata = dict(read_tokenizer(folder, 900).values)
    if template is not None:
        metadata["tokenizer.chat_template"] = Value("string", template)
    return metadata


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """Read a Modelfile as Ollama's parser does: a value ends with a line at which it is whole."""
    commands, lines = [], text.split("\n")
    while lines:
        line = lines.pop(0)
        if not line.strip() or line.startswith("#"):
            continue
        name, _, value = line.partition(" ")
        if name == "PARAMETER":
            name, _, value = value.partition(" ")
        while (plain := unquote(value.strip())) is None:
            value += "\n" + lines.pop(0)
        commands.append((name, plain))
    return commands


def unquote(value: str) -> str | None:
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            whole = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if whole else None
    return value


def render_go(template: str, talk: list[dict[str, str]]) -> str:
    """Run the few actions of Go's templates that are written, as Jinja's."""
    for action, statement in (
        ('{{ "{{" }}', "{{ '{{' }}"),
        ("{{ if not .System }}", "{% if talk[0].role != 'system' %}"),
        ("{{ range .Messages }}", "{% for m in talk %}"),
        ("{{ .Content }}", "{{ m.content }}"),
    ):
        template = template.replace(action, statement)
    template = re.sub(r'{{ (else if|if) eq .Role "(\w+)" }}', r'{% \1 m.role == "\2" %}', template)
    template = template.replace("{% else if ", "{% elif ")
    template = re.sub(r"{{ end }}{{ end }}(?!.*{{ end }})", "{% endif %}{% endfor %}", template)
    template = template.replace("{{ end }}", "{% endif %}")
    return Environment(keep_trailing_newline=True).from_string(template).render(talk=talk)


def render_jinja(template: str, talk: list[dict[str, str]], answer: bool) -> str:
    def refuse(message: str) -> None:
        raise ValueError(message)

    return (
        Environment(keep_trailing_newline=True)
        .from_string(template)
        .render(
            messages=talk,
            add_generation_prompt=answer,
            bos_token="<|begin|>",
            eos_token="<|end|>",
            raise_exception=refuse,
        )
    )


def talk_of(roles: str) -> list[dict[str, str]]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [
        {"role": names[role], "content": f'{place}: a "quoted"\n\nline'}
        for place, role in enumerate(roles)
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_gives_what_the_chat_template_gives(name: str, checkpoint: Path) -> None:
    template = TEMPLATES[name]
    text = compose_modelfile("model.gguf", checkpoint, describe(checkpoint, template), 2048)
    written = dict(parse_modelfile(text))["TEMPLATE"]

    for roles in TALKS:
        if roles.startswith("s") and name in ("gemma", "mistral"):
            continue
        # The runtime adds the BOS itself.
        expected = render_jinja(template, talk_of(roles), True).removeprefix("<|begin|>")
        assert render_go(written, talk_of(roles)) == expected


def test_a_template_without_a_place_for_the_system_message_says_so(checkpoint: Path) -> None:
    text = compose_modelfile("model.gguf", checkpoint, describe(checkpoint, GEMMA), 2048)

    assert "# The chat template has no place for a system message" in text
    assert "system" not in dict(parse_modelfile(text))["TEMPLATE"]


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("<|im_end|>", "{{ loop.index }}<|im_end|>"),  # counts the messages
        CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"),
        "{{ strftime_now('%d %b %Y') }}" + CHATML,
        "{{ messages | tojson }}",
        "{% for m in messages %}broken",
    ],
)
def test_any_other_template_is_left_to_ollama(template: str, checkpoint: Path) -> None:
    text = compose_modelfile("model.gguf", checkpoint, describe(checkpoint, template), 2048)

    assert "TEMPLATE" not in dict(parse_modelfile(text))
    assert "Ollama uses one of its own" in text


def test_a_model_without_a_template_completes_text(checkpoint: Path) -> None:
    text = compose_modelfile("model.gguf", checkpoint, describe(checkpoint, None), 2048)

    assert ("TEMPLATE", "{{ .Prompt }}") in parse_modelfile(text)


def test_a_bos_that_the_runtime_does_not_add_stays_in_the_template() -> None:
    style = ChatStyle("<s>", ("U", ""), ("A", ""), "A", ("<s>S", ""))

    assert write_go_template(style, "<s>").count("<s>") == 0
    assert write_go_template(style, "").count("<s>") == 2


def test_file_stops_context_and_sampling_are_written(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    write_json(
        folder / "generation_config.json",
        {
            "eos_token_id": [1, 2],
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.9,
            "top_k": 20,
            "repetition_penalty": 1.05,
            "min_p": None,
        },
    )

    text = compose_modelfile("my model-Q4_K_M.gguf", folder, describe(folder, CHATML), 131072)

    commands = parse_modelfile(text)
    assert commands[0] == ("FROM", "./my model-Q4_K_M.gguf")
    assert commands[2:] == [
        ("stop", "<|end|>"),
        ("stop", "<|pad|>"),
        ("num_ctx", "8192"),
        ("temperature", "0.6"),
        ("top_p", "0.9"),
        ("top_k", "20"),
        ("repeat_penalty", "1.05"),
    ]
    assert "trained for 131072" in text


def test_a_model_that_is_not_sampled_takes_the_likeliest_token(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    write_json(folder / "generation_config.json", {"do_sample": False, "temperature": 0.7})

    text = compose_modelfile("m.gguf", folder, describe(folder, None), 512)

    assert ("temperature", "0") in parse_modelfile(text)
    assert ("num_ctx", "512") in parse_modelfile(text)


def test_a_damaged_generation_config_is_named(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    metadata = describe(folder, None)
    (folder / "generation_config.json").write_text("[1]", encoding="utf-8")

    with pytest.raises(CheckpointError, match=r"generation_config\.json holds a JSON list"):
        compose_modelfile("m.gguf", folder, metadata, 512)


@pytest.mark.parametrize(
    "text",
    ["", "a", 'a "b" c', '"', '"" x', '"""', ' "a', "two\nlines", '"two"\nlines"', 'a\n"""b', "\n"],
)
def test_a_quoted_value_is_read_back(text: str) -> None:
    assert parse_modelfile(f"TEMPLATE {quote(text)}\nFROM x") == [("TEMPLATE", text), ("FROM", "x")]


def test_three_quotes_at_the_end_of_a_line_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="three quotes"):
        quote('a"""\nb')


def test_parts_that_depend_on_what_follows_are_no_style() -> None:
    def render(talk: Any, answer: bool) -> str:
        return "|".join(message["content"] for message in talk) + ("|" if answer else "")

    style = read_chat_style(render)

    assert style is None
