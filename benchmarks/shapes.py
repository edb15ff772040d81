"""Llamas of random weights in named shapes, written tensor by tensor in bounded memory.

The weights of a matrix are normal with a deviation of 0.02, seeded by the tensor's name, so that a
shortened model has the first blocks of the whole one. How long a job takes, and how much memory,
depends on the shape and not on the values.

usage: python benchmarks/shapes.py SHAPE FOLDER [--layers N] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from measure import ROOT

DEMO = ROOT / "models" / "demo-llama"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DEVIATION = 0.02
CHUNK = 1 << 24
"""Weights that are made and written at a time: 64 MiB in float32."""
SPARE_BYTES = 2_000_000_000
"""What must be left on the disk beside a checkpoint."""


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden // self.heads

    @property
    def block_weights(self) -> int:
        """Weights of the linear layers of one decoder block."""
        shapes = block_matrices(self).values()
        return sum(rows * columns for rows, columns in shapes)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the whole checkpoint's tensors in bfloat16."""
        shapes = (shape for shard in shards(self) for shape in shard.values())
        return sum(2 * _count(shape) for shape in shapes)

    def shortened(self, layers: int) -> Shape:
        """Return the same model with its first blocks only."""
        return replace(self, layers=layers)


def _table(*rows: Shape) -> Mapping[str, Shape]:
    return MappingProxyType({row.name: row for row in rows})


SHAPES: Mapping[str, Shape] = _table(
    Shape("demo", 256, 768, 6, 4, 2, 4096, tied=True),
    Shape("tiny", 128, 256, 2, 2, 1, 4096),
    Shape("0.5b", 896, 4864, 24, 14, 2, 32_000),
    Shape("2gb", 2048, 5632, 20, 32, 8, 32_000),
    Shape("16gb", 4096, 14_336, 32, 32, 8, 128_256),
    Shape("70b-block", 8192, 28_672, 2, 64, 8, 4096),
)
"""`demo` is the bundled model; `0.5b` has the blocks of Qwen2-0.5B, `16gb` is Llama-3.1-8B, and
`70b-block` two blocks of Llama-3.1-70B with a small vocabulary."""


def block_matrices(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return the linear layers of a decoder block: name -> (rows, columns)."""
    kv = shape.kv_heads * shape.head_dim
    return {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }


def shards(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the tensors of each shard: the embedding, each decoder block, the head."""
    yield {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    norms = ("input_layernorm", "post_attention_layernorm")
    block: dict[str, tuple[int, ...]] = {
        **block_matrices(shape),
        **dict.fromkeys(norms, (shape.hidden,)),
    }
    for index in range(shape.layers):
        yield {f"model.layers.{index}.{name}.weight": size for name, size in block.items()}
    last: dict[str, tuple[int, ...]] = {"model.norm.weight": (shape.hidden,)}
    if not shape.tied:
        last["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    yield last


def make_config(shape: Shape) -> dict[str, Any]:
    """Return config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 2048,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": shape.tied,
        "vocab_size": shape.vocabulary,
    }


def write_checkpoint(shape: Shape, folder: Path, device: str = "cpu") -> int:
    """Write a checkpoint of random weights with the bundled tokenizer.

    Args:
        shape: its dimensions.
        folder: where it goes; config.json is written last, so that a folder with one is whole.
        device: where the numbers are drawn: other numbers on another kind of device.

    Returns:
        The bytes of its weights.

    Raises:
        SystemExit: the disk has no room for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = shape.weight_bytes + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{shape.name} needs {needed / 1e9:.0f} GB in {folder} and {free / 1e9:.0f} GB are free"
        )
    written = list(shards(shape))
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(written, start=1):
        name = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        _write_shard(folder / name, shapes, device)
        weight_map |= dict.fromkeys(shapes, name)
    index = {"metadata": {"total_size": shape.weight_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for file in TOKENIZER_FILES:
        shutil.copyfile(DEMO / file, folder / file)
    (folder / "config.json").write_text(json.dumps(make_config(shape), indent=2))
    return shape.weight_bytes


def _write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]], device: str) -> None:
    """Write one safetensors file: the header's length, the header, the tensors one by one."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + 2 * _count(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in shapes.items():
            for chunk in _draw(name, shape, device):
                stream.write(chunk)


def _draw(name: str, shape: tuple[int, ...], device: str) -> Iterator[memoryview]:
    """Yield a tensor's bytes: normal numbers for a matrix, ones for a norm."""
    import torch

    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    count = _count(shape)
    for start in range(0, count, CHUNK):
        values = torch.ones(min(CHUNK, count - start), device=device)
        if len(shape) > 1:
            values.normal_(0.0, DEVIATION, generator=generator)
        yield values.to(torch.bfloat16).cpu().view(torch.uint8).numpy().data


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def main() -> None:
    """Parse the arguments and write a checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=[name for name in SHAPES if name != "demo"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="only so many of the first blocks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    shape = shape.shortened(arguments.layers or shape.layers)
    written = write_checkpoint(shape, arguments.folder, arguments.device)
    print(f"{arguments.folder}: {shape.layers} layers, {written / 1e9:.2f} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
