"""Quality at the same bits: quantkit against llm-compressor and auto-round on three models.

Every tool gets the same checkpoint and the same calibration windows; one judge, the one of
quantkit's gate, measures each artifact on the same evaluation windows: KL over the whole vocabulary
in float32, the activations quantized as the artifact says. The models are those of
quality_models.py. llm-compressor (GPTQ, AWQ, SmoothQuant + GPTQ, FP8) and auto-round (W4A16, its
presets `default` and `best`) run with the settings of their documentation, each in its own
environment: `scripts/setup_rival.sh llm-compressor` and `scripts/setup_rival.sh auto-round`.

usage: python benchmarks/quality.py [--models demo outlier qwen3] [--schemes w4a16 w8a8 fp8_dynamic]
           [--skip-rivals] [--work artifacts/quality]
"""

from __future__ import annotations

import argparse
import hashlib
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

from contest import (
    PACKAGES,
    RECIPE,
    Judged,
    artifact_of,
    check_same_windows,
    export_windows,
    find_rival,
    judge,
    rival_command,
    rival_versions,
)
from measure import (
    ROOT,
    Measured,
    describe_commit,
    describe_machine,
    package_versions,
    run_measured,
    write_results,
)
from quality_results import TARGETS, Contestant, Row, Table, render

MODELS = ("demo", "outlier", "qwen3")
EFFORTS = ("fast", "normal", "best")
RIVALS = {
    "w4a16": (
        ("llm-compressor", "gptq"),
        ("llm-compressor", "awq"),
        ("auto-round", "default"),
        ("auto-round", "best"),
    ),
    "w8a8": (("llm-compressor", "smoothquant+gptq"), ("llm-compressor", "gptq")),
    "fp8_dynamic": (("llm-compressor", "rtn"),),
}
RIVAL_SCHEMES = {"w4a16": "W4A16", "w8a8": "W8A8", "fp8_dynamic": "FP8_DYNAMIC"}
WEIGHT_ONLY = ("w4a16",)


@dataclass(frozen=True)
class Setting:
    """What all contestants of a run share."""

    work: Path
    windows: dict[str, Any]
    rivals: dict[str, Path]
    """Tool -> its interpreter."""
    versions: dict[str, dict[str, str]]
    """Tool -> its packages."""

    @property
    def calibration(self) -> Path:
        """The calibration windows."""
        return self.work / "calibration.npy"

    @property
    def evaluation(self) -> Path:
        """The evaluation windows."""
        return self.work / "evaluation.npy"


# --- running ----------------------------------------------------------------------------------


def make_command(
    contestant: Contestant, setting: Setting, model: Path, scheme: str, output: Path
) -> list[str]:
    """Return the command of one job that leaves its artifact in `output`."""
    tool = contestant.tool
    if tool == "quantkit":
        words = [sys.executable, "-m", "quantkit", "quantize", str(model), "--recipe", RECIPE]
        settings = {"scheme": scheme, "method": contestant.method, "effort": contestant.effort}
        for name, value in settings.items():
            words += ["--set", f"quantize.{name}={value}"]
        return [*words, "--no-gate", "--quiet", "--output", str(output)]
    options = ["--preset", contestant.method]
    if tool == "llm-compressor":
        options = ["--method", contestant.method, "--scheme", RIVAL_SCHEMES[scheme]]
    return rival_command(tool, setting.rivals[tool], model, setting.calibration, output, options)


def compete(
    contestant: Contestant, setting: Setting, model: Path, scheme: str, folder: Path
) -> Row:
    """Run one job and judge its artifact; a failure becomes a row as well."""
    output = folder / contestant.key
    shutil.rmtree(output, ignore_errors=True)
    command = make_command(contestant, setting, model, scheme, output)
    try:
        measured = run_measured(command, folder / f"{contestant.key}.log")
        if contestant.tool == "quantkit":
            check_same_windows(output, setting.windows["calibration"]["sha256"])
        artifact = artifact_of(contestant.tool, output)
        if scheme not in WEIGHT_ONLY:
            check_activations(model, artifact, setting.evaluation)
        judged = judge(model, artifact, setting.evaluation)
    except SystemExit as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Row(contestant, error=" ".join(lines[-2:])[-400:])
    bits = 8 * tensor_bytes(artifact) / count_parameters(model)
    return Row(contestant, measured, judged, bits)


def check_activations(model: Path, artifact: Path, evaluation: Path) -> None:
    """Make sure that the judge quantizes the activations of an artifact.

    It measures one window as the artifact is and once more with a config that quantizes the weights
    alone: an equal KL would mean that the first run did not quantize the inputs either.

    Raises:
        SystemExit: it did not.
    """
    config = json.loads((artifact / "config.json").read_text(encoding="utf-8"))
    for group in config["quantization_config"]["config_groups"].values():
        if group["input_activations"] is None:
            raise SystemExit(f"{artifact} does not quantize its activations")
        group["input_activations"] = None
    with tempfile.TemporaryDirectory() as scratch:
        for path in artifact.resolve().iterdir():
            if path.name != "config.json":
                Path(scratch, path.name).symlink_to(path)
        Path(scratch, "config.json").write_text(json.dumps(config), encoding="utf-8")
        both = [judge(model, folder, evaluation, windows=1) for folder in (artifact, Path(scratch))]
    if both[0].kl == both[1].kl:
        raise SystemExit(f"{artifact}: the judge did not quantize the activations")


def tensor_bytes(folder: Path) -> int:
    """Return the bytes of all tensors of a checkpoint, from its headers."""
    return sum(end - start for start, end, _ in read_headers(folder))


def count_parameters(folder: Path) -> int:
    """Return the number of values of a 16-bit checkpoint."""
    return sum(count for _, _, count in read_headers(folder))


def read_headers(folder: Path) -> Iterator[tuple[int, int, int]]:
    """Yield the begin, end and number of values of each tensor of a safetensors checkpoint."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                count = 1
                for size in tensor["shape"]:
                    count *= size
                yield *tensor["data_offsets"], count


# --- what is kept of a rival --------------------------------------------------------------------


def describe_job(setting: Setting, model: Path, contestant: Contestant) -> dict[str, Any]:
    """Return what a stored row of a rival depends on."""
    weights = (model / "model.safetensors").read_bytes()
    return {
        "model": hashlib.sha256(weights).hexdigest(),
        "windows": {name: found["sha256"] for name, found in setting.windows.items()},
        "versions": setting.versions[contestant.tool],
    }


def store(row: Row, job: dict[str, Any], record: Path) -> None:
    """Write a row beside the artifact."""
    document = {"job": job, "row": asdict(row)}
    record.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def load_stored(contestant: Contestant, job: dict[str, Any], record: Path) -> Row | None:
    """Return the row of an earlier run; None where there is none or it was another job."""
    if not record.exists():
        return None
    document = json.loads(record.read_text(encoding="utf-8"))
    if document["job"] != job or document["row"]["error"]:
        return None
    row = document["row"]
    return Row(
        contestant,
        Measured(**row["measured"]),
        Judged(**row["judged"]),
        row["bits_per_weight"],
        stored=True,
    )


def run_rival(
    contestant: Contestant,
    setting: Setting,
    model: Path,
    scheme: str,
    folder: Path,
    reuse: bool,
) -> Row:
    """Run a rival, or take its row from an earlier run where `reuse` says so."""
    record = folder / f"{contestant.key}.json"
    job = describe_job(setting, model, contestant)
    row = load_stored(contestant, job, record) if reuse else None
    if row is None:
        if reuse:
            tell(f"{contestant.key}: nothing stored for this model, windows and versions: runs now")
        row = compete(contestant, setting, model, scheme, folder)
        store(row, job, record)
    return row


def tell(text: str) -> None:
    """Print progress."""
    print(text, file=sys.stderr, flush=True)


# --- the whole run ------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--schemes", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--methods", nargs="+", default=["best"], help="of quantkit")
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS, default=list(EFFORTS))
    parser.add_argument("--skip-rivals", action="store_true", help="reuse their stored results")
    parser.add_argument(
        "--leave-out", nargs="+", default=[], metavar="RIVAL", help="such as auto-round-best"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "quality")
    parser.add_argument("--llm-compressor", type=Path, help="the interpreter of its environment")
    parser.add_argument("--auto-round", type=Path, help="the interpreter of its environment")
    parser.add_argument("--evaluation-windows", type=int, help="fewer, for a quick look")
    parser.add_argument("--results", default="quality", help="name of the files in results/")
    return parser.parse_args()


def make_models(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Return the folders of the models, made where they are not there."""
    script = ROOT / "benchmarks" / "quality_models.py"
    words = [sys.executable, str(script), str(folder), "--models", *names]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    paths = done.stdout.splitlines()[-len(names) :]
    return {name: Path(path) for name, path in zip(names, paths, strict=True)}


def contest(arguments: argparse.Namespace, setting: Setting, name: str, model: Path) -> list[Table]:
    """Run every contestant of every scheme on one model."""
    tables = []
    for scheme in arguments.schemes:
        folder = setting.work / name / scheme
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for contestant in (Contestant(*names) for names in RIVALS[scheme]):
            if contestant.key not in arguments.leave_out:
                reuse = arguments.skip_rivals
                rows.append(run_rival(contestant, setting, model, scheme, folder, reuse))
                tell_row(name, scheme, rows[-1])
        for method in arguments.methods:
            for effort in arguments.efforts:
                ours = Contestant("quantkit", method, effort)
                rows.append(compete(ours, setting, model, scheme, folder))
                tell_row(name, scheme, rows[-1])
        tables.append(Table(name, scheme, tuple(rows)))
    return tables


def tell_row(name: str, scheme: str, row: Row) -> None:
    """Print one result as it comes."""
    found = f"KL {row.judged.kl:.5f}" if row.judged else f"failed: {row.error}"
    origin = ", stored by an earlier run" if row.stored else ""
    tell(f"{name} {scheme} {row.contestant.key}: {found}{origin}")


def main() -> None:
    """Parse the arguments, make the models, run everything, write the results."""
    arguments = parse_arguments()
    keys = [Contestant(*names).key for rivals in RIVALS.values() for names in rivals]
    if unknown := set(arguments.leave_out) - set(keys):
        raise SystemExit(f"--leave-out {' '.join(sorted(unknown))}: one of {', '.join(keys)}")
    given = {"llm-compressor": arguments.llm_compressor, "auto-round": arguments.auto_round}
    needed = {
        rival[0]
        for scheme in arguments.schemes
        for rival in RIVALS[scheme]
        if Contestant(*rival).key not in arguments.leave_out
    }
    rivals = {tool: find_rival(tool, given[tool]) for tool in sorted(needed)}
    os.chdir(ROOT)
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    windows = export_windows(work, evaluation_samples=arguments.evaluation_windows)
    windows.pop("model")
    versions = {tool: rival_versions(tool, python) for tool, python in rivals.items()}
    setting = Setting(work, windows, rivals, versions)
    models = make_models(arguments.models, work / "models")
    tables = [
        table
        for name, model in models.items()
        for table in contest(arguments, setting, name, model)
    ]
    tables.sort(key=lambda table: list(TARGETS).index(table.scheme))
    document = {
        "windows": windows,
        "tables": [asdict(table) | {"target": TARGETS[table.scheme]} for table in tables],
        "machine": describe_machine(),
        "versions": package_versions(PACKAGES),
        "rival_versions": versions,
        "commit": describe_commit(),
        "command": shlex.join(["python", "benchmarks/quality.py", *sys.argv[1:]]),
    }
    write_results(arguments.results, document, render(document, tables))
    failed = [row for table in tables for row in table.rows if row.error]
    if failed:
        raise SystemExit(f"{len(failed)} of the jobs failed; the tables say which")


if __name__ == "__main__":
    main()
