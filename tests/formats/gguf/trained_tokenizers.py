"""Small tokenizers in the styles of the model families, trained on the bundled text."""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

CALIBRATION_TEXT = Path(__file__).parents[3] / "calib_data" / "docs_calibration.txt"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
USER_DEFINED = ("<turn>", *("\u2581" * n for n in range(2, 9)), *("\n" * n for n in range(1, 5)))
"""What Gemma's tokenizers have of their own: a marker, runs of blanks and of line breaks."""
SPECIALS = ("<|begin|>", "<|end|>", "<|pad|>")


@cache
def training_lines() -> tuple[str, ...]:
    """Some of the bundled text with a little of other scripts and of numbers."""
    text = CALIBRATION_TEXT.read_text(encoding="utf-8")[:150_000]
    others = (
        "\u6211\u60f3\u5728\u8fd9\u91cc\u5de5\u4f5c \u3053\u3093\u306b\u3061\u306f "
        "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 12 123 1234 2024 1999 3.14 "
        "na\u00efve caf\u00e9 I'm we're DON'T \U0001f680\U0001f680 x  =  y\n\n\n\tif x:\n"
    )
    return tuple(unicodedata.normalize("NFC", text).splitlines(keepends=True)) + (others,) * 40


def write_byte_level(
    folder: Path,
    patterns: tuple[str, ...] = (),
    *,
    digits: bool = False,
    nfc: bool = False,
    ignore_merges: bool = False,
    add_prefix_space: bool = False,
    bos: bool = True,
    eos: bool = False,
    vocab: int = 900,
) -> Path:
    """Write a byte-level BPE tokenizer that splits at `patterns`; without any, as GPT-2 does."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers import pre_tokenizers as pre

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre.Digits(individual_digits=True)] if digits else []
    steps += [pre.Split(Regex(pattern), "isolated") for pattern in patterns]
    steps.append(pre.ByteLevel(add_prefix_space=add_prefix_space, use_regex=not patterns))
    tokenizer.pre_tokenizer = pre.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_lines(), trainer)
    added = ([SPECIALS[0]] if bos else []) + ["$A"] + ([SPECIALS[1]] if eos else [])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(added), special_tokens=[(SPECIALS[0], 0), (SPECIALS[1], 1)]
    )
    write_folder(folder, tokenizer.to_str(), SPECIALS)
    return folder


def write_folder(folder: Path, tokenizer_json: str, specials: tuple[str, str, str]) -> None:
    """Write a checkpoint's tokenizer files: BOS, EOS and padding are `specials`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": specials[0],
            "eos_token": specials[1],
            "pad_token": specials[2],
        },
    )


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write JSON as the files of a checkpoint hold it."""
    path.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")


def change_json(path: Path, **changes: Any) -> None:
    """Set top-level entries of a JSON file."""
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def write_sentencepiece(
    folder: Path,
    *,
    model_type: str = "bpe",
    dummy_prefix: bool = True,
    user_defined: tuple[str, ...] = (),
    vocab: int = 700,
) -> Path:
    """Write a tokenizer.model: BPE as Llama-2 has it, or a unigram model as T5 has it."""
    import sentencepiece

    bpe = model_type == "bpe"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line.strip("\n") for line in training_lines()),
            model_writer=file,
            model_type=model_type,
            vocab_size=vocab,
            byte_fallback=bpe,
            character_coverage=0.9995,
            split_digits=bpe,
            add_dummy_prefix=dummy_prefix,
            remove_extra_whitespaces=not bpe,
            normalization_rule_name="identity" if bpe else "nmt_nfkc",
            allow_whitespace_only_pieces=bpe,
            user_defined_symbols=list(user_defined),
            num_threads=1,
            minloglevel=2,
        )
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"},
    )
    return folder


def convert_sentencepiece(
    source: Path, folder: Path, *, prefix: str, user_defined: tuple[str, ...] = ()
) -> Path:
    """Write the tokenizer.json that transformers makes of a BPE tokenizer.model.

    Args:
        prefix: `normalizer` puts the blank before the text as Llama-2's file does, `first` as
            newer ones do, `none` not at all, as Gemma's does.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from tokenizers import pre_tokenizers as pre
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    ids = range(pieces.get_piece_size())
    vocab = {pieces.id_to_piece(id_): id_ for id_ in ids}
    scores = {pieces.id_to_piece(id_): pieces.get_score(id_) for id_ in ids}
    merges = generate_merges(vocab, scores)
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    blanks = normalizers.Replace(" ", "\u2581")
    if prefix == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), blanks])
    elif prefix == "first":
        tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = blanks
        tokenizer.pre_tokenizer = pre.Split(" ", "merged_with_previous")
    for id_ in ids:
        text = pieces.id_to_piece(id_)
        special = pieces.is_control(id_) or pieces.is_unknown(id_)
        if special or text in user_defined:
            token = AddedToken(text, normalized=False, special=special)
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    write_folder(folder, tokenizer.to_str(), ("<s>", "</s>", "<unk>"))
    return folder
