"""SentencePiece's tokenizers in a GGUF file, from tokenizer.json and from tokenizer.model."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from quantkit.errors import CheckpointError, RecipeError
from quantkit.formats.gguf.header import Array, Value
from quantkit.formats.gguf.tokenizer import read_tokenizer
from quantkit.formats.gguf.tokenizer_model_file import read_piece_model
from quantkit.formats.gguf.tokenizer_spm import rank_pieces
from quantkit.formats.gguf.tokenizer_vocabulary import TokenKind
from tests.formats.gguf.awkward import AWKWARD, DECOMPOSED, with_specials
from tests.formats.gguf.trained_tokenizers import (
    USER_DEFINED,
    change_json,
    convert_sentencepiece,
    training_lines,
    write_folder,
    write_json,
    write_sentencepiece,
)
from tests.formats.gguf.vocab_files import find_differences, write_vocabulary
from tests.llama_vocab import tokenize_with_llama

VOCAB = 700
TEXTS = (*AWKWARD, *DECOMPOSED)
SPECIALS = with_specials("<s>", "</s>", "<unk>")


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model as Llama-2's; to read only."""
    return write_sentencepiece(tmp_path_factory.mktemp("llama2"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model as Gemma's; to read only."""
    folder = tmp_path_factory.mktemp("gemma")
    return write_sentencepiece(folder, dummy_prefix=False, user_defined=USER_DEFINED)


def differences_from_sentencepiece(folder: Path, vocab_size: int) -> list[str]:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    found = tokenize_with_llama(write_vocabulary(folder, vocab_size), TEXTS)
    return [text for text, got in zip(TEXTS, found, strict=True) if pieces.encode(text) != got]


def test_a_tokenizer_json_as_llama_2s_is_tokenized_alike(llama2: Path, tmp_path: Path) -> None:
    folder = convert_sentencepiece(llama2, tmp_path, prefix="normalizer")

    metadata = read_tokenizer(folder, VOCAB + 3)

    assert metadata.notes == ()
    assert metadata.values["tokenizer.ggml.model"] == Value("string", "llama")
    assert metadata.values["tokenizer.ggml.add_space_prefix"] == Value("bool", True)
    assert find_differences(folder, (*TEXTS, *SPECIALS), VOCAB + 3) == []


def test_a_tokenizer_json_as_gemmas_is_tokenized_alike(gemma: Path, tmp_path: Path) -> None:
    folder = convert_sentencepiece(gemma, tmp_path, prefix="none", user_defined=USER_DEFINED)
    texts = (*TEXTS, *SPECIALS, *with_specials("<s>", "<turn>"))

    assert find_differences(folder, texts, VOCAB) == []
    space = read_tokenizer(folder, VOCAB).values["tokenizer.ggml.add_space_prefix"]
    assert space == Value("bool", False)


def test_a_blank_that_is_put_only_first_is_noted(llama2: Path, tmp_path: Path) -> None:
    folder = convert_sentencepiece(llama2, tmp_path, prefix="first")

    assert any("only at the beginning" in note for note in read_tokenizer(folder, VOCAB).notes)
    plain = [text for text in TEXTS if not text.startswith((" ", "\u2581"))]
    assert find_differences(folder, plain, VOCAB) == []
    assert find_differences(folder, ["a</s>b", " a"], VOCAB) != []


def test_scores_from_merges_rank_as_sentencepieces_own(llama2: Path, tmp_path: Path) -> None:
    folder = convert_sentencepiece(llama2, tmp_path, prefix="normalizer")
    scores = read_tokenizer(folder, VOCAB).values["tokenizer.ggml.scores"]
    assert isinstance(scores, Array)
    own = [token.score for token in read_piece_model(llama2 / "tokenizer.model").pieces]

    ranked = sorted(range(VOCAB), key=lambda id_: (-float(scores.items[id_]), id_))
    normal = [id_ for id_ in ranked if own[id_] < 0]

    assert [own[id_] for id_ in normal] == sorted((own[id_] for id_ in normal), reverse=True)


def test_a_tokenizer_model_alone_is_tokenized_as_sentencepiece_does(
    llama2: Path, gemma: Path
) -> None:
    assert differences_from_sentencepiece(llama2, VOCAB + 2) == []
    assert differences_from_sentencepiece(gemma, VOCAB) == []


def test_a_unigram_model_is_tokenized_as_sentencepiece_does(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path, model_type="unigram", vocab=400)

    values = read_tokenizer(folder, 400).values

    assert values["tokenizer.ggml.model"] == Value("string", "t5")
    assert values["tokenizer.ggml.remove_extra_whitespaces"] == Value("bool", True)
    assert values["tokenizer.ggml.unknown_token_id"] == Value("uint32", 0)
    assert differences_from_sentencepiece(folder, 400) == []


def test_the_reader_of_tokenizer_model_agrees_with_sentencepiece(gemma: Path) -> None:
    model = read_piece_model(gemma / "tokenizer.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(gemma / "tokenizer.model"))

    assert len(model.pieces) == pieces.get_piece_size() == VOCAB
    for id_, token in enumerate(model.pieces):
        assert token.text == pieces.id_to_piece(id_)
        assert token.score == pytest.approx(pieces.get_score(id_), abs=0)
        assert (token.kind is TokenKind.UNKNOWN) == pieces.is_unknown(id_)
        assert (token.kind is TokenKind.CONTROL) == pieces.is_control(id_)
        assert (token.kind is TokenKind.BYTE) == pieces.is_byte(id_)
    assert (model.add_dummy_prefix, model.remove_extra_whitespaces) == (False, False)
    assert model.normalization == "identity"


def test_every_shortened_tokenizer_model_is_an_error_or_a_shorter_list(
    llama2: Path, tmp_path: Path
) -> None:
    content = (llama2 / "tokenizer.model").read_bytes()
    for length in range(0, len(content), 97):
        path = tmp_path / "tokenizer.model"
        path.write_bytes(content[:length])
        with contextlib.suppress(CheckpointError):
            assert len(read_piece_model(path).pieces) <= VOCAB


def test_no_bytes_make_the_reader_fail_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for content in (b"\x0a\xff\xff\xff\xff\x0f", b"\xff" * 12, b"\x0a\x02\x18\x63", b"\x08\x01"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
            read_piece_model(path)


def test_added_tokens_of_the_config_go_before_those_of_the_old_file(
    llama2: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes((llama2 / "tokenizer.model").read_bytes())
    write_json(tmp_path / "added_tokens.json", {"<old>": 700, "<tool>": 701})
    write_json(
        tmp_path / "tokenizer_config.json",
        {
            "added_tokens_decoder": {"700": {"content": "<new>", "special": True}},
            "bos_token": "<s>",
            "eos_token": "</s>",
            "add_bos_token": False,
        },
    )

    values = read_tokenizer(tmp_path, 702).values

    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert isinstance(tokens, Array)
    assert isinstance(kinds, Array)
    assert tokens.items[700:] == ["<new>", "<tool>"]
    assert kinds.items[700:] == [3, 4]
    assert kinds.items[0] == 2
    assert values["tokenizer.ggml.add_bos_token"] == Value("bool", False)
    assert values["tokenizer.ggml.eos_token_id"] == Value("uint32", 2)


def write_trained_merges(folder: Path, *, prefix: bool) -> Path:
    """A BPE over pieces whose merges are its own, not those that SentencePiece's models give."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    blanks = normalizers.Replace(" ", "\u2581")
    start = [normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*start, blanks])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=specials, show_progress=False)
    words = [word for line in training_lines() for word in line.split()]
    tokenizer.train_from_iterator(words, trainer)
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = tree["added_tokens"][:3]
    tree["model"]["merges"] = [
        merge for merge in tree["model"]["merges"] if "\u2581" not in "".join(merge)[1:]
    ]
    write_folder(folder, json.dumps(tree), ("<s>", "</s>", "<unk>"))
    return folder


def test_merges_of_their_own_go_to_the_bpe_over_pieces(tmp_path: Path) -> None:
    folder = write_trained_merges(tmp_path, prefix=False)

    values = read_tokenizer(folder, 800).values

    assert values["tokenizer.ggml.model"] == Value("string", "gpt2")
    assert values["tokenizer.ggml.pre"] == Value("string", "sarvam-moe")
    assert find_differences(folder, (*TEXTS, *SPECIALS), 800) == []


def test_merges_of_their_own_after_a_blank_are_refused(tmp_path: Path) -> None:
    folder = write_trained_merges(tmp_path, prefix=True)

    with pytest.raises(CheckpointError, match=r"not SentencePiece's .* a blank goes before"):
        read_tokenizer(folder, 800)


@pytest.mark.parametrize(
    ("merges", "ranks"),
    [
        ([("a", "b"), ("ab", "c")], {"ab": 0, "abc": 1}),
        ([("a", "b"), ("ab", "c"), ("a", "bc"), ("b", "c")], {"ab": 0, "abc": 1, "bc": 2}),
        ([("a", "b"), ("ab", "c"), ("b", "c")], None),  # a + bc is a way to abc
        ([("ab", "c"), ("a", "b"), ("a", "bc"), ("b", "c")], None),  # abc has two ranks
        ([("aa", "a"), ("a", "a"), ("a", "aa")], {"aaa": 0, "aa": 0}),
        ([("a", "aa"), ("a", "a"), ("aa", "a")], None),  # the shorter left part first
    ],
)
def test_ranks_need_every_way_to_a_token_together(
    merges: list[tuple[str, str]], ranks: dict[str, int] | None
) -> None:
    vocab: dict[str, int] = {}
    for text in ("a", "b", "c", *(left + right for left, right in merges)):
        vocab.setdefault(text, len(vocab))

    assert rank_pieces({"vocab": vocab}, merges, {}) == ranks


def test_pieces_without_byte_tokens_are_refused(llama2: Path, tmp_path: Path) -> None:
    folder = convert_sentencepiece(llama2, tmp_path, prefix="normalizer")
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change_json(folder / "tokenizer.json", model={**tree["model"], "byte_fallback": False})

    with pytest.raises(CheckpointError, match="token for each byte"):
        read_tokenizer(folder, VOCAB)


def test_a_normalizer_that_llama_cpp_lacks_is_refused(llama2: Path, tmp_path: Path) -> None:
    folder = convert_sentencepiece(llama2, tmp_path, prefix="normalizer")
    lower: dict[str, Any] = {"type": "Lowercase"}
    change_json(folder / "tokenizer.json", normalizer=lower)

    with pytest.raises(CheckpointError, match=r"no counterpart for the normalizer .*Lowercase"):
        read_tokenizer(folder, VOCAB)


def test_pieces_have_no_pre_tokenizer(llama2: Path, tmp_path: Path) -> None:
    folder = convert_sentencepiece(llama2, tmp_path, prefix="normalizer")

    for where in (folder, llama2):
        with pytest.raises(RecipeError, match="only byte-level tokenizers"):
            read_tokenizer(where, VOCAB, pre="llama-bpe")


@pytest.mark.parametrize(
    ("pre_tokenizer", "refused"),
    [
        ({"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}, True),
        ({"type": "Digits", "individual_digits": True}, True),
        ({"type": "Whitespace"}, True),
        (
            {
                "type": "Split",
                "pattern": {"String": " "},
                "behavior": "MergedWithPrevious",
                "invert": False,
            },
            False,
        ),
    ],
)
def test_cuts_before_the_merges_are_refused_where_tokens_reach_over_them(
    pre_tokenizer: dict[str, Any], refused: bool, llama2: Path, tmp_path: Path
) -> None:
    folder = convert_sentencepiece(llama2, tmp_path, prefix="normalizer")
    change_json(folder / "tokenizer.json", pre_tokenizer=pre_tokenizer)

    if refused:
        with pytest.raises(CheckpointError, match="cuts the text before the merges"):
            read_tokenizer(folder, VOCAB)
    else:
        assert find_differences(folder, TEXTS, VOCAB) == []


def test_a_bpe_that_leaves_blanks_as_they_are_is_refused(llama2: Path, tmp_path: Path) -> None:
    folder = convert_sentencepiece(llama2, tmp_path, prefix="normalizer")
    change_json(folder / "tokenizer.json", normalizer=None)

    with pytest.raises(CheckpointError, match="no algorithm for such a BPE"):
        read_tokenizer(folder, VOCAB)


@pytest.mark.parametrize("decoder", [{"x": {"content": "a"}}, {"700": {}}, {"700": 1}, [1]])
def test_damaged_added_tokens_are_named(decoder: Any, llama2: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((llama2 / "tokenizer.model").read_bytes())
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder})

    with pytest.raises(CheckpointError, match="an added token is not a text with its id"):
        read_tokenizer(tmp_path, 702)


def test_a_damaged_chat_template_is_named(llama2: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((llama2 / "tokenizer.model").read_bytes())
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": [{"name": "default"}]})

    with pytest.raises(CheckpointError, match="neither a text nor a list of records"):
        read_tokenizer(tmp_path, 700)
