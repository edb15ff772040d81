"""Peak memory of ONNX exports of a checkpoint of more than 2 GB: a Llama of random weights.

Writes the checkpoint tensor by tensor (as benchmarks/synthetic_2gb.py does), then runs in processes
of their own: the float graph, and a whole job (rtn, no gate) whose only export is an ONNX graph in
INT4. Anonymous memory is sampled every few milliseconds, with a malloc that gives back what was
freed; mapped files are not in it. Most of the second job's is the rounding of a block. Beside it
stand the largest tensor of the checkpoint and the excerpt on which the graph is tried, two blocks
in float32.

usage: python benchmarks/onnx_2gb.py [--work FOLDER] [--layers 23]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from measure import ROOT, describe_commit, describe_machine, package_versions, write_results
from shapes import SHAPES, shards

JOBS = ("float", "int4")
PACKAGES = ("quantkit", "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai")


def anonymous_bytes() -> int:
    """Return the memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def watch(stop: threading.Event, peak: list[int]) -> None:
    """Keep the highest anonymous memory in `peak` until `stop` is set."""
    while not stop.wait(0.005):
        peak[0] = max(peak[0], anonymous_bytes())


def run_job(job: str, model: Path, output: Path) -> dict[str, int]:
    """Do one job in this process; return its memory before and at the most."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import quantkit
    from quantkit.checkpoint.reader import open_checkpoint
    from quantkit.checkpoint.source import resolve_source
    from quantkit.formats.onnx.decoder import write_float_decoder
    from quantkit.recipe import Recipe

    before, stop = anonymous_bytes(), threading.Event()
    peak = [before]
    thread = threading.Thread(target=watch, args=(stop, peak))
    thread.start()
    try:
        if job == "float":
            write_float_decoder(open_checkpoint(resolve_source(str(model))), output)
        else:
            recipe = {
                "version": 1,
                "model": str(model),
                "output": str(output),
                "quantize": {"method": "rtn"},
                "export": [{"format": "onnx", "precision": "int4"}],
            }
            quantkit.quantize(Recipe.model_validate(recipe), gate=False, device="cpu")
    finally:
        stop.set()
        thread.join()
    files = sum(path.stat().st_size for path in output.rglob("model.onnx*"))
    return {"before": before, "peak": peak[0], "bytes": files}


def run_apart(job: str, model: Path, work: Path) -> dict[str, Any]:
    """Do one job in a process of its own."""
    output = work / f"onnx-{job}"
    words = [sys.executable, __file__, "--job", job, str(model), str(output)]
    # Else glibc keeps what was freed, more of it from run to run than is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return {"job": job, **json.loads(done.stdout.splitlines()[-1])}


def render(document: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    machine = document["machine"]
    lines = [
        "# Memory of ONNX exports of a checkpoint of more than 2 GB",
        "",
        f"A Llama of random weights in bfloat16, {document['weight_bytes'] / 1e9:.2f} GB; its "
        f"largest tensor has {document['largest_bytes'] / 1e6:.0f} MB, and two blocks in float32, "
        f"on which the graph is tried, have {document['excerpt_bytes'] / 1e6:.0f} MB.",
        "",
        "| job | anonymous memory at the most, MB | before the job, MB | graph and tensors, MB |",
        "|---|---:|---:|---:|",
    ]
    for row in document["rows"]:
        lines.append(
            f"| {row['job']} | {row['peak'] / 1e6:.0f} | {row['before'] / 1e6:.0f} "
            f"| {row['bytes'] / 1e6:.0f} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines += [
        "",
        f"- machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        f"- {versions}; commit {document['commit']}",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Parse the arguments, write the checkpoint, run the jobs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=23)
    parser.add_argument("--work", type=Path, help="keep the checkpoint in this folder")
    arguments = parser.parse_args()
    kept = arguments.work.resolve() if arguments.work else None
    os.chdir(ROOT)
    llama = SHAPES["2gb"].shortened(arguments.layers)
    written = list(shards(llama))
    shapes = [shape for shard in written for shape in shard.values()]
    block = next(shard for shard in written if any(".layers." in name for name in shard))
    with tempfile.TemporaryDirectory(dir=kept) as scratch:
        work = kept or Path(scratch)
        model = work / f"synthetic-{arguments.layers}"
        if not (model / "config.json").exists():
            script = str(Path(__file__).with_name("shapes.py"))
            words = [sys.executable, script, llama.name, str(model)]
            subprocess.run([*words, "--layers", str(llama.layers)], check=True)
        rows = [run_apart(job, model, Path(scratch)) for job in JOBS]
    document = {
        "rows": rows,
        "weight_bytes": 2 * sum(map(math.prod, shapes)),
        "largest_bytes": 2 * max(map(math.prod, shapes)),
        "excerpt_bytes": 8 * sum(map(math.prod, block.values())),
        "machine": describe_machine(),
        "versions": package_versions(PACKAGES),
        "commit": describe_commit(),
    }
    write_results("onnx_2gb", document, render(document))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        print(json.dumps(run_job(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
    else:
        sys.exit(main())
