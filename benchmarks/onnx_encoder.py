"""INT8 sentence encoders: quantkit against ONNX Runtime's own quantization, on all-MiniLM-L6-v2.

All contestants start from the same float32 graph, pooling included, and calibrate on the same 256
sentences of docs_calibration.txt. They are judged on 1,000 sentences of docs_evaluation.txt against
the model in PyTorch, by code that shares nothing with quantkit: transformers' tokenizer and model,
mean pooling, cosine of the embeddings, overlap of each sentence's ten nearest. Speed: all of the
sentences in batches of 16, sorted by length, on two threads; the contestants take turns, and the
median of the turns counts.

`scripts/setup_minilm.sh` brings the model.

usage: python benchmarks/onnx_encoder.py [--model FOLDER] [--turns 7]
           [--work artifacts/onnx-encoder]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import (
    ROOT,
    describe_commit,
    describe_machine,
    package_versions,
    run_measured,
    write_results,
)
from onnx_rivals import VARIANTS, prepare_graph, quantize_graph

CALIBRATION = ROOT / "calib_data" / "docs_calibration.txt"
EVALUATION = ROOT / "calib_data" / "docs_evaluation.txt"
CALIBRATION_TEXTS, EVALUATION_TEXTS = 256, 1000
LENGTH = 128
"""Tokens of the longest text."""
BATCH, NEIGHBOURS, THREADS = 16, 10, 2
RECIPE = "onnx-int8-encoder"
SCHEMES = ("w8a8", "w8a8_static")
FLOAT = "FP32 ONNX"
TARGETS = {"cosine": 0.99, "overlap": 0.93, "speedup": 1.5, "size": 0.26}
PACKAGES = ("quantkit", "torch", "transformers", "onnx", "onnxruntime")

Batch = tuple[list[int], dict[str, np.ndarray]]
"""Numbers of the sentences, and the tokenizer's output, int64 [B, T]."""


@dataclass(frozen=True)
class Contestant:
    """A graph to judge. cpu_seconds: of the processor, for making it."""

    name: str
    graph: Path
    cpu_seconds: float


@dataclass(frozen=True)
class Row:
    """One graph. Quality is against PyTorch; `cosine_p1` is the 1st percentile over sentences."""

    name: str
    file_bytes: int
    size: float
    """Of the float32 graph's bytes."""
    cosine: float
    cosine_p1: float
    overlap: float
    sentences_per_second: float
    speedup: float
    """Over the float32 graph."""
    cpu_seconds: float


# --- texts and the reference --------------------------------------------------------------------


def read_sentences(path: Path) -> list[str]:
    """Return the different sentences of 30 to 400 characters of a text, in its order."""
    pieces = re.split(r"(?<=[.!?])\s+|\n+", path.read_text(encoding="utf-8"))
    return list(dict.fromkeys(text for piece in pieces if 30 < len(text := piece.strip()) < 400))


def write_texts(sentences: Sequence[str], path: Path) -> Path:
    """Write sentences as rows of a .jsonl file."""
    rows = (json.dumps({"text": text}, ensure_ascii=False) for text in sentences)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def tokenize(model: Path, sentences: Sequence[str], batch: int) -> list[Batch]:
    """Return batches of sentences of similar length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    batches = []
    for start in range(0, len(order), batch):
        indices = order[start : start + batch]
        texts = [sentences[index] for index in indices]
        found = tokenizer(
            texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="np"
        )
        batches.append((indices, {name: ids.astype(np.int64) for name, ids in found.items()}))
    return batches


def embed_with_torch(model: Path, batches: Sequence[Batch], count: int) -> np.ndarray:
    """Return the embeddings of the float32 model in PyTorch, float32 [N, H], of length 1."""
    import torch
    from transformers import AutoModel

    network = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    found: np.ndarray = np.zeros((count, network.config.hidden_size), dtype=np.float32)
    with torch.inference_mode():
        for indices, inputs in batches:
            tensors = {name: torch.from_numpy(ids) for name, ids in inputs.items()}
            hidden = network(**tensors).last_hidden_state
            mask = tensors["attention_mask"][..., None].float()
            mean = (hidden * mask).sum(1) / mask.sum(1)
            found[indices] = torch.nn.functional.normalize(mean, dim=1).numpy()
    return found


# --- the contestants ----------------------------------------------------------------------------


def make_contestants(model: Path, work: Path, sentences: Sequence[str]) -> Iterator[Contestant]:
    """Make every graph; the float32 graph comes first."""
    plain = write_float_graph(model, work / "fp32")
    yield Contestant(FLOAT, plain, 0.0)
    prepared = work / "prepared.onnx"
    prepare_graph(plain, prepared)
    texts = [inputs for _, inputs in tokenize(model, sentences, 1)]
    for variant in VARIANTS:
        graph = work / f"{variant.key}.onnx"
        started = time.process_time()
        quantize_graph(prepared, graph, variant, texts)
        yield Contestant(f"ONNX Runtime, {variant.name}", graph, time.process_time() - started)
    calibration = write_texts(sentences, work / "calibration.jsonl")
    for scheme in SCHEMES:
        yield run_quantkit(model, work / f"quantkit-{scheme}", scheme, calibration)


def write_float_graph(model: Path, folder: Path) -> Path:
    """Write the graph that all contestants start from and return its file."""
    from quantkit.checkpoint.reader import open_checkpoint
    from quantkit.checkpoint.source import resolve_source
    from quantkit.encoders.model import describe_encoder, load_encoder
    from quantkit.formats.onnx.encoder import write_float_encoder

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checkpoint = open_checkpoint(resolve_source(str(model)))
    info = describe_encoder(checkpoint)
    return write_float_encoder(checkpoint, info, folder, load_encoder(checkpoint, info))


def run_quantkit(model: Path, output: Path, scheme: str, calibration: Path) -> Contestant:
    """Run the shipped recipe from the command line."""
    settings = {
        "quantize.scheme": scheme,
        "calibration.data": calibration,
        "calibration.samples": CALIBRATION_TEXTS,
        "calibration.sequence_length": LENGTH,
    }
    words = [sys.executable, "-m", "quantkit", "quantize", str(model), "--recipe", RECIPE]
    for name, value in settings.items():
        words += ["--set", f"{name}={value}"]
    words += ["--no-gate", "--overwrite", "--quiet", "--device", "cpu", "--output", str(output)]
    measured = run_measured(words, output.with_suffix(".log"))
    graph = output / "onnx" / "model.onnx"
    return Contestant(f"quantkit, {scheme}", graph, measured.cpu_seconds)


# --- judging ------------------------------------------------------------------------------------


def open_session(graph: Path) -> Any:
    """Load a graph in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(str(graph), options, providers=providers)


def embed(session: Any, batches: Sequence[Batch], count: int) -> tuple[np.ndarray, float]:
    """Return the embeddings, float32 [N, H], and the seconds that they took."""
    names = [each.name for each in session.get_inputs()]
    found: list[tuple[list[int], np.ndarray]] = []
    started = time.perf_counter()
    for indices, inputs in batches:
        feed = {name: inputs[name] for name in names}
        found.append((indices, session.run(["sentence_embedding"], feed)[0]))
    seconds = time.perf_counter() - started
    embeddings: np.ndarray = np.zeros((count, found[0][1].shape[1]), dtype=np.float32)
    for indices, values in found:
        embeddings[indices] = values
    return embeddings, seconds


def find_neighbours(embeddings: np.ndarray) -> np.ndarray:
    """Return the numbers of each sentence's nearest, int64 [N, K]."""
    likeness = embeddings @ embeddings.T
    np.fill_diagonal(likeness, -np.inf)
    return np.argsort(-likeness, axis=1, kind="stable")[:, :NEIGHBOURS]


def compare(reference: np.ndarray, embeddings: np.ndarray) -> tuple[float, float, float]:
    """Return the mean cosine, its 1st percentile, and the overlap of the nearest."""
    lengths = np.linalg.norm(embeddings, axis=1)
    cosine = (reference * embeddings).sum(1) / lengths
    nearest = find_neighbours(embeddings / lengths[:, None])
    shared = [
        len(set(ours) & set(theirs)) / NEIGHBOURS
        for ours, theirs in zip(nearest.tolist(), find_neighbours(reference).tolist(), strict=True)
    ]
    return float(cosine.mean()), float(np.percentile(cosine, 1)), statistics.fmean(shared)


def judge(
    contestants: Sequence[Contestant], reference: np.ndarray, batches: Sequence[Batch], turns: int
) -> list[Row]:
    """Measure all graphs: the quality once, the speed in turns."""
    sessions = [open_session(contestant.graph) for contestant in contestants]
    count = len(reference)
    quality = [compare(reference, embed(session, batches, count)[0]) for session in sessions]
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(turns):
        for session, taken in zip(sessions, times, strict=True):
            taken.append(embed(session, batches, count)[1])
    speeds = [count / statistics.median(taken) for taken in times]
    size = contestants[0].graph.stat().st_size
    rows = []
    for contestant, found, speed in zip(contestants, quality, speeds, strict=True):
        file_bytes = contestant.graph.stat().st_size
        rows.append(
            Row(
                contestant.name,
                file_bytes,
                file_bytes / size,
                *found,
                speed,
                speed / speeds[0],
                contestant.cpu_seconds,
            )
        )
    return rows


# --- the whole run ------------------------------------------------------------------------------


def render(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    lines = [
        "| graph | size, MB | of FP32 | cosine | 1st percentile | top-10 overlap | sentences/s "
        "| of FP32 | CPU, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.file_bytes / 1e6:.2f} | {row.size:.3f} | {row.cosine:.5f} "
            f"| {row.cosine_p1:.5f} | {row.overlap:.2%} | {row.sentences_per_second:.0f} "
            f"| {row.speedup:.2f}x | {row.cpu_seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def find_model(given: Path | None) -> Path:
    """Return the model's folder, brought by scripts/setup_minilm.sh where none is given."""
    if given is not None:
        return given
    script = ROOT / "scripts" / "setup_minilm.sh"
    done = subprocess.run([script], check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.strip())


def describe(arguments: argparse.Namespace, rows: Sequence[Row]) -> Mapping[str, Any]:
    """Everything that the results say besides the table."""
    return {
        "machine": describe_machine(),
        "commit": describe_commit(),
        "versions": package_versions(PACKAGES),
        "command": shlex.join(["python", "benchmarks/onnx_encoder.py", *sys.argv[1:]]),
        "model": "all-MiniLM-L6-v2",
        "threads": THREADS,
        "batch": BATCH,
        "turns": arguments.turns,
        "targets": TARGETS,
        "rows": [asdict(row) for row in rows],
    }


def main() -> None:
    """Run the contest and write its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of the encoder")
    parser.add_argument("--turns", type=int, default=7, help="timed runs of each graph")
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "onnx-encoder")
    parser.add_argument("--results", default="onnx_encoder", help="name of the files in results/")
    arguments = parser.parse_args()
    model = find_model(arguments.model)
    arguments.work = arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    drawn = random.Random(0).sample(read_sentences(CALIBRATION), CALIBRATION_TEXTS)
    evaluation = read_sentences(EVALUATION)[:EVALUATION_TEXTS]
    batches = tokenize(model, evaluation, BATCH)
    reference = embed_with_torch(model, batches, len(evaluation))
    contestants = list(make_contestants(model, arguments.work, drawn))
    rows = judge(contestants, reference, batches, arguments.turns)
    document = describe(arguments, rows)
    versions = ", ".join(f"{name} {found}" for name, found in document["versions"].items())
    machine = document["machine"]
    foot = (
        f"{machine['processor']}, {THREADS} threads; {versions}; commit {document['commit']}; "
        f"command: `{document['command']}`\n"
    )
    write_results(arguments.results, document, f"{render(rows)}\n{foot}")


if __name__ == "__main__":
    main()
