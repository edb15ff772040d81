"""A prompt that another tokenizer, template or end makes, and that none of the numbers show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.judging.side_files import compare_gguf_sides, compare_side_files, find_ends
from tests.encoder_models import write_encoder_checkpoint
from tests.helpers import CHAT_TEMPLATE, make_pico_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_model(tmp_path_factory.mktemp("original"), hidden=32, layers=1)


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def test_files_that_do_the_same_in_other_words_are_no_finding(original: Path, copy: Path) -> None:
    """JSON in another order, a template with a comment, an end as a list, in config.json alone."""
    assert compare_side_files(original, [copy]) == ()
    tree = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(tree, sort_keys=True))
    (copy / "chat_template.jinja").write_text("{# as before #}" + CHAT_TEMPLATE)
    (copy / "generation_config.json").unlink()
    edit(copy / "config.json", lambda config: config.update(eos_token_id=[1, 5]))

    assert compare_side_files(original, [copy]) == ()


def test_other_ids_are_found(original: Path, copy: Path) -> None:
    """Of a text, and of what is put before it."""
    path = copy / "tokenizer.json"
    edit(path, lambda tree: tree["model"]["merges"].clear())
    (found,) = compare_side_files(original, [copy])
    assert "its tokenizer gives other ids than the original's" in found

    shutil.copy(original / "tokenizer.json", path)
    edit(path, lambda tree: tree.update(post_processor=None))
    (found,) = compare_side_files(original, [copy])
    assert "other tokens before or behind a text" in found


def test_a_template_that_is_lost_or_makes_another_prompt_is_found(
    original: Path, copy: Path
) -> None:
    path = copy / "chat_template.jinja"
    path.write_text(CHAT_TEMPLATE.partition("{% if add_generation_prompt")[0])
    (found,) = compare_side_files(original, [copy])
    assert "its chat template makes another prompt than the original's of a question" in found
    path.unlink()
    (found,) = compare_side_files(original, [copy])
    assert "its chat template is lost" in found


def test_an_end_that_is_lost_is_found(original: Path, copy: Path) -> None:
    """Also in the file of onnxruntime-genai, which reads no other."""
    (copy / "genai_config.json").write_text('{"model": {"eos_token_id": 9}}')
    (found,) = compare_side_files(original, [copy])
    assert found == "its generation ends at 9 (eos_token_id), the original's at 1"
    assert find_ends(original) == {1}


def test_a_tokenizer_is_missed_beside_a_model_and_not_beside_a_lone_graph(
    original: Path, copy: Path
) -> None:
    (copy / "tokenizer.json").unlink()
    assert compare_side_files(original, [copy]) == (
        "there is no tokenizer beside the weights, as the original has",
    )
    (copy / "config.json").unlink()
    assert compare_side_files(original, [copy]) == ()
    assert compare_side_files(original, [copy, original]) == ()


def test_gguf_files_have_the_template_and_the_end_inside(original: Path) -> None:
    assert compare_gguf_sides(original, CHAT_TEMPLATE, 1) == ()
    assert compare_gguf_sides(original, CHAT_TEMPLATE, None) == ()
    lost, end = compare_gguf_sides(original, None, 9)
    assert "its chat template is lost" in lost
    assert "ends at 9" in end


def test_pooling_of_sentence_transformers_is_compared(tmp_path: Path) -> None:
    """Older and newer files name it differently."""
    original = write_encoder_checkpoint(tmp_path / "encoder")
    copy = Path(shutil.copytree(original, tmp_path / "copy"))
    path = copy / "1_Pooling" / "config.json"
    path.write_text('{"pooling_mode": "mean", "word_embedding_dimension": 32}')
    assert compare_side_files(original, [copy]) == ()
    path.write_text('{"pooling_mode": "cls", "word_embedding_dimension": 32}')
    (found,) = compare_side_files(original, [copy])
    assert "would pool its tokens otherwise than the original's" in found
