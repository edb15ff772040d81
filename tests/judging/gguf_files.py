"""GGUF files of Llama checkpoints, written with gguf-py alone: what the gate of llama.cpp loads."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(
    folder: Path,
    path: Path,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    pre: str = "llama-bpe",
    add_bos: bool = True,
    rows: int | None = None,
    part_bytes: int = 0,
) -> Path:
    """Write the Llama checkpoint in `folder` to `path`.

    Args:
        kind: type of the matrices; the other tensors are float32.
        pre: name of the pre-tokenizer.
        add_bos: whether llama.cpp puts a BOS before a text.
        rows: tokens of the vocabulary, if fewer or more than the checkpoint's.
        part_bytes: size of a part of a split file; 0 for one file.

    Returns:
        The file, or its first part.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama", split_max_size=part_bytes)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_file_type(7 if kind == gguf.GGMLQuantizationType.Q8_0 else 0)
    rows = rows or config["vocab_size"]
    _add_tokenizer(writer, folder, rows, pre, add_bos=add_bos)
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = _arrange(name, tensor.float(), config, rows).numpy()
        if values.ndim == 2:
            data = gguf.quants.quantize(values, kind)
            writer.add_tensor(_rename(name), data, raw_dtype=kind)
        else:
            writer.add_tensor(_rename(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if part_bytes == 0 else sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0]


def _rename(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in _NAMES:
        return f"{_NAMES[module]}.{leaf}"
    _, _, block, part = module.split(".", 3)
    return f"blk.{block}.{_NAMES[part]}.{leaf}"


def _arrange(name: str, tensor: Tensor, config: dict[str, int], rows: int) -> Tensor:
    """Rotary pairs of llama.cpp are neighbours; the vocabulary has `rows` rows."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    part = name.split(".")[-2]
    if part in heads:
        halves = tensor.unflatten(0, (config[heads[part]], 2, -1))
        return halves.transpose(1, 2).flatten(0, 2).contiguous()
    if part in ("embed_tokens", "lm_head"):
        padding = torch.zeros(max(0, rows - len(tensor)), tensor.shape[1])
        return torch.cat([tensor[:rows], padding]).contiguous()
    return tensor


def _add_tokenizer(
    writer: gguf.GGUFWriter, folder: Path, rows: int, pre: str, *, add_bos: bool
) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    known = {number: text for text, number in tokenizer["model"]["vocab"].items()} | special
    merges = [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in tokenizer["model"]["merges"]
    ]
    kinds = np.full(rows, gguf.TokenType.NORMAL)
    kinds[list(special)] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([known.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types(kinds.tolist())
    writer.add_token_merges(merges)
    config = json.loads((folder / "config.json").read_text())
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
