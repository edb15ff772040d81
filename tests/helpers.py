"""Pico models and pseudo-text that the tests share."""

from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] + ': ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

_SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe qui ro su ta ve wi xo yu za bre cli dro flu gra"


def pico_text(words: int, seed: int) -> str:
    """Return `words` words of pseudo-text with sentences and lines; the same for the same seed."""
    draw = random.Random(seed)
    syllables = _SYLLABLES.split()
    lexicon = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(200)]
    pieces: list[str] = []
    left = words
    while left > 0:
        count = min(left, draw.randint(4, 12))
        sentence = " ".join(draw.choices(lexicon, k=count))
        pieces.append(sentence.capitalize() + "." + ("\n" if draw.random() < 0.3 else " "))
        left -= count
    return "".join(pieces)


def write_pico_tokenizer(folder: Path, *, vocab: int = 300, max_length: int = 512) -> None:
    """Write a byte-level BPE tokenizer that prepends a BOS and has a chat template.

    Ids 0, 1, 2 are BOS, EOS and PAD. The vocabulary has at most `vocab` entries (at least 259).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab < 259:
        raise ValueError("a byte-level tokenizer needs vocab >= 259; or pass tokenizer=False")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([pico_text(500, 0)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def make_pico_model(
    folder: Path,
    *,
    family: str = "llama",
    hidden: int = 64,
    intermediate: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 300,
    tied: bool = True,
    dtype: str = "bfloat16",
    shards: int = 1,
    seed: int = 0,
    tokenizer: bool = True,
    max_positions: int = 512,
) -> Path:
    """Write a random model as a Hugging Face folder and return the folder.

    Weights are normal with variance 1 / in_features, norms lie around 1 and biases around 0, so
    that no tensor is trivial. `shards` > 1 writes an index. `family` is any model type of
    transformers that takes a Llama-like config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(
        family,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=max_positions,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _fill(model, seed)
    config.architectures = [type(model).__name__]
    config.dtype = getattr(torch, dtype)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tensors = {
        name: tensor.to(getattr(torch, dtype)).contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    write_shards(folder, tensors, shards)
    if tokenizer:
        write_pico_tokenizer(folder, vocab=vocab, max_length=max_positions)
    return folder


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write `tensors` as model.safetensors, or as `shards` files with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        part = names[shard::shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _fill(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.1)
            else:
                parameter.copy_(1 + noise * 0.1)


@contextmanager
def no_more_files() -> Iterator[None]:
    """No file can be opened while this is open: EMFILE."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
