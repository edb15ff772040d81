"""Bad input through the real command: one clear line, the exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.conftest import Bench, make_bench
from tests.cli.running import ROOT, run, run_here


@dataclass(frozen=True)
class Case:
    """How the input is spoilt, and what the error must say."""

    spoil: Callable[[Bench], list[str]]
    """Spoils the bench and returns more arguments for the command."""
    says: tuple[str, ...]
    """Pieces of the error: what, where, what to do."""
    lines: int = 1


def edit(path: Path, old: str, new: str) -> list[str]:
    """Replace a piece of a text file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return []


def remove(path: Path) -> list[str]:
    """Delete a file."""
    path.unlink()
    return []


def write(path: Path, text: str) -> list[str]:
    """Write a text file."""
    path.write_text(text)
    return []


def truncate(path: Path) -> list[str]:
    """Cut the end of a file off, as an interrupted download does."""
    with path.open("r+b") as handle:
        handle.truncate(path.stat().st_size - 100)
    return []


def poison(path: Path, name: str) -> list[str]:
    """Make the first bfloat16 of a tensor a NaN."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    start = 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    content[start : start + 2] = struct.pack("<H", 0x7FC0)
    path.write_bytes(content)
    return []


def remove_tokenizer(bench: Bench) -> list[str]:
    """Leave the weights and the config alone."""
    for path in bench.model.glob("tokenizer*"):
        path.unlink()
    return []


def occupy(path: Path) -> list[str]:
    """Let something be there already."""
    path.mkdir()
    (path / "keep.txt").write_text("mine")
    return []


def mix(bench: Bench) -> list[str]:
    """Put the evaluation text among the calibration text, and draw windows from all of it."""
    write(bench.calibration, bench.evaluation.read_text() + bench.calibration.read_text())
    return ["--set", "calibration.samples=500"]


NAN_LAYER = "model.layers.2.mlp.up_proj.weight"

CASES = {
    "an unknown key": Case(
        lambda bench: edit(bench.recipe, "scheme:", "shceme:"),
        ("recipe.yaml:5: quantize.shceme: unknown key 'shceme'", "did you mean 'scheme'?"),
    ),
    "an unknown method": Case(
        lambda _: ["--set", "quantize.method=gtpq"],
        ("--set quantize.method=gtpq: method 'gtpq' is unknown; did you mean 'gptq'?",),
    ),
    "a wrong type": Case(
        lambda bench: edit(bench.recipe, "samples: 8, ", "samples: eight, "),
        ("recipe.yaml:4: calibration.samples: a whole number is expected, got 'eight'",),
    ),
    "a repository that is none": Case(
        lambda _: ["--set", "publish.repo=model"],
        ("'model' is no name of a repository", "OWNER/NAME"),
    ),
    "a task that is not there": Case(
        lambda _: ["--set", "gate.tasks=[tasks/mine.yaml]"],
        ("gate.tasks: ", "tasks/mine.yaml"),
    ),
    "prompts that are not there": Case(
        lambda _: ["--set", "gate.probes.prompts=prompts.jsonl"],
        ("gate.probes.prompts", "prompts.jsonl"),
    ),
    "a missing recipe": Case(
        lambda bench: remove(bench.recipe),
        ("no recipe", "recipe.yaml'", "shipped: "),
    ),
    "a missing model": Case(
        lambda _: ["--model", "./no-such-model"],
        ("no-such-model",),
    ),
    "a model folder without a config": Case(
        lambda bench: remove(bench.model / "config.json"),
        ("model", "config.json"),
    ),
    "a config that is no JSON": Case(
        lambda bench: write(bench.model / "config.json", "{"),
        ("config.json",),
    ),
    "a model folder without a tokenizer": Case(
        remove_tokenizer,
        ("no tokenizer in ", "tokenizer.json"),
    ),
    "a truncated safetensors file": Case(
        lambda bench: truncate(bench.model / "model.safetensors"),
        ("model.safetensors",),
    ),
    "a NaN among the weights": Case(
        lambda bench: poison(bench.model / "model.safetensors", NAN_LAYER),
        (NAN_LAYER, "NaN"),
    ),
    "empty calibration data": Case(
        lambda bench: write(bench.calibration, ""),
        ("calibration.txt is empty",),
    ),
    "calibration data that is too short": Case(
        lambda bench: write(bench.calibration, "too short"),
        ("calibration.txt is too short", "a window needs 32"),
    ),
    "missing evaluation data": Case(
        lambda bench: remove(bench.evaluation),
        ("evaluation.txt",),
    ),
    "evaluation data that is too short": Case(
        lambda bench: write(bench.evaluation, "too short"),
        ("evaluation.txt is too short", "a window needs 32"),
    ),
    "domains of a plain text": Case(
        lambda _: ["--set", "gate.domain_column=topic"],
        ("gate.domain_column 'topic' needs rows", "evaluation.txt"),
    ),
    "calibration on the evaluation data": Case(
        lambda bench: [f"--set=gate.data={bench.calibration}"],
        ("calibration and evaluation use the same data", "calibration.txt", "gate.data"),
    ),
    "evaluation data among the calibration data": Case(
        mix,
        ("of the evaluation's runs of 32 tokens", "calibration.txt", "evaluation.txt"),
    ),
    "an existing output": Case(
        lambda bench: occupy(bench.output),
        ("output ", "out exists", "--overwrite"),
    ),
    "an existing output that is not ours": Case(
        lambda bench: [*occupy(bench.output), "--overwrite"],
        ("out is not a folder that quantkit wrote",),
    ),
    "an output below a file": Case(
        lambda bench: ["--output", str(bench.calibration / "out")],
        ("calibration.txt is a file",),
    ),
    "a device that is not there": Case(
        lambda _: ["--device", "gpu"],
        ("device 'gpu' is unknown", "auto, cpu, cuda"),
    ),
}

PLAN_CASES = {
    "a group size that does not divide": Case(
        lambda _: ["--set", "quantize.group_size=128"],
        ("128", "q_proj", "64"),
        lines=0,
    ),
    "an override that matches nothing": Case(
        lambda _: ["--set", "quantize.overrides=[{match: '*.donw_proj', scheme: w8a16}]"],
        ("'*.donw_proj'",),
        lines=0,
    ),
}


def kept(folder: Path) -> set[Path]:
    """Everything below a folder."""
    return set(folder.rglob("*"))


APART = (
    "an unknown key",
    "a missing model",
    "a truncated safetensors file",
    "a NaN among the weights",
    "calibration on the evaluation data",
)
"""One case of each stage in which a job is refused has a process of its own, as users start it."""


def check_refusal(bench: Bench, case: Case, *, apart: bool = False) -> None:
    """Run the job: it is refused with exit code 2, and the folder is as it was."""
    more = case.spoil(bench)
    before = kept(bench.folder)
    start = run if apart else run_here
    done = start("quantize", "--recipe", bench.recipe, "--quiet", *more, folder=bench.folder)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    for piece in case.says:
        assert piece in done.stderr, done.stderr
    if case.lines:
        assert len(done.stderr.splitlines()) == case.lines, done.stderr
    assert kept(bench.folder) == before


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(bench: Bench, name: str) -> None:
    """What is wrong, where, and what to do; no traceback, no output, no half of one."""
    check_refusal(bench, CASES[name], apart=name in APART)


@pytest.mark.parametrize("name", PLAN_CASES)
def test_a_recipe_that_does_not_fit_is_refused_with_every_problem(bench: Bench, name: str) -> None:
    """Before any weight is read."""
    check_refusal(bench, PLAN_CASES[name])


def test_an_index_that_names_a_missing_shard_is_refused(sharded: Path, tmp_path: Path) -> None:
    """The file is named."""
    bench = make_bench(tmp_path, sharded)
    case = Case(
        lambda bench: remove(bench.model / "model-00002-of-00002.safetensors"),
        ("model-00002-of-00002.safetensors",),
    )
    check_refusal(bench, case)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "--model", "./nowhere"], "'./nowhere': there is no such folder"),
        (["quantize", "--set", "model=null"], "no model: name one"),
        (["quantize", "--set", "output=null"], "no output: pass --output"),
        (["quantize", "--output", "model"], "output model exists"),
        (["quantize", "--output", "."], "has no name of its own"),
        (["quantize", "--set", "calibration.data=calibratoin.txt"], "mean 'calibration.txt'?"),
        (["plan", "--set", "gate.data=evaluatoin.txt"], "mean 'evaluation.txt'?"),
        (["gate", "model", "--baseline", "./nowhere"], "'./nowhere': there is no such folder"),
        (["gate", "model", "--baseline", "model", "--data", "x.txt"], "no data file or folder"),
    ],
)
def test_what_the_files_alone_can_refuse_is_refused_without_torch(
    bench: Bench, arguments: list[str], says: str
) -> None:
    """Importing it takes seconds, and a typing mistake should not."""
    trap = bench.folder / "trap"
    trap.mkdir()
    (trap / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = run(
        *arguments,
        "--recipe",
        bench.recipe,
        folder=bench.folder,
        PYTHONPATH=os.pathsep.join([str(trap), str(ROOT)]),
    )
    assert done.returncode == 2, done.stderr
    assert says in done.stderr.splitlines()[-1]


def test_data_that_is_not_read_may_be_missing(bench: Bench) -> None:
    """Plain rounding looks at no calibration text, and --no-gate at no evaluation text."""
    bench.calibration.unlink()
    bench.evaluation.unlink()
    arguments = ["--recipe", bench.recipe, "--set", "quantize.method=rtn", "--no-gate", "--quiet"]
    done = run_here("quantize", *arguments, folder=bench.folder)
    assert done.returncode == 0, done.stderr


def test_a_refusal_is_a_document_with_json(bench: Bench) -> None:
    """For programs that drive quantkit."""
    arguments = ["--recipe", str(bench.recipe), "--json", "--set", "quantize.methd=rtn"]
    done = run("plan", *arguments, folder=bench.folder)
    document = json.loads(done.stdout)
    assert document["exit_code"] == done.returncode == 2
    assert "did you mean 'method'?" in document["error"]


# --- outputs that cannot be written


@pytest.fixture
def immutable(tmp_path: Path) -> Iterator[Path]:
    """A folder in which not even root may write."""
    folder = tmp_path / "immutable"
    folder.mkdir()
    if os.geteuid() == 0:
        tool = shutil.which("chattr")
        if tool is None or subprocess.run([tool, "+i", folder], capture_output=True).returncode:
            pytest.skip("root writes everywhere, and this file system has no immutable folders")
        yield folder
        subprocess.run([tool, "-i", folder], check=True)
    else:
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)


def test_a_folder_that_cannot_be_written_is_refused(bench: Bench, immutable: Path) -> None:
    """The system's refusal in one line."""
    case = Case(lambda _: ["--output", str(immutable / "out")], (str(immutable),))
    check_refusal(bench, case)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system in memory, where the tests may do that."""
    made: list[Path] = []

    def attach(options: str) -> Path:
        folder = tmp_path / f"mount-{len(made)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        made.append(folder)
        return folder

    yield attach
    for folder in made:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_file_system_is_refused(bench: Bench, mount: Callable[[str], Path]) -> None:
    """Even for root."""
    folder = mount("size=64k,ro")
    case = Case(
        lambda _: ["--output", str(folder / "out")], (f"no permission to write in {folder}",)
    )
    check_refusal(bench, case)


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    bench: Bench, mount: Callable[[str], Path]
) -> None:
    """Exit code 5: it is no mistake of the recipe."""
    folder = mount("size=64k")
    arguments = ["--recipe", str(bench.recipe), "--output", str(folder / "out"), "--quiet"]
    done = run("quantize", *arguments, folder=bench.folder)
    assert done.returncode == 5, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert str(folder) in line
    assert not any(folder.iterdir())


def test_a_disk_that_fills_up_stops_the_job_which_then_goes_on(bench: Bench) -> None:
    """A file size limit is how a full disk looks to the writer."""
    arguments = ["--recipe", str(bench.recipe), "--no-gate"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = run("quantize", *arguments, "--quiet", folder=bench.folder, before=limit)
    assert done.returncode == 5, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no space left while writing ")
    assert not bench.output.exists()
    done = run_here("quantize", *arguments, folder=bench.folder)
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stderr
    assert bench.output.is_dir()
    assert not (bench.folder / "out.partial").exists()
