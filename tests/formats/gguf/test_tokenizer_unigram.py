"""Unigram tokenizers in a GGUF file, from tokenizer.json as transformers writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import CheckpointError
from quantkit.formats.gguf import tokenizer
from quantkit.formats.gguf.header import Array, Value
from quantkit.formats.gguf.tokenizer import read_tokenizer
from quantkit.formats.gguf.tokenizer_model_file import read_piece_model
from tests.formats.gguf.awkward import AWKWARD, DECOMPOSED, with_specials
from tests.formats.gguf.trained_tokenizers import write_folder, write_sentencepiece
from tests.formats.gguf.vocab_files import find_differences

VOCAB = 400


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json as T5's, of a Unigram model that SentencePiece trained; to read only."""
    source = write_sentencepiece(
        tmp_path_factory.mktemp("pieces"), model_type="unigram", vocab=VOCAB
    )
    return convert_unigram(source, tmp_path_factory.mktemp("t5"))


def convert_unigram(source: Path, folder: Path) -> Path:
    """Write the tokenizer.json that transformers makes of a Unigram tokenizer.model."""
    import sentencepiece
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, processors
    from tokenizers import pre_tokenizers as pre

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    ids = range(pieces.get_piece_size())
    vocab = [(pieces.id_to_piece(id_), pieces.get_score(id_)) for id_ in ids]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=pieces.unk_id(), byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(read_piece_model(source / "tokenizer.model").charsmap),
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), "\u2581"),
        ]
    )
    tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="always")
    for id_ in ids:
        if pieces.is_control(id_) or pieces.is_unknown(id_):
            tokenizer.add_special_tokens([AddedToken(pieces.id_to_piece(id_), normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    write_folder(folder, tokenizer.to_str(), ("<s>", "</s>", "<unk>"))
    return folder


def change_tree(source: Path, folder: Path, **changes: Any) -> Path:
    tree = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    model = {**tree["model"], **changes.pop("model", {})}
    write_folder(folder, json.dumps({**tree, **changes, "model": model}), ("<s>", "</s>", "<unk>"))
    return folder


def test_a_tokenizer_json_as_t5s_is_tokenized_alike(t5: Path) -> None:
    texts = (*AWKWARD, *DECOMPOSED, *with_specials("</s>"))

    assert find_differences(t5, texts, VOCAB) == []


def test_the_metadata_are_those_of_the_model_file(t5: Path) -> None:
    values = read_tokenizer(t5, VOCAB + 2).values

    assert values["tokenizer.ggml.model"] == Value("string", "t5")
    assert values["tokenizer.ggml.remove_extra_whitespaces"] == Value("bool", True)
    assert values["tokenizer.ggml.add_space_prefix"] == Value("bool", True)
    assert values["tokenizer.ggml.add_eos_token"] == Value("bool", True)
    assert values["tokenizer.ggml.unknown_token_id"] == Value("uint32", 0)
    charsmap = values["tokenizer.ggml.precompiled_charsmap"]
    assert isinstance(charsmap, Array)
    assert len(charsmap.items) > 1000


def test_a_normalization_larger_than_any_is_refused(
    t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its bytes is an object while the header is made."""
    monkeypatch.setattr(tokenizer, "_MOST_CHARSMAP", 1000)

    with pytest.raises(
        CheckpointError, match=r"takes [\d,]+ bytes, and none takes more than 1,000"
    ):
        read_tokenizer(t5, VOCAB + 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"byte_fallback": True}}, "byte_fallback"),
        ({"normalizer": {"type": "Lowercase"}}, "no counterpart .*Lowercase"),
        (
            {"normalizer": {"type": "Strip", "strip_left": False, "strip_right": True}},
            "no counterpart .*Strip",
        ),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no counterpart .*Whitespace"),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, "without blanks written as"),
    ],
)
def test_what_llama_cpp_does_otherwise_is_refused(
    t5: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_tokenizer(change_tree(t5, tmp_path, **changes), VOCAB)
