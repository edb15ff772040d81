"""INT4 decoders in ONNX: quantkit against onnxruntime-genai's model builder, block for block.

For each model and group size one job of quantkit writes the compressed-tensors artifact and the
ONNX graph, with the same codes. The builder makes its own graph from the same checkpoint, with each
of its three algorithms. Embeddings and head stay in float in both, so that only the codes of the
layers differ; in the last rows of groups of 32 both round these two as well, the builder as it
comes. One judge, quantkit's gate, measures all of them on the same evaluation windows. At accuracy
level 0 the runtime multiplies in float32; at 4, the builder's default on CPUs, it rounds inputs to
INT8 in blocks.

Speed is measured through onnxruntime-genai on two threads: prefill of 512 tokens, then 128 tokens
one by one; the graphs take turns, and the median of the turns counts. The bundled models are too
small to wait for memory, so that INT4 gains less here than on large ones.

usage: python benchmarks/onnx_decoder.py [--models demo outlier qwen3] [--group-sizes 128 32]
           [--efforts normal best] [--turns 7] [--work artifacts/onnx-decoder]
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contest import export_windows, judge
from measure import (
    ROOT,
    describe_commit,
    describe_machine,
    package_versions,
    run_measured,
    write_results,
)
from quality_models import ensure_model

MODELS = ("demo", "outlier", "qwen3")
EFFORTS = ("fast", "normal", "best")
ALGORITHMS = ("default", "rtn", "k_quant")
RECIPE = "onnx-int4"
BOTH_FORMATS = "{format: compressed-tensors}, {format: onnx}"
BUILDER_GROUP_SIZE = 32
"""The builder's default."""
PREFILL, DECODE, THREADS = 512, 128, 2
PACKAGES = ("quantkit", "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai")
SUFFIXES = (".onnx", ".data", ".safetensors")


Rate = tuple[float | None, float | None]
"""Tokens per second of prefill and of decoding; None where onnxruntime-genai does not run it."""
NO_RATE: Rate = (None, None)


@dataclass(frozen=True)
class Contestant:
    """An artifact to judge: a folder, or the graph's folder of a job."""

    name: str
    folder: Path


@dataclass(frozen=True)
class Row:
    """One artifact; what follows its rate is None for the graph that is not quantized."""

    model: str
    group_size: int
    name: str
    file_bytes: int
    prefill: float | None
    decode: float | None
    kl: float | None = None
    perplexity: float | None = None
    agreement: float | None = None


# --- the contestants ----------------------------------------------------------------------------


def compete(
    model: Path, group_size: int, efforts: Sequence[str], work: Path
) -> Iterator[Contestant]:
    """Make every artifact of one model and group size."""
    for effort in efforts:
        output = run_quantkit(model, work / f"quantkit-{effort}", group_size, effort)
        graph = output / "onnx"
        yield Contestant(f"quantkit, {effort}: transformers", output / "compressed-tensors")
        yield Contestant(f"quantkit, {effort}: ONNX, level 0", graph)
        quick = set_accuracy_level(graph, work / f"quantkit-{effort}-level-4", 4)
        yield Contestant(f"quantkit, {effort}: ONNX, level 4", quick)
    kept = "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"
    for algorithm, level in (*((each, 0) for each in ALGORITHMS), ("k_quant", 4)):
        options = [f"algo_config={algorithm}", f"accuracy_level={level}", kept]
        options += [f"block_size={group_size}", "shared_embeddings=false"]
        folder = run_builder(model, work / f"builder-{algorithm}-{level}", options)
        yield Contestant(f"builder, {algorithm}: level {level}", folder)
    if group_size == BUILDER_GROUP_SIZE:
        tables = "{format: onnx, accuracy_level: 4, embeddings: int4, lm_head: int4}"
        output = run_quantkit(model, work / "quantkit-small", group_size, efforts[0], tables)
        yield Contestant(f"quantkit, {efforts[0]}: all in INT4, level 4", output / "onnx")
        yield Contestant("builder as it comes", run_builder(model, work / "builder", ()))


def run_quantkit(
    model: Path, output: Path, group_size: int, effort: str, exports: str = BOTH_FORMATS
) -> Path:
    """Run one job from the command line; return its folder."""
    settings = {
        "quantize.group_size": group_size,
        "quantize.effort": effort,
        "export": f"[{exports}]",
    }
    words = [sys.executable, "-m", "quantkit", "quantize", str(model), "--recipe", RECIPE]
    for name, value in settings.items():
        words += ["--set", f"{name}={value}"]
    words += ["--no-gate", "--overwrite", "--quiet", "--device", "cpu", "--output", str(output)]
    run_measured(words, output.with_suffix(".log"))
    return output


def set_accuracy_level(folder: Path, target: Path, level: int) -> Path:
    """Copy an ONNX folder with another accuracy level, as the key of that name gives it."""
    import onnx

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    graph = onnx.load(target / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        if node.op_type == "MatMulNBits":
            rest = [each for each in node.attribute if each.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*rest, onnx.helper.make_attribute("accuracy_level", level)])
    onnx.save(graph, target / "model.onnx")
    return target


def run_builder(model: Path, output: Path, options: Sequence[str]) -> Path:
    """Let onnxruntime-genai's builder write an INT4 graph for CPUs; return its folder."""
    shutil.rmtree(output, ignore_errors=True)
    words = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model)]
    words += ["-o", str(output), "-p", "int4", "-e", "cpu", "-c", str(output.parent / "cache")]
    if options:
        words += ["--extra_options", *options]
    run_measured(words, output.with_suffix(".log"))
    return output


def write_float_graph(model: Path, folder: Path) -> Path:
    """Write the graph that is not quantized, for the speed that INT4 is compared with."""
    from quantkit.checkpoint.reader import open_checkpoint
    from quantkit.checkpoint.source import resolve_source
    from quantkit.formats.onnx.decoder import write_float_decoder

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return write_float_decoder(open_checkpoint(resolve_source(str(model))), folder)


# --- speed --------------------------------------------------------------------------------------


def load_graph(folder: Path) -> Any:
    """Load a graph in onnxruntime-genai."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(folder))
    options = {"session_options": {"intra_op_num_threads": THREADS}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    return onnxruntime_genai.Model(config)


def time_once(model: Any, prompt: np.ndarray) -> tuple[float, float]:
    """Return the seconds of one prefill and of the tokens after it."""
    import onnxruntime_genai

    length = len(prompt) + DECODE
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, min_length=length, max_length=length)
    generator = onnxruntime_genai.Generator(model, parameters)
    started = time.perf_counter()
    generator.append_tokens(prompt)
    filled = time.perf_counter()
    count = 0
    while not generator.is_done():
        generator.generate_next_token()
        count += 1
    if count != DECODE:
        raise SystemExit(f"onnxruntime-genai gave {count} tokens in place of {DECODE}")
    return filled - started, time.perf_counter() - filled


def measure_speed(folders: Sequence[Path], turns: int) -> list[Rate]:
    """Return the tokens per second of prefill and decoding of each graph, measured in turns."""
    prompt = np.random.default_rng(0).integers(100, 4000, PREFILL).astype(np.int32)
    models = [load_graph(folder) for folder in folders]
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    for turn in range(turns + 1):
        for model, taken in zip(models, times, strict=True):
            measured = time_once(model, prompt)
            if turn:  # the first one warms up
                taken.append(measured)
    return [
        (
            PREFILL / statistics.median(prefill for prefill, _ in taken),
            DECODE / statistics.median(decode for _, decode in taken),
        )
        for taken in times
    ]


# --- judging ------------------------------------------------------------------------------------


def count_bytes(folder: Path) -> int:
    """Return the bytes of graphs and weights."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in SUFFIXES)


def measure(
    name: str,
    model: Path,
    group_size: int,
    contestants: Sequence[Contestant],
    arguments: argparse.Namespace,
) -> list[Row]:
    """Measure all artifacts of one model: quality on the same windows, speed in turns."""
    plain = write_float_graph(model, arguments.work / name / "float")
    graphs = [plain, *(each.folder for each in contestants if is_graph(each.folder))]
    speeds = dict(zip(graphs, measure_speed(graphs, arguments.turns), strict=True))
    rows = [Row(name, group_size, "not quantized: ONNX", count_bytes(plain), *speeds[plain])]
    for contestant in contestants:
        folder = contestant.folder
        runtime = "onnxruntime" if is_graph(folder) else "transformers"
        found = judge(model, folder, arguments.work / "evaluation.npy", runtime=runtime)
        rows.append(
            Row(
                name,
                group_size,
                contestant.name,
                count_bytes(folder),
                *speeds.get(folder, NO_RATE),
                found.kl,
                found.perplexity,
                found.agreement,
            )
        )
        print(render_row(rows[-1]), file=sys.stderr, flush=True)
    return rows


def is_graph(folder: Path) -> bool:
    """Whether onnxruntime-genai runs what is in a folder."""
    return (folder / "genai_config.json").exists()


# --- the whole run ------------------------------------------------------------------------------


def render(rows: Sequence[Row]) -> str:
    """The tables in Markdown, one a model and group size."""
    lines: list[str] = []
    for model, group_size in dict.fromkeys((row.model, row.group_size) for row in rows):
        lines += [
            f"## {model}, groups of {group_size}",
            "",
            "| artifact | size, MB | KL, nats | PPL | top-1 | prefill, tokens/s "
            "| decode, tokens/s |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        chosen = [row for row in rows if (row.model, row.group_size) == (model, group_size)]
        lines += [render_row(row) for row in chosen]
        lines.append("")
    return "\n".join(lines)


def render_row(row: Row) -> str:
    """One line of a table."""
    quality = " | | "
    if row.kl is not None:
        quality = f"{row.kl:.5f} | {row.perplexity:.3f} | {row.agreement:.2%}"
    speed = " | " if row.prefill is None else f"{row.prefill:.0f} | {row.decode:.0f}"
    return f"| {row.name} | {row.file_bytes / 1e6:.2f} | {quality} | {speed} |"


def main() -> None:
    """Run the contest and write its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--group-sizes", nargs="+", type=int, default=(128, 32))
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS, default=("normal", "best"))
    parser.add_argument("--turns", type=int, default=7, help="timed runs of each graph")
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "onnx-decoder")
    parser.add_argument("--results", default="onnx_decoder", help="name of the files in results/")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    windows = export_windows(arguments.work)
    rows: list[Row] = []
    for name in arguments.models:
        model = ensure_model(name, arguments.work / "models")
        for group_size in arguments.group_sizes:
            work = arguments.work / name / str(group_size)
            work.mkdir(parents=True, exist_ok=True)
            contestants = list(compete(model, group_size, arguments.efforts, work))
            found = measure(name, model, group_size, contestants, arguments)
            rows += found
            print(render(found), flush=True)
    document = {
        "machine": describe_machine(),
        "commit": describe_commit(),
        "versions": package_versions(PACKAGES),
        "command": shlex.join(["python", "benchmarks/onnx_decoder.py", *sys.argv[1:]]),
        "windows": windows["evaluation"],
        "threads": THREADS,
        "turns": arguments.turns,
        "rows": [asdict(row) for row in rows],
    }
    versions = ", ".join(f"{name} {found}" for name, found in package_versions(PACKAGES).items())
    foot = (
        f"{describe_machine()['processor']}, {THREADS} threads; {versions}; "
        f"commit {document['commit']}; command: `{document['command']}`\n"
    )
    write_results(arguments.results, document, f"{render(rows)}\n{foot}")


if __name__ == "__main__":
    main()
