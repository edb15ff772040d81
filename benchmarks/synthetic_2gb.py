"""Peak memory on a checkpoint of 2 GB: quantize a Llama of random weights with rtn and gptq.

Writes the checkpoint shard by shard, then runs the real command (`quantize --no-gate`) for each
method as a whole process and compares its peak memory with what quantkit promises: at most
1.2 GB besides the activations of the calibration windows.

usage: python benchmarks/synthetic_2gb.py [--work FOLDER] [--layers 20]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import (
    ROOT,
    Measured,
    describe_commit,
    describe_machine,
    package_versions,
    run_measured,
    write_results,
)

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 32_000
HEADS, KV_HEADS = 32, 8
BOUND_BYTES = 1_200_000_000
WINDOWS, LENGTH = 16, 256
METHODS = ("rtn", "gptq")
PACKAGES = ("quantkit", "torch", "transformers", "compressed-tensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Row:
    """One method: what it took and what it may take."""

    method: str
    measured: Measured
    activation_bytes: int
    artifact_bytes: int

    @property
    def bound_bytes(self) -> int:
        """The promised peak."""
        return BOUND_BYTES + self.activation_bytes


def shard_shapes(layers: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the tensors of each shard: the embedding, each decoder block, the head."""
    kv = KV_HEADS * HIDDEN // HEADS
    yield {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for index in range(layers):
        block = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        yield {f"model.layers.{index}.{name}.weight": shape for name, shape in block.items()}
    yield {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write_checkpoint(folder: Path, layers: int) -> int:
    """Write the checkpoint, one shard in memory at a time; return the bytes of its weights."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shards = list(shard_shapes(layers))
    weight_map: dict[str, str] = {}
    total = 0
    generator = torch.Generator().manual_seed(0)
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for tensor_name, shape in shapes.items():
            values = torch.ones(shape)
            if len(shape) == 2:
                values.normal_(0.0, 0.02, generator=generator)
            tensors[tensor_name] = values.to(torch.bfloat16)
            weight_map[tensor_name] = name
            total += 2 * values.numel()
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(make_config(layers), indent=2))
    for file in TOKENIZER_FILES:
        shutil.copyfile(ROOT / "models" / "demo-llama" / file, folder / file)
    return total


def make_config(layers: int) -> dict[str, Any]:
    """Return config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 2048,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
    }


def job_options(model: Path, output: Path, method: str) -> list[str]:
    """Return the arguments that `plan` and `quantize` share."""
    settings = {
        "quantize.method": method,
        "calibration.samples": WINDOWS,
        "calibration.sequence_length": LENGTH,
    }
    words = ["--recipe", "demo", "--model", str(model), "--output", str(output)]
    for key, value in settings.items():
        words += ["--set", f"{key}={value}"]
    return words


def run_method(model: Path, work: Path, method: str) -> Row:
    """Quantize with one method and measure."""
    output = work / f"artifact-{method}"
    command = [sys.executable, "-m", "quantkit"]
    options = job_options(model, output, method)
    planned = subprocess.run(
        [*command, "plan", *options, "--json"], check=True, capture_output=True, text=True
    )
    activations = json.loads(planned.stdout)["activation_bytes"] if method != "rtn" else 0
    measured = run_measured(
        [*command, "quantize", *options, "--no-gate", "--quiet"], work / f"{method}.log"
    )
    weights = sum(path.stat().st_size for path in output.rglob("*.safetensors"))
    shutil.rmtree(output)
    return Row(method, measured, activations, weights)


def render(document: dict[str, Any], rows: Sequence[Row]) -> str:
    """Return the results as Markdown."""
    machine = document["machine"]
    lines = [
        "# Peak memory on a checkpoint of 2 GB",
        "",
        f"A Llama of random weights: {document['layers']} layers, hidden {HIDDEN}, feed-forward "
        f"{INTERMEDIATE}, vocabulary {VOCABULARY:,}, {document['weight_bytes'] / 1e9:.2f} GB in "
        f"bfloat16. W4A16, groups of 128; gptq with {WINDOWS} windows of {LENGTH} tokens.",
        "",
        "| method | time, s | peak memory, MB | promised, MB | within | artifact, MB |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for row in rows:
        within = "yes" if row.measured.peak_bytes <= row.bound_bytes else "**no**"
        lines.append(
            f"| {row.method} | {row.measured.seconds:.0f} | {row.measured.peak_bytes / 1e6:.0f} "
            f"| {row.bound_bytes / 1e6:.0f} | {within} | {row.artifact_bytes / 1e6:.0f} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines += [
        "",
        f"Promised: {BOUND_BYTES / 1e6:.0f} MB and the activations of the calibration windows as "
        "`quantkit plan` foretells them. Peak memory is the largest resident set of the process "
        "(file pages that it maps included).",
        "",
        f"- machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        f"- quantkit: {versions}; commit {document['commit']}",
        f"- command: `{document['command']}`",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Parse the arguments, write the checkpoint, run both methods; 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--work", type=Path, help="keep the checkpoint and logs in this folder")
    arguments = parser.parse_args()
    work = arguments.work.resolve() if arguments.work else None
    os.chdir(ROOT)

    with tempfile.TemporaryDirectory() as scratch:
        work = work or Path(scratch)
        model = work / f"synthetic-{arguments.layers}"
        if not (model / "config.json").exists():
            # A process of its own: torch in this one would count towards the measured commands.
            words = [sys.executable, __file__, "--write", str(model), str(arguments.layers)]
            subprocess.run(words, check=True)
        weight_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        rows = [run_method(model, work, method) for method in arguments.methods]

    document = {
        "layers": arguments.layers,
        "weight_bytes": weight_bytes,
        "rows": [{**asdict(row), "bound_bytes": row.bound_bytes} for row in rows],
        "machine": describe_machine(),
        "versions": package_versions(PACKAGES),
        "commit": describe_commit(),
        "command": shlex.join(["python", "benchmarks/synthetic_2gb.py", *sys.argv[1:]]),
    }
    write_results("synthetic_2gb", document, render(document, rows))
    return int(any(row.measured.peak_bytes > row.bound_bytes for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_checkpoint(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(main())
