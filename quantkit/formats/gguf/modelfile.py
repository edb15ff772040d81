"""Ollama's Modelfile for a GGUF file.

Format: docs/modelfile.mdx of Ollama, read as parser/parser.go does. A value ends with its line,
unless it is quoted; there are no escapes, and a quoted value goes on to the quotes at the end of a
line. Templates are Go's. Ollama adds the BOS where the GGUF file says so, hence it is left out of
the template. Where a Modelfile has no TEMPLATE, Ollama looks for one of its own that resembles the
template in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from quantkit.calibration.tokenizer import read_json_object
from quantkit.formats.gguf.chat_style import ChatStyle, Message, Render, read_chat_style
from quantkit.formats.gguf.header import Array, MetadataValue, Value
from quantkit.formats.gguf.tokenizer_specials import end_tokens

MAX_CONTEXT = 8192
"""Written at most: the cache of a long context can take more memory than the model."""
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Key of generation_config.json -> parameter of Ollama."""


def compose_modelfile(
    gguf_name: str, source: Path, metadata: Mapping[str, MetadataValue], context_length: int
) -> str:
    """Return the text of the Modelfile that lies beside a GGUF file.

    Args:
        gguf_name: of the file, or of the first part of a divided one.
        source: the checkpoint, for its generation_config.json.
        metadata: of the GGUF file: tokens, special ids and chat template.
        context_length: that the model was trained for.

    Raises:
        CheckpointError: generation_config.json is damaged.
    """
    lines = [f"FROM {quote('./' + gguf_name)}", ""]
    lines += _template_lines(metadata)
    lines += _stop_lines(source, metadata)
    if context_length > MAX_CONTEXT:
        lines.append(
            f"# The model was trained for {context_length}; a longer context takes memory."
        )
    lines.append(f"PARAMETER num_ctx {min(context_length, MAX_CONTEXT)}")
    lines += _sampling_lines(source)
    return "\n".join(lines) + "\n"


def quote(text: str) -> str:
    """Return a value as a Modelfile holds it.

    Raises:
        ValueError: three quotes at the end of a line, which would end the value there.
    """
    simple = f'"{text}"'
    if "\n" not in text and "\r" not in text and not simple.startswith('"""'):
        return simple
    if re.search(r'"""[^\S\r\n]*[\r\n]', text):
        raise ValueError("a Modelfile cannot hold a text with three quotes at the end of a line")
    return f'"""{text}"""'


def _template_lines(metadata: Mapping[str, MetadataValue]) -> list[str]:
    template = _text(metadata, "tokenizer.chat_template")
    if template is None:
        return [
            "# The model has no chat template: it completes text.",
            'TEMPLATE "{{ .Prompt }}"',
            "",
        ]
    written = None
    # A template that asks for the date would freeze today's.
    style = None if "strftime_now" in template else read_chat_style(_renderer(template, metadata))
    if style is not None:
        with suppress(ValueError):
            written = quote(write_go_template(style, _added_bos(metadata)))
    if style is None or written is None:
        return [
            "# The chat template cannot be written in Go's form; Ollama uses one of its own that",
            "# resembles the template in the GGUF file, if it finds one.",
            "",
        ]
    lines = [f"TEMPLATE {written}", ""]
    if style.system is None:
        lines.insert(0, "# The chat template has no place for a system message: none is written.")
    return lines


def write_go_template(style: ChatStyle, added_bos: str) -> str:
    """Return a chat style as a template of Ollama.

    Args:
        style: the parts.
        added_bos: text of the BOS that the runtime adds, which is not written a second time.
    """
    branches = [("user", *style.user), ("assistant", *style.assistant)]
    start = style.start.removeprefix(added_bos)
    if style.system is not None:
        before, after = style.system
        branches.append(("system", before.removeprefix(added_bos), after))
    body = " else ".join(
        f'if eq .Role "{role}" }}}}{_literal(before)}{{{{ .Content }}}}{_literal(after)}{{{{'
        for role, before, after in branches
    )
    opening = _literal(start)
    if start and style.system is not None:
        opening = f"{{{{ if not .System }}}}{opening}{{{{ end }}}}"
    turns = f"{{{{ range .Messages }}}}{{{{ {body} end }}}}{{{{ end }}}}"
    return opening + turns + _literal(style.answer)


def _literal(text: str) -> str:
    """Text that Go's templates give as it is."""
    return text.replace("{{", '{{ "{{" }}')


def _renderer(template: str, metadata: Mapping[str, MetadataValue]) -> Render:
    """Return what renders a conversation by the template, in transformers' sandbox."""
    from transformers.utils.chat_template_utils import render_jinja_template

    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    texts = {f"{name}_token": _token_text(metadata, role) or "" for name, role in names.items()}

    def render(talk: Sequence[Message], answer: bool) -> str:
        try:
            rendered, _ = render_jinja_template(
                conversations=[list(talk)],
                chat_template=template,
                add_generation_prompt=answer,
                **texts,
            )
        # A template is a program: it may raise anything.
        except Exception as error:
            raise ValueError(f"the chat template fails: {error}") from error
        return str(rendered[0])

    return render


def _stop_lines(folder: Path, metadata: Mapping[str, MetadataValue]) -> list[str]:
    tokens = _tokens(metadata)
    ids = end_tokens(folder, _number(metadata, "tokenizer.ggml.eos_token_id"), len(tokens))
    texts = [tokens[id_] for id_ in ids]
    # Ollama's parser drops characters that cannot be printed.
    return [f"PARAMETER stop {quote(text)}" for text in texts if text.isprintable()]


def _sampling_lines(folder: Path) -> list[str]:
    config = read_json_object(folder / "generation_config.json")
    if config.get("do_sample") is False:
        return ["PARAMETER temperature 0"]
    return [
        f"PARAMETER {name} {config[key]!r}"
        for key, name in SAMPLING.items()
        if isinstance(config.get(key), int | float) and not isinstance(config[key], bool)
    ]


def _added_bos(metadata: Mapping[str, MetadataValue]) -> str:
    adds = metadata.get("tokenizer.ggml.add_bos_token")
    added = isinstance(adds, Value) and adds.content is True
    return (_token_text(metadata, "bos") or "") if added else ""


def _token_text(metadata: Mapping[str, MetadataValue], role: str) -> str | None:
    id_ = _number(metadata, f"tokenizer.ggml.{role}_token_id")
    return None if id_ is None else _tokens(metadata)[id_]


def _tokens(metadata: Mapping[str, MetadataValue]) -> list[str]:
    entry = metadata.get("tokenizer.ggml.tokens")
    return [str(text) for text in entry.content] if isinstance(entry, Array) else []


def _number(metadata: Mapping[str, MetadataValue], key: str) -> int | None:
    entry = metadata.get(key)
    return entry.content if isinstance(entry, Value) and isinstance(entry.content, int) else None


def _text(metadata: Mapping[str, MetadataValue], key: str) -> str | None:
    entry = metadata.get(key)
    return entry.content if isinstance(entry, Value) and isinstance(entry.content, str) else None
