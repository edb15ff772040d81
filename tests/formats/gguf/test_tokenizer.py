"""A checkpoint's tokenizer in a GGUF file: llama.cpp gives the ids of Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import CheckpointError, RecipeError
from quantkit.formats.gguf.header import Array, Value
from quantkit.formats.gguf.tokenizer import read_tokenizer
from tests.formats.gguf.awkward import AWKWARD, DECOMPOSED, INVALID_BYTES, with_specials
from tests.formats.gguf.trained_tokenizers import (
    LLAMA3,
    QWEN2,
    SPECIALS,
    change_json,
    write_byte_level,
    write_json,
)
from tests.formats.gguf.vocab_files import find_differences, write_vocabulary
from tests.llama_vocab import tokenize_with_llama

DEMO = Path(__file__).parents[3] / "models" / "demo-llama"
DEMO_VOCAB = 4096


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to read only."""
    return write_byte_level(tmp_path_factory.mktemp("gpt2"))


def read_value(folder: Path, key: str, vocab_size: int = 900) -> object:
    entry = read_tokenizer(folder, vocab_size).values.get(key)
    return None if entry is None else entry.content


def copy_demo(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    return folder


def test_the_bundled_model_is_tokenized_alike(tmp_path: Path) -> None:
    folder = copy_demo(tmp_path)
    texts = (*AWKWARD, *DECOMPOSED, *with_specials(*SPECIALS))

    assert find_differences(folder, texts, DEMO_VOCAB) == []
    assert find_differences(folder, texts, DEMO_VOCAB, add_special=False) == []
    assert read_value(DEMO, "tokenizer.ggml.pre", DEMO_VOCAB) == "llama-bpe"


def test_special_tokens_inside_a_text_are_found_alike(gpt2: Path) -> None:
    assert find_differences(gpt2, with_specials(*SPECIALS), 910) == []


def test_bytes_that_are_no_text_do_not_stop_llama_cpp(gpt2: Path) -> None:
    assert len(tokenize_with_llama(write_vocabulary(gpt2, 900), INVALID_BYTES)) == 4


def test_llama_cpp_does_not_compose_letters_and_a_note_says_so(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, patterns=(QWEN2,), nfc=True)

    assert len(find_differences(folder, DECOMPOSED, 900)) == len(DECOMPOSED)
    assert any("normalizes text (NFC)" in note for note in read_tokenizer(folder, 900).notes)


def test_rows_without_a_token_are_padded_as_unused(gpt2: Path) -> None:
    values = read_tokenizer(gpt2, 903).values

    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert isinstance(tokens, Array)
    assert isinstance(kinds, Array)
    assert tokens.items[900:] == ["[PAD900]", "[PAD901]", "[PAD902]"]
    assert kinds.items[:4] == [3, 3, 3, 1]
    assert kinds.items[900:] == [5, 5, 5]


def test_a_tokenizer_of_another_model_is_refused(gpt2: Path) -> None:
    with pytest.raises(CheckpointError, match="embedding has 800 rows"):
        read_tokenizer(gpt2, 800)


def add_token(folder: Path, content: str, id_: int, **changes: Any) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    token = {
        "id": id_,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
        **changes,
    }
    change_json(folder / "tokenizer.json", added_tokens=[*tree["added_tokens"], token])


def test_added_tokens_are_user_defined_or_control_by_their_look(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    for place, text in enumerate(("<tool>", "<|user|>", "    ")):
        add_token(folder, text, 900 + place)

    kinds = read_tokenizer(folder, 903).values["tokenizer.ggml.token_type"]
    assert isinstance(kinds, Array)
    assert kinds.items[900:] == [4, 3, 4]
    assert find_differences(folder, ("a<tool>b", "x<|user|>y", "a    b     c"), 903) == []


def test_an_added_token_without_a_row_is_left_out_with_a_note(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    add_token(folder, "<image>", 900)

    metadata = read_tokenizer(folder, 900)

    assert any("'<image>'" in note for note in metadata.notes)
    assert len(tokenize_with_llama(write_vocabulary(folder, 900), ["a"])) == 1


def test_two_tokens_with_one_text_are_refused_as_llama_cpp_would_abort(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    add_token(folder, "[PAD901]", 900)

    with pytest.raises(CheckpointError, match=r"\[900, 901\] are all written '\[PAD901\]'"):
        read_tokenizer(folder, 902)


def test_bos_is_added_where_the_tokenizer_adds_it(gpt2: Path, tmp_path: Path) -> None:
    without = write_byte_level(tmp_path, bos=False)

    assert read_value(gpt2, "tokenizer.ggml.add_bos_token") is True
    assert read_value(without, "tokenizer.ggml.add_bos_token") is False
    assert find_differences(without, ("", "a"), 900) == []


def test_eos_is_added_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, eos=True)

    assert read_value(folder, "tokenizer.ggml.add_eos_token") is True
    assert find_differences(folder, ("", "a b"), 900) == []


def test_llama_3s_rule_adds_no_bos_of_its_own(tmp_path: Path) -> None:
    # llama.cpp adds a BOS for `llama-bpe` unless the file says otherwise.
    folder = write_byte_level(tmp_path, patterns=(LLAMA3,), ignore_merges=True, bos=False)

    assert find_differences(folder, ("", "a"), 900) == []


def test_what_llama_cpp_cannot_put_before_a_text_is_noted(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    change_json(folder / "tokenizer_config.json", bos_token="<|end|>")

    metadata = read_tokenizer(folder, 900)

    assert metadata.values["tokenizer.ggml.add_bos_token"] == Value("bool", False)
    assert any("puts ['<|begin|>'] before a text" in note for note in metadata.notes)


def test_special_ids_come_first_from_tokenizer_config_then_config(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    eos = {"__type": "AddedToken", "content": "<|end|>"}
    write_json(folder / "tokenizer_config.json", {"eos_token": eos})
    write_json(folder / "config.json", {"eos_token_id": 7, "text_config": {"pad_token_id": 2}})
    write_json(folder / "special_tokens_map.json", {"pad_token": "<|end|>", "sep_token": "<|pad|>"})
    write_json(folder / "generation_config.json", {"eos_token_id": [5], "bos_token_id": 0})

    values = read_tokenizer(folder, 900).values

    found = {key.rpartition(".")[2]: value.content for key, value in values.items() if "_id" in key}
    assert found == {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "padding_token_id": 2,
        "seperator_token_id": 2,
        "eot_token_id": 5,
    }


def test_further_end_tokens_get_a_role_where_llama_cpp_would_not_stop(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 2, 300, 301]})

    metadata = read_tokenizer(folder, 900)

    assert metadata.values["tokenizer.ggml.eot_token_id"] == Value("uint32", 2)
    assert metadata.values["tokenizer.ggml.eom_token_id"] == Value("uint32", 300)
    assert any("will not stop at" in note for note in metadata.notes)


def test_the_chat_template_is_that_of_the_jinja_file_or_else_of_the_config(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    assert read_value(folder, "tokenizer.chat_template") is None

    change_json(folder / "tokenizer_config.json", chat_template="from the config")
    assert read_value(folder, "tokenizer.chat_template") == "from the config"

    (folder / "chat_template.jinja").write_text("from the file \u00e9\n", encoding="utf-8")
    assert read_value(folder, "tokenizer.chat_template") == "from the file \u00e9\n"


def test_named_templates_are_listed_but_the_default(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    change_json(
        folder / "tokenizer_config.json",
        chat_template=[
            {"name": "default", "template": "D"},
            {"name": "tool-use", "template": "T"},
        ],
    )

    values = read_tokenizer(folder, 900).values

    assert values["tokenizer.chat_template"] == Value("string", "D")
    assert values["tokenizer.chat_template.tool_use"] == Value("string", "T")
    assert values["tokenizer.chat_templates"] == Array("string", ["tool_use"])


def test_a_bos_of_the_template_beside_that_of_the_tokenizer_is_noted(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    assert not any("twice" in note for note in read_tokenizer(folder, 900).notes)

    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages }}", encoding="utf-8")

    metadata = read_tokenizer(folder, 900)
    assert any("the BOS is there twice" in note for note in metadata.notes)
    assert metadata.values["tokenizer.ggml.add_bos_token"] == Value("bool", True)


def test_equal_folders_give_equal_metadata_in_one_order(gpt2: Path) -> None:
    first, second = read_tokenizer(gpt2, 900).values, read_tokenizer(gpt2, 900).values

    assert list(first.items()) == list(second.items())
    assert next(iter(first)) == "tokenizer.ggml.model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_bpe_that_llama_cpp_cannot_do_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_byte_level(tmp_path)
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change_json(folder / "tokenizer.json", model={**tree["model"], **changes})

    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(folder, 900)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        read_tokenizer(tmp_path, 900)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    (folder / "generation_config.json").write_text("{", encoding="utf-8")

    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid JSON"):
        read_tokenizer(folder, 900)


def test_a_misspelt_pre_tokenizer_is_refused(gpt2: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'gpt-2'"):
        read_tokenizer(gpt2, 900, pre="gpt2")


def test_added_tokens_that_take_blanks_beside_them_are_noted(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    add_token(folder, "<mask>", 900, lstrip=True)

    assert any(
        "lstrip" in note and "'<mask>'" in note for note in read_tokenizer(folder, 901).notes
    )
    assert find_differences(folder, ("a <mask>",), 901) != []


def test_a_token_with_a_zero_character_is_refused(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    add_token(folder, "a\0b", 900)

    with pytest.raises(CheckpointError, match="zero character"):
        read_tokenizer(folder, 901)


def test_the_first_of_several_ids_in_config_is_the_eos(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    write_json(folder / "tokenizer_config.json", {})
    write_json(folder / "config.json", {"eos_token_id": [1, 300]})

    values = read_tokenizer(folder, 900).values

    assert values["tokenizer.ggml.eos_token_id"] == Value("uint32", 1)
    assert values["tokenizer.ggml.eot_token_id"] == Value("uint32", 300)
