"""Train models/demo-llama from scratch: corpus, tokenizer, weights.

The whole recipe, in this order, on a Debian 12 machine (two CPU cores, 45 minutes of training):

    mkdir corpus && (cd corpus && apt-get download \\
        python3.11-doc postgresql-doc-15 sqlite3-doc linux-doc-6.1 git-doc)
    python scripts/train_demo_model.py corpus
    python scripts/train_demo_model.py tokenizer
    python scripts/train_demo_model.py train --minutes 45 --output models/demo-llama

The time budget sets the learning-rate schedule, so another machine gives another, equally valid
model: the weights in the repository are kept as they are.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import math
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPLITS = ("train", "valid", "test")
DOCUMENT_END = "\n<|end|>\n"
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
EOS_ID = 1
VOCABULARY = 4096

# --- corpus -----------------------------------------------------------------------------------

MIN_CHARACTERS, MAX_CHARACTERS = 800, 60_000
TEXT_FILES = (".html", ".txt", ".rst", ".txt.gz", ".rst.gz")
NOT_PROSE = re.compile(r"genindex|search|changelog|copyright")


class _PageText(HTMLParser):
    """Collects the text of a page: blocks on lines of their own, no scripts and no navigation."""

    BLOCKS = frozenset(
        {"p", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "pre", "dt", "dd", "br"}
        | {"table", "ul", "ol", "section", "blockquote"}
    )
    SKIPPED = frozenset({"script", "style", "head", "nav", "footer"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipping = 0
        self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipping += tag in self.SKIPPED
        self.preformatted += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipping -= tag in self.SKIPPED and self.skipping > 0
        self.preformatted -= tag == "pre" and self.preformatted > 0
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))


def read_html(html: str) -> str:
    """Return the text of an HTML page."""
    page = _PageText()
    page.feed(html)
    text = re.sub(r"[ \t]+\n", "\n", "".join(page.parts).replace("¶", ""))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def read_document(path: Path) -> str:
    """Return the text of one documentation file."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", "ignore")
    return read_html(text) if path.suffix == ".html" else text


def choose_split(path: Path) -> str:
    """Put one document in 50 into valid and one into test, by the hash of its name."""
    bucket = int(hashlib.sha1(path.name.encode()).hexdigest(), 16) % 50
    return {0: "valid", 1: "test"}.get(bucket, "train")


def make_corpus(folder: Path) -> None:
    """Unpack the .deb files of `folder` and write train.txt, valid.txt and test.txt."""
    unpacked = folder / "unpacked"
    if not unpacked.exists():
        for package in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(package), str(unpacked)], check=True)
    documents: dict[str, list[str]] = {split: [] for split in SPLITS}
    for path in sorted(unpacked.rglob("*")):
        if not path.is_file() or not path.name.endswith(TEXT_FILES) or NOT_PROSE.search(str(path)):
            continue
        text = read_document(path)
        if len(text) >= MIN_CHARACTERS:
            documents[choose_split(path)].append(text[:MAX_CHARACTERS] + DOCUMENT_END)
    for split, texts in documents.items():
        (folder / f"{split}.txt").write_text("".join(texts), encoding="utf-8")
        print(f"{split}: {len(texts)} documents")


# --- tokenizer --------------------------------------------------------------------------------

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer(folder: Path) -> None:
    """Train the byte-level BPE on a quarter of train.txt; write tokenizer.json and the ids.

    The ids go to train.npy, valid.npy and test.npy, uint16, each document ended by EOS.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = (folder / "train.txt").read_text(encoding="utf-8")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    samples = (text[start : start + 20_000] for start in range(0, len(text), 80_000))
    tokenizer.train_from_iterator(samples, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    for split in SPLITS:
        ids = np.fromiter(encode_split(tokenizer, folder / f"{split}.txt"), dtype=np.uint16)
        np.save(folder / f"{split}.npy", ids)
        print(f"{split}: {len(ids)} tokens")


def encode_split(tokenizer: Tokenizer, path: Path) -> Iterator[int]:
    """Yield the ids of all documents of a split, each ended by EOS."""
    documents = path.read_text(encoding="utf-8").split(DOCUMENT_END)
    for start in range(0, len(documents), 500):
        for encoding in tokenizer.encode_batch(documents[start : start + 500]):
            yield from encoding.ids
            yield EOS_ID


# --- training ---------------------------------------------------------------------------------

BATCH, LENGTH = 8, 256
ADAM_RATE, MUON_RATE = 6e-3, 0.02
MUON_MOMENTUM, MUON_DECAY = 0.95, 0.01
WARMUP_STEPS, MIN_SHARE, DECAY_SHARE = 100, 0.02, 0.7
VALID_WINDOWS = 64


@dataclass
class Muon:
    """Momentum orthogonalized by Newton-Schulz, for matrices (Jordan et al., 2024)."""

    parameters: list[torch.nn.Parameter]
    momenta: list[Tensor]

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Move every matrix by `share` of the full rate, and clear its gradient."""
        rate = MUON_RATE * share
        for parameter, momentum in zip(self.parameters, self.momenta, strict=True):
            gradient = parameter.grad
            if gradient is None:
                raise RuntimeError("a hidden matrix has no gradient")
            momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
            update = orthogonalize(gradient.lerp(momentum, MUON_MOMENTUM))
            aspect = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
            parameter.mul_(1 - rate * MUON_DECAY)
            parameter.add_(update, alpha=-rate * aspect)
            parameter.grad = None


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return nearly U V^T of the matrix U S V^T by the quintic Newton-Schulz iteration of Muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    transposed = x.shape[0] > x.shape[1]
    if transposed:
        x = x.T
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if transposed else x


def build_model() -> LlamaForCausalLM:
    """Return the untrained model of 5.77 million parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=EOS_ID,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def learning_share(step: int, elapsed: float, budget: float) -> float:
    """Return the share of the full rate: linear warm-up, flat, linear decay over the last 70 %."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * min(1.0, max(MIN_SHARE, (1 - elapsed / budget) / DECAY_SHARE))


def train_model(folder: Path, output: Path, minutes: float) -> None:
    """Train for `minutes` on train.npy, print the perplexity on valid.npy, and save in bfloat16."""
    torch.manual_seed(0)
    model = build_model()
    names = dict(model.named_parameters())
    hidden = [p for name, p in names.items() if p.dim() == 2 and "layers." in name]
    rest = [p for name, p in names.items() if not (p.dim() == 2 and "layers." in name)]
    muon = Muon(hidden, [torch.zeros_like(parameter) for parameter in hidden])
    adam = torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.97), weight_decay=0, fused=True)
    train = np.load(folder / "train.npy")
    generator = np.random.default_rng(0)
    budget, start, step = 60 * minutes, time.monotonic(), 0
    while (elapsed := time.monotonic() - start) < budget:
        rows = generator.integers(0, len(train) - LENGTH - 1, BATCH)
        windows = np.stack([train[row : row + LENGTH] for row in rows]).astype(np.int64)
        ids = torch.from_numpy(windows)
        share = learning_share(step, elapsed, budget)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for group in adam.param_groups:
            group["lr"] = ADAM_RATE * share
        adam.step()
        muon.step(share)
        adam.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0:
            speed = step * BATCH * LENGTH / elapsed
            print(f"step {step} loss {loss.item():.3f} {elapsed:.0f} s {speed:.0f} tokens/s")
    print(
        f"perplexity on held-out documents: {measure_perplexity(model, folder / 'valid.npy'):.2f}"
    )
    save(model, folder / "tokenizer.json", output)


def measure_perplexity(model: LlamaForCausalLM, path: Path) -> float:
    """Return the perplexity on the first `VALID_WINDOWS` windows of a token file."""
    ids = np.load(path)[: VALID_WINDOWS * LENGTH].astype(np.int64)
    model.eval()
    with torch.inference_mode():
        rows = torch.from_numpy(ids).view(VALID_WINDOWS, 1, LENGTH)
        nll = sum(model(row, labels=row).loss.item() for row in rows) / VALID_WINDOWS
    return math.exp(nll)


def save(model: LlamaForCausalLM, tokenizer_file: Path, output: Path) -> None:
    """Write the model in bfloat16 and its tokenizer with the chat template."""
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(output)


def main() -> None:
    """Parse the arguments and run one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=Path("corpus"), help="working folder")
    stages = parser.add_subparsers(dest="stage", required=True)
    stages.add_parser("corpus", help="unpack the packages and collect their text")
    stages.add_parser("tokenizer", help="train the tokenizer and write the token files")
    train = stages.add_parser("train", help="train the model")
    train.add_argument("--minutes", type=float, default=45.0)
    train.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    match arguments.stage:
        case "corpus":
            make_corpus(arguments.corpus)
        case "tokenizer":
            make_tokenizer(arguments.corpus)
        case "train":
            train_model(arguments.corpus, arguments.output, arguments.minutes)


if __name__ == "__main__":
    main()
