"""Tiny encoders with real tokenizers, as transformers and sentence-transformers load them."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TEXT = Path(__file__).parent.parent / "calib_data" / "docs_calibration.txt"

VOCABULARY = 600
POSITIONS = 128
"""Tokens of the longest text that every encoder takes."""

BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

ARCHITECTURES = (
    "BertModel",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "RobertaModel",
    "RobertaForSequenceClassification",
    "XLMRobertaModel",
    "XLMRobertaForSequenceClassification",
    "DistilBertModel",
    "DistilBertForSequenceClassification",
    "ModernBertModel",
    "ModernBertForSequenceClassification",
)
"""What `write_encoder_checkpoint` is used with; other classes of the same families work too."""


def write_encoder_checkpoint(
    folder: Path,
    architecture: str = "BertModel",
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    labels: tuple[str, ...] = ("bad", "fair", "good"),
    pooling: str | None = "mean",
    normalize: bool = True,
) -> Path:
    """Write a random float32 encoder as a Hugging Face folder and return the folder.

    Weights have variance 2 / in_features, biases and the deviations of norms from 1 a standard
    deviation of 0.1; embeddings are of order 1, so that texts of different words get different
    outputs. `labels` is for classifiers. With `pooling` (embeddings only) the folder has the files
    of sentence-transformers.
    """
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**_config_of(architecture, hidden, layers))
    if "For" in architecture:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    model = model_class(config).eval()
    _fill(model, seed)
    config.architectures = [architecture]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_encoder_tokenizer(folder, architecture)
    if pooling is not None and "For" not in architecture:
        _write_modules(folder, hidden, pooling, normalize=normalize)
    return folder


def encoder_sentences(count: int, skip: int = 0) -> list[str]:
    """Return `count` different lines of the training text, `skip` others left out before them."""
    lines = (line.strip() for line in TEXT.read_text(encoding="utf-8").splitlines())
    found = list(dict.fromkeys(line for line in lines if len(line.split()) >= 4))
    return found[skip : skip + count]


def _config_of(architecture: str, hidden: int, layers: int) -> dict[str, Any]:
    """Arguments of the config class: the families call the same things by different names."""
    sizes = {"vocab_size": VOCABULARY}
    if architecture.startswith("DistilBert"):
        return sizes | {
            "dim": hidden,
            "hidden_dim": 2 * hidden,
            "n_layers": layers,
            "n_heads": 4,
            "max_position_embeddings": POSITIONS,
            "pad_token_id": 0,
        }
    sizes |= {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
    }
    if architecture.startswith("ModernBert"):
        specials = {"cls_token_id": 0, "bos_token_id": 0, "pad_token_id": 1}
        return sizes | specials | {"sep_token_id": 2, "eos_token_id": 2, "local_attention": 16}
    if architecture.startswith(("Bert", "Electra")):
        # Electra's embeddings may be narrower than its layers.
        return sizes | {"pad_token_id": 0, "type_vocab_size": 2, "embedding_size": hidden // 2}
    # Positions of RoBERTa begin behind the padding's id.
    positions = {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1}
    return sizes | positions | {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


def _fill(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2 and "embeddings" in name:
                # Types and positions weigh less than words.
                parameter.copy_(noise if parameter.shape[0] == VOCABULARY else 0.3 * noise)
            elif parameter.ndim == 2:
                parameter.copy_(noise * (2 / parameter.shape[1]) ** 0.5)
            else:
                parameter.copy_(0.1 * noise + float(name.endswith("weight")))
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0


def write_encoder_tokenizer(folder: Path, architecture: str) -> None:
    """Write the trained tokenizer of the architecture's family."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    kind = _kind_of(architecture)
    bert = kind == "wordpiece"
    pad, unknown, start, end, mask = (
        BERT_SPECIALS if bert else tuple(ROBERTA_SPECIALS[index] for index in (1, 3, 0, 2, 4))
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind)),
        pad_token=pad,
        unk_token=unknown,
        cls_token=start,
        sep_token=end,
        mask_token=mask,
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"]
        if architecture.startswith(("Bert", "Electra"))
        else ["input_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)


def _kind_of(architecture: str) -> str:
    if architecture.startswith(("Bert", "DistilBert", "Electra")):
        return "wordpiece"
    return "unigram" if architecture.startswith("XLMRoberta") else "bytes"


def _training_text() -> str:
    return TEXT.read_text(encoding="utf-8")[:40_000]


def _wordpieces() -> dict[str, int]:
    """Return a vocabulary of characters, and of beginnings and endings that save the most pieces.

    The trainer of WordPiece breaks ties by chance, another way in each process.
    """
    words = Counter(re.findall(r"[a-z]+", _training_text().lower()))
    saved: Counter[str] = Counter()
    for word, count in words.items():
        for cut in range(len(word)):
            saved[word[: cut + 1]] += count * cut
            if cut:
                saved[f"##{word[cut:]}"] += count * (len(word) - cut - 1)
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = [*BERT_SPECIALS, *letters, *(f"##{letter}" for letter in letters)]
    best = sorted(saved.keys() - set(pieces), key=lambda piece: (-saved[piece], piece))
    return {piece: number for number, piece in enumerate([*pieces, *best][:VOCABULARY])}


@functools.cache
def _trained(kind: str) -> str:
    """Train a tokenizer on the head of the calibration text; return its tokenizer.json."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(_wordpieces(), unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer: Any = None
        single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
        specials = [("[CLS]", 2), ("[SEP]", 3)]
    else:
        single, pair = "<s> $A </s>", "<s> $A </s> </s> $B </s>"
        specials = [("<s>", 0), ("</s>", 2)]
        sizes = {
            "vocab_size": VOCABULARY,
            "special_tokens": list(ROBERTA_SPECIALS),
            "show_progress": False,
        }
        if kind == "unigram":
            tokenizer = Tokenizer(models.Unigram())
            tokenizer.normalizer = normalizers.NFKC()
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
            tokenizer.decoder = decoders.Metaspace()
            trainer = trainers.UnigramTrainer(unk_token="<unk>", **sizes)
        else:
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **sizes)
    if trainer is not None:
        tokenizer.train_from_iterator(_training_text().splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=specials
    )
    return str(tokenizer.to_str())


def _write_modules(folder: Path, hidden: int, pooling: str, *, normalize: bool) -> None:
    """Write sentence-transformers' description of what follows the encoder."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    kinds += [("2_Normalize", "Normalize")] if normalize else []
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2))
    modes = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    described: dict[str, Any] = {"word_embedding_dimension": hidden}
    described |= {f"pooling_mode_{name}": mode == pooling for mode, name in modes.items()}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(described, indent=2))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": POSITIONS, "do_lower_case": False}, indent=2)
    )
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {}, "default_prompt_name": None}, indent=2)
    )
