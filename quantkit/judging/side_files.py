"""Do the files beside an artifact's weights make of a prompt what the original's do?

A model is judged on token ids, so a tokenizer that gives others, a lost chat template or another
end of sequence does not show in its numbers; its users would see it. What is compared is what the
files do, not their bytes: tools write them again in other words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantkit.calibration.templates import apply_template
from quantkit.calibration.tokenizer import has_tokenizer, load_tokenizer, read_json_object
from quantkit.checkpoint.headers import MAX_HEADER_BYTES
from quantkit.checkpoint.paths import find_inside, join_inside
from quantkit.errors import CalibrationError, CheckpointError, blame_machine
from quantkit.judging.tokens import collect_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENAI_CONFIG = "genai_config.json"
MODULES = "modules.json"

CONVERSATIONS: Mapping[str, tuple[Mapping[str, str], ...]] = MappingProxyType(
    {
        "a question": ({"role": "user", "content": "Where is it?"},),
        "a conversation": (
            {"role": "user", "content": "Where is it?"},
            {"role": "assistant", "content": "On the table."},
            {"role": "user", "content": "And what is it?\nSay it in one line."},
        ),
        "a system's words": (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Where is it?"},
        ),
    }
)
"""What a chat template is tried with."""

_UNBOUNDED = 1 << 31


def compare_side_files(baseline: Path, folders: Sequence[Path]) -> tuple[str, ...]:
    """Compare the tokenizer, the chat template, the ends and the pooling beside an artifact.

    Args:
        baseline: folder of the original.
        folders: where files of the artifact may lie, the first before the others.

    Returns:
        What is not as the original has it, one sentence each. Nothing is said of an original
        without a tokenizer, and of a graph that lies alone.
    """
    try:
        mine = load_tokenizer(baseline)
    except CheckpointError as error:
        blame_machine(error)
        return ()
    folder = next((each for each in folders if has_tokenizer(each)), None)
    if folder is None:
        alone = not (folders[0] / "config.json").is_file()
        return () if alone else ("there is no tokenizer beside the weights, as the original has",)
    try:
        theirs = load_tokenizer(folder)
    except CheckpointError as error:
        blame_machine(error)
        return (str(error),)
    return (
        *_compare_ids(mine, theirs),
        *compare_templates(mine, theirs.chat_template),
        *_compare_ends(find_ends(baseline), _find_own_ends(folder)),
        *_compare_pooling(baseline, folder),
    )


def compare_templates(tokenizer: PreTrainedTokenizerBase, template: object) -> tuple[str, ...]:
    """Render a few conversations with the original's chat template and with another.

    Args:
        tokenizer: the original's, with its template.
        template: the other one.
    """
    if not tokenizer.chat_template:
        return ()
    if not template:
        return ("its chat template is lost, which the original has",)
    differing = [
        name
        for name, conversation in CONVERSATIONS.items()
        if _render(tokenizer, tokenizer.chat_template, conversation)
        != _render(tokenizer, template, conversation)
    ]
    if not differing:
        return ()
    return (
        f"its chat template makes another prompt than the original's of {differing[0]} "
        f"({len(differing)} of {len(CONVERSATIONS)} that were tried)",
    )


def find_ends(folder: Path) -> frozenset[int]:
    """Return the ids at which a checkpoint's generation ends; none where no file names one."""
    for name in ("generation_config.json", "config.json"):
        config = read_json_object(join_inside(folder, name))
        text = config.get("text_config")
        for each in (config, text if isinstance(text, dict) else {}):
            ends = _as_ids(each.get("eos_token_id"))
            if ends:
                return ends
    return frozenset()


def compare_gguf_sides(baseline: Path, template: str | None, end: int | None) -> tuple[str, ...]:
    """Compare the chat template and the end of sequence of a GGUF file with the original's.

    Which other tokens end a turn llama.cpp finds by their texts.

    Args:
        baseline: folder of the original.
        template: `tokenizer.chat_template` of the file.
        end: `tokenizer.ggml.eos_token_id` of the file.
    """
    try:
        tokenizer = load_tokenizer(baseline)
    except CheckpointError as error:
        blame_machine(error)
        return ()
    known = find_ends(baseline) | _as_ids(tokenizer.eos_token_id)
    found = compare_templates(tokenizer, template)
    if end is None or not known or end in known:
        return found
    return (*found, _describe_end({end}, known))


def _compare_ids(mine: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> Iterator[str]:
    texts = collect_texts(mine, _UNBOUNDED)
    for special, words in ((False, "other ids"), (True, "other tokens before or behind a text")):
        wrong = [
            text
            for text in texts
            if list(mine(text, add_special_tokens=special).input_ids)
            != list(theirs(text, add_special_tokens=special).input_ids)
        ]
        if wrong:
            yield (
                f"its tokenizer gives {words} than the original's in {len(wrong)} of {len(texts)} "
                f"texts, for instance for {wrong[0]!r}"
            )
            return


def _render(
    tokenizer: PreTrainedTokenizerBase, template: Any, conversation: Sequence[Mapping[str, str]]
) -> str | None:
    """Return the prompt; None where the template refuses the conversation."""
    options = {
        "chat_template": template if isinstance(template, str) else None,
        "tokenize": False,
        "add_generation_prompt": True,
    }
    try:
        return str(apply_template(tokenizer, conversation, options, "the chat template refuses"))
    except CalibrationError as error:
        blame_machine(error)
        return None


def _find_own_ends(folder: Path) -> frozenset[int]:
    """What ends generation in an artifact: onnxruntime-genai has a file of its own."""
    model = read_json_object(join_inside(folder, GENAI_CONFIG)).get("model")
    ends = _as_ids(model.get("eos_token_id")) if isinstance(model, dict) else frozenset()
    return ends or find_ends(folder)


def _compare_ends(mine: frozenset[int], theirs: frozenset[int]) -> Iterator[str]:
    if not mine <= theirs:
        yield _describe_end(theirs, mine)


def _describe_end(found: set[int] | frozenset[int], known: frozenset[int]) -> str:
    names = " or ".join(map(str, sorted(found))) or "no token"
    return (
        f"its generation ends at {names} (eos_token_id), the original's at "
        f"{' or '.join(map(str, sorted(known)))}"
    )


def _compare_pooling(baseline: Path, folder: Path) -> Iterator[str]:
    """Compare what sentence-transformers does behind the encoder."""
    mine, theirs = _describe_modules(baseline), _describe_modules(folder)
    if mine is not None and mine != theirs:
        yield (
            "sentence-transformers would pool its tokens otherwise than the original's: "
            f"{_show(theirs)} and not {_show(mine)}"
        )


def _describe_modules(folder: Path) -> list[tuple[str, tuple[str, ...]]] | None:
    """Return the kind of each module, and how it pools; None where no file lists them.

    A list that lies outside of the folder is none of it.
    """
    try:
        path = find_inside(folder, MODULES)
        if path is None or path.stat().st_size > MAX_HEADER_BYTES:
            return None
        modules = json.loads(path.read_bytes())
        return [
            (str(module["type"]).rpartition(".")[2], _find_modes(folder, str(module["path"])))
            for module in modules
        ]
    except (CheckpointError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        blame_machine(error)
        return None


def _find_modes(folder: Path, place: str) -> tuple[str, ...]:
    try:
        config = read_json_object(join_inside(folder, f"{place}/config.json"))
    except CheckpointError:
        return ()
    named = config.get("pooling_mode")
    modes = {key for key, on in config.items() if key.startswith("pooling_mode_") and on}
    modes |= {f"pooling_mode_{named}_tokens"} if isinstance(named, str) else set()
    return tuple(sorted(mode.replace("cls_tokens", "cls_token") for mode in modes))


def _show(modules: list[tuple[str, tuple[str, ...]]] | None) -> str:
    if modules is None:
        return f"there is no {MODULES}"
    return ", ".join(f"{kind} {' '.join(modes)}".strip() for kind, modes in modules)


def _as_ids(value: object) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(each for each in values if type(each) is int and each >= 0)
