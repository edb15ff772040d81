"""A sweep's parts: what is refused, what is kept, the order, the exit code, shares, stopping."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.errors import InputError, MissingPackageError, PlanError, ResourceError
from quantkit.records import Event, Verdict
from quantkit.report import report_document
from quantkit.report.reading import read_artifact
from quantkit.sweeping.finished import find_changes
from quantkit.sweeping.jobs import JobOptions, make_jobs, name_model, refuse
from quantkit.sweeping.loop import read_step, run_jobs
from quantkit.sweeping.on_ray import Share, choose_share, load_ray
from quantkit.sweeping.outcomes import find_exit_code, read_outcome, sort_outcomes
from quantkit.sweeping.processes import count_cores, job_environment, list_gpus, signal_group
from quantkit.sweeping.records import Ended, JobOutcome, SweepJob
from quantkit.sweeping.summary import summarize
from tests.helpers import pico_text
from tests.report.measured import make_comparison, make_measured_report
from tests.report.sample import make_encoder_report, make_report

RECIPE = """\
version: 1
model: {model}
output: never/used
calibration: {{data: text.txt, samples: 8, sequence_length: 32}}
quantize: {{scheme: w4a16, group_size: 32, method: gptq}}
gate: {{data: text.txt, samples: 8, sequence_length: 32}}
"""
NONE = JobOptions()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two recipes, two folders that are called models, and a text."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Path(f"{name}.yaml").write_text(RECIPE.format(model=name))
    Path("text.txt").write_text(pico_text(50, 0))
    return tmp_path


def make_job(name: str = "one-x", model: str = "one", root: Path = Path("sweep")) -> SweepJob:
    """A job of a recipe that is called by the last part of `name`."""
    recipe = Path(f"{name.rpartition('-')[2]}.yaml")
    if not recipe.exists():
        recipe.write_text(RECIPE.format(model=model))
    (job,) = make_jobs([recipe], [model], root, NONE)
    return job


def judged(job: SweepJob, verdict: Verdict, size: int) -> JobOutcome:
    """A finished job whose artifact has `size` bytes."""
    artifact = replace(make_report(verdict).artifacts[0], size_bytes=size)
    code = {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4}[verdict]
    return JobOutcome(
        job, "finished", code, None, verdict, (artifact,), 61.0, 5_000_000, evidence={}
    )


def test_every_recipe_goes_with_every_model(folder: Path) -> None:
    """In the order that was given, each in a folder of its own below the root."""
    jobs = make_jobs(["one.yaml", "two.yaml"], ["one", Path("two")], Path("out"), NONE)
    names = ["one-one", "two-one", "one-two", "two-two"]
    assert [job.name for job in jobs] == names
    assert [job.output for job in jobs] == [Path("out", name) for name in names]
    assert [job.model for job in jobs] == ["one", "two"] * 2
    own = make_jobs(["one.yaml", "two.yaml"], [], Path("out"), NONE)
    assert [job.name for job in own] == ["one-one", "two-two"]


def test_a_job_is_the_command_of_quantize(folder: Path) -> None:
    """With what all jobs were given, and nothing that was not."""
    options = JobOptions(("quantize.group_size=64",), "cpu", overwrite=True, gate=False)
    (job,) = make_jobs(["one.yaml"], ["two"], Path("out"), options)
    assert job.command == (
        *("quantize", "--recipe", "one.yaml", "--output", "out/two-one", "--json"),
        *("--model", "two", "--set", "quantize.group_size=64", "--device", "cpu"),
        *("--overwrite", "--no-gate"),
    )
    assert job.loaded.recipe.quantize.group_size == 64
    (plain,) = make_jobs(["one.yaml"], [], Path("out"), NONE)
    assert plain.command == (
        *("quantize", "--recipe", "one.yaml", "--output", "out/one-one", "--json"),
    )


def test_all_problems_of_all_recipes_are_told_at_once(folder: Path) -> None:
    """Each with the recipe that has it, and a problem that two models meet only once."""
    Path("typo.yaml").write_text(RECIPE.format(model="one").replace("group_size", "grup_size"))
    Path("blind.yaml").write_text(RECIPE.format(model="one").replace("text.txt", "none.txt"))
    with pytest.raises(PlanError) as caught:
        make_jobs(
            ["one.yaml", "typo.yaml", "nix", "blind.yaml", "./one.yaml"],
            ["one", "gone/"],
            Path("out"),
            NONE,
        )
    problems = caught.value.problems
    for words in (
        "typo.yaml:5: quantize.grup_size: unknown key",
        "nix: no recipe 'nix'",
        "one-blind: no data file or folder 'none.txt'",
        "./one.yaml with one: one.yaml with one writes out/one-one too",
        "gone-one: model 'gone/': there is no such folder",
    ):
        assert sum(words in problem for problem in problems) == 1, (words, problems)
    assert not Path("out").exists()


@pytest.mark.parametrize("pair", ["output=x", "model=x"])
def test_what_a_sweep_settles_itself_is_not_overridden(folder: Path, pair: str) -> None:
    """All jobs would write the same output; models are named by `--model`."""
    with pytest.raises(InputError, match="--model"):
        make_jobs(["one.yaml"], [], Path("out"), JobOptions((pair,)))


def test_a_sweep_without_recipes_is_refused() -> None:
    """Rather than passed because nothing failed."""
    with pytest.raises(InputError, match="at least one recipe"):
        make_jobs([], [], Path("out"), NONE)


@pytest.mark.parametrize(
    "wrong",
    [
        {"processes": 0},
        {"cpus": 1},
        {"gpus": 1.0},
        {"ray": "local", "cpus": 0},
        {"device": "tpu"},
    ],
)
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    """Before the recipes are read."""
    with pytest.raises(InputError, match=r"--|device 'tpu' is unknown"):
        quantkit.sweep(["none.yaml"], **wrong)


def test_torchrun_does_not_start_a_sweep_many_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its processes would start all jobs, and each job would look for the others."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InputError, match="start it without torchrun"):
        quantkit.sweep(["none.yaml"])


def test_an_output_of_somebody_else_is_refused(folder: Path) -> None:
    """Even where outputs may be overwritten."""
    Path("out/one-one").mkdir(parents=True)
    Path("out/one-one/mine.txt").write_text("mine")
    with pytest.raises(PlanError, match="is not a folder that quantkit wrote"):
        make_jobs(["one.yaml"], [], Path("out"), JobOptions(overwrite=True))


def test_problems_of_the_machine_have_their_own_exit_code() -> None:
    """Where nothing else is wrong; the text is the same."""
    refuse([])
    with pytest.raises(ResourceError, match="1 problem found before any work:\n  - a"):
        refuse(["a"], resources=True)
    with pytest.raises(PlanError, match="2 problems"):
        refuse(["a", "b", "a"])


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/model-7b", "model-7b"),
        ("org/model@v1/x", "x"),
        ("a b/", "a-b"),
        ("/", "model"),
        ("m@1.0", "m-1.0"),
    ],
)
def test_outputs_are_called_by_the_last_part_of_the_model(model: str, name: str) -> None:
    """Without what a file system may not take."""
    assert name_model(model) == name


def make_finished(job: SweepJob, **changes: Any) -> dict[str, str]:
    """Write the output of a job as far as it is compared; return the hashes of its model."""
    folder = job.output / "compressed-tensors"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    files = {"config.json": "1234"}
    evidence = {
        "verdict": "PASS",
        "recipe": {"resolved": job.loaded.recipe.model_dump(mode="json")},
        "model": {"files": files},
        "artifacts": [{"path": "compressed-tensors", "files": {"model.safetensors": digest}}],
        **changes,
    }
    (job.output / "quantkit.json").write_text(json.dumps(evidence))
    return files


def test_an_output_of_the_same_recipe_and_model_is_the_same(folder: Path) -> None:
    """Wherever the model lies."""
    files = make_finished(make_job())
    (moved,) = make_jobs(["x.yaml"], [Path("one").absolute()], Path("sweep"), NONE)
    assert find_changes(moved, files, gate=True) == []
    assert find_changes(moved, files, gate=False) == []


def test_what_differs_is_named(folder: Path) -> None:
    """The key of the recipe, the model, the gate, the data, a damaged file."""
    job = make_job()
    files = make_finished(job)
    (other,) = make_jobs(
        ["x.yaml"], ["one"], Path("sweep"), JobOptions(("quantize.group_size=64", "gate.max_kl=1"))
    )
    assert find_changes(other, files, gate=True) == ["gate.max_kl", "quantize.group_size"]
    assert find_changes(job, {"config.json": "5"}, gate=True) == ["the model's files"]
    later = time.time() + 60
    os.utime("text.txt", (later, later))
    newer = find_changes(job, files, gate=True)
    assert [words.partition(",")[0] for words in newer] == ["calibration.data", "gate.data"]
    os.utime("text.txt", (0, 0))
    (job.output / "compressed-tensors" / "model.safetensors").write_bytes(b"weightz")
    (damaged,) = find_changes(job, files, gate=True)
    assert "model.safetensors, which is not as it was written" in damaged


def test_an_unjudged_output_does_not_do_for_a_sweep_that_judges(folder: Path) -> None:
    """The other way round it does: it has been judged."""
    job = make_job()
    files = make_finished(job, verdict="UNJUDGED")
    assert find_changes(job, files, gate=False) == []
    assert find_changes(job, files, gate=True) == ["the gate, which was not run"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"recipe": {"resolved": 1}, "model": 2}'])
def test_evidence_that_cannot_be_read_is_no_evidence(folder: Path, text: str) -> None:
    """The output is not kept."""
    job = make_job()
    make_finished(job)
    (job.output / "quantkit.json").write_text(text)
    assert find_changes(job, {}, gate=True) == ["sweep/one-x/quantkit.json cannot be read"]


def test_cores_and_gpus_are_dealt_out() -> None:
    """Among the jobs that run at once; what the user has set stays."""
    alone = job_environment({"A": "1"}, 0, 1, ["0", "1"])
    assert alone == {"A": "1"}
    pair = [job_environment({}, slot, 2, ["3", "GPU-x"]) for slot in (0, 1)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in pair] == ["3", "GPU-x"]
    assert {each["OMP_NUM_THREADS"] for each in pair} == {str(max(1, count_cores() // 2))}
    third = job_environment({"OMP_NUM_THREADS": "7"}, 2, 3, ["0", "1"])
    assert third == {"OMP_NUM_THREADS": "7", "CUDA_VISIBLE_DEVICES": "0"}
    assert "CUDA_VISIBLE_DEVICES" not in job_environment({}, 1, 2, ["0"])


def test_gpus_that_are_hidden_are_not_dealt_out() -> None:
    """By the variable that CUDA itself obeys."""
    assert list_gpus({"CUDA_VISIBLE_DEVICES": "2, 5"}) == ("2", "5")
    assert list_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()


def test_what_a_job_asks_ray_for() -> None:
    """One GPU and its share of the cores where there are GPUs, else a whole node."""
    small, large = {"CPU": 8.0}, {"CPU": 64.0, "GPU": 8.0}
    assert choose_share([small, {"CPU": 16.0}], None, None, "auto") == Share(8, 0)
    assert choose_share([small, large], None, None, "auto") == Share(8, 1)
    assert choose_share([large], None, 2, "auto") == Share(16, 2)
    assert choose_share([large], None, 0.5, "auto") == Share(4, 0.5)
    assert choose_share([large], None, None, "cpu") == Share(64, 0)
    assert choose_share([large], 3, None, "cuda") == Share(3, 1)
    with pytest.raises(InputError, match="no node of the cluster has 9 cores"):
        choose_share([small], 9, None, "auto")
    with pytest.raises(InputError, match="GPUs are the most on one node"):
        choose_share([small], None, 1, "auto")


def test_without_ray_the_install_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as it is asked for."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r'pip install "quantkit\[ray\]"'):
        quantkit.sweep(["none.yaml"], ray="local")


def test_an_address_where_nothing_answers_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray itself would try for minutes."""
    monkeypatch.setitem(sys.modules, "ray", json)  # any module will do
    with pytest.raises(InputError, match=r"--ray 127\.0\.0\.1:1: no cluster was reached"):
        load_ray("127.0.0.1:1")


def test_the_last_step_of_a_log_is_read(tmp_path: Path) -> None:
    """Of this run, not of an earlier one."""
    log = tmp_path / "x.log"
    assert read_step(log) is None
    log.write_text(
        "$ quantkit quantize\nprepare 1/1\nquantize 3/8  model.layers.2, error 1%\nwarn\n"
    )
    assert read_step(log) == ("quantize", 3, 8, "model.layers.2, error 1%")
    log.write_text(log.read_text() + "x" * 5000 + "\nwrite 0/1\n")
    assert read_step(log) == ("write", 0, 1, "")
    log.write_text(log.read_text() + "$ quantkit quantize\n")
    assert read_step(log) is None


class Program:
    """A `Running` that is a small program."""

    def __init__(self, code: str) -> None:
        command = [sys.executable, "-S", "-c", code]
        self.process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
        if "print" in code:  # it is ready for signals then
            assert self.process.stdout is not None
            self.process.stdout.readline()

    def poll(self) -> Ended | None:
        code = self.process.poll()
        return None if code is None else Ended(code, "", 0.0)

    def stop(self) -> None:
        signal_group(self.process, signal.SIGTERM)

    def kill(self) -> None:
        signal_group(self.process, signal.SIGKILL)


def run_programs(
    jobs: list[SweepJob], codes: list[str], slots: int, ended: Callable[[SweepJob, Ended], bool]
) -> tuple[list[Program], list[int]]:
    """Run a program for each job; return what was started, and in which slots."""
    started: list[Program] = []
    places: list[int] = []

    def start(job: SweepJob, slot: int) -> Program:
        started.append(Program(codes[len(started)]))
        places.append(slot)
        return started[-1]

    run_jobs(jobs, start, slots, ended, lambda _: None)
    return started, places


def test_a_slot_is_used_again_when_its_job_has_ended(folder: Path) -> None:
    """And a job that dies takes no other with it."""
    jobs = [make_job(f"one-{letter}") for letter in "abc"]
    ended: list[tuple[str, int]] = []

    def take(job: SweepJob, found: Ended) -> bool:
        ended.append((job.name, found.exit_code))
        return True

    slow = "import time; time.sleep(0.6)"
    started, places = run_programs(jobs, [slow, "raise SystemExit(5)", ""], 2, take)
    assert places == [0, 1, 1]
    assert ended == [("one-b", 5), ("one-c", 0), ("one-a", 0)]
    assert len(started) == 3


def test_fail_fast_lets_running_jobs_end_and_starts_no_other(folder: Path) -> None:
    """Work that is nearly done is not thrown away."""
    jobs = [make_job(f"one-{letter}") for letter in "abc"]
    ended: list[int] = []

    def take(_: SweepJob, found: Ended) -> bool:
        ended.append(found.exit_code)
        return found.exit_code == 0

    slow = "import time; time.sleep(0.5)"
    started, _ = run_programs(jobs, ["raise SystemExit(3)", slow, ""], 2, take)
    assert len(started) == 2
    assert ended == [3, 0]


def test_whatever_ends_the_sweep_ends_its_jobs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Politely first; one that does not listen is killed."""
    monkeypatch.setattr("quantkit.sweeping.loop._SECONDS_TO_STOP", 0.5)
    jobs = [make_job(f"one-{letter}") for letter in "abc"]
    started: list[Program] = []
    wait = "print(flush=True); import time; time.sleep(60)"
    deaf = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {wait}"

    def start(job: SweepJob, slot: int) -> Program:
        started.append(Program(deaf if slot else wait))
        return started[-1]

    def tell(_: Event) -> None:
        raise KeyboardInterrupt

    jobs[0].log.parent.mkdir(parents=True)
    jobs[0].log.write_text("prepare 0/1\n")
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, start, 2, lambda *_: True, tell)
    codes = [program.process.wait(timeout=5) for program in started]
    assert codes == [-signal.SIGTERM, -signal.SIGKILL]


@pytest.mark.parametrize(
    ("ended", "code", "words"),
    [
        (Ended(2, '{"error": "no such key", "exit_code": 2}', 1), 2, "no such key"),
        (Ended(5, '{"error": "disk", "exit_code": 5}', 1), 5, "disk"),
        (Ended(-9, "", 1), 5, "killed by SIGKILL, by the system for want of memory"),
        (Ended(-11, "", 1), 1, "died of SIGSEGV"),
        (Ended(130, "", 1), 130, "last words"),
        (Ended(77, "Ray has lost it", 1), 1, "Ray has lost it"),
        (Ended(3, '{"error": "the worker died", "exit_code": 3}', 1), 3, "the worker died"),
        (Ended(0, "{}", 1), 1, "its report cannot be read"),
    ],
)
def test_a_job_that_dies_says_why(folder: Path, ended: Ended, code: int, words: str) -> None:
    """By its document, its signal or the last line of its log."""
    job = make_job()
    job.log.parent.mkdir(parents=True)
    job.log.write_text("$ quantkit\n\nlast words\n")
    outcome = read_outcome(job, ended)
    assert (outcome.state, outcome.exit_code, outcome.verdict) == ("failed", code, None)
    assert words in str(outcome.error)


def test_a_job_that_was_finished_before_is_read_from_its_output(folder: Path) -> None:
    """With the verdict of its report, and the time of its stages, not of their parts too."""
    job = make_job()
    seconds = {"prepare": 1.0, "calibrate": 5.0, "quantize": 7.0, "gate": 2.0}
    make_finished(job, timings={"seconds": seconds, "peak_memory_bytes": 99})
    (job.output / "report").mkdir()
    document = report_document(make_report("INCONCLUSIVE"))
    (job.output / "report" / "report.json").write_text(json.dumps(document))
    outcome = read_outcome(job, None)
    assert (outcome.state, outcome.verdict, outcome.exit_code) == ("kept", "INCONCLUSIVE", 4)
    assert (outcome.seconds, outcome.peak_memory_bytes) == (10.0, 99)
    assert outcome.artifacts == make_report("INCONCLUSIVE").artifacts
    assert outcome.report == Path("sweep/one-x/report/report.html")


def test_a_job_that_died_does_not_have_the_verdict_of_what_it_was_to_replace(
    folder: Path,
) -> None:
    """The exit code of a dead worker is that of a FAIL too."""
    job = make_job()
    make_finished(job, timings={"seconds": {}, "peak_memory_bytes": 1})
    (job.output / "report").mkdir()
    document = report_document(make_report("PASS"))
    (job.output / "report" / "report.json").write_text(json.dumps(document))
    died = Ended(3, '{"error": "the worker died", "exit_code": 3}', 1)
    outcome = read_outcome(job, died)
    assert (outcome.state, outcome.exit_code, outcome.error) == ("failed", 3, "the worker died")


def test_a_report_that_cannot_be_read_says_how_to_go_on(folder: Path) -> None:
    """The same command would keep the output for ever."""
    job = make_job()
    make_finished(job)
    outcome = read_outcome(job, None)
    assert (outcome.state, outcome.exit_code) == ("failed", 1)
    assert "delete sweep/one-x to make it again" in str(outcome.error)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([0, 4], 4),
        ([4, 3, 0], 3),
        ([3, 2], 2),
        ([2, 5, 3], 5),
        ([5, 130], 130),
        ([130, 1, 0], 1),
        ([None, 0], 0),
    ],
)
def test_the_worst_job_gives_the_exit_code(
    folder: Path, codes: list[int | None], expected: int
) -> None:
    """By the order of docs/sweep.md; jobs that were not started do not count."""
    job = make_job()
    assert find_exit_code(JobOutcome(job, "failed", code) for code in codes) == expected


def test_the_smallest_that_passes_comes_first(folder: Path) -> None:
    """Of each model; then what does not pass, what died, and what waits."""
    one = [make_job(f"one-{letter}") for letter in "abcdef"]
    two = make_job("two-a", "two")
    outcomes = [
        JobOutcome(one[0], "waiting"),
        JobOutcome(one[1], "failed", 2, "no"),
        judged(one[2], "FAIL", 1),
        judged(one[3], "PASS", 30),
        judged(one[4], "PASS", 20),
        judged(two, "PASS", 5),
        judged(one[5], "INCONCLUSIVE", 2),
    ]
    names = [outcome.job.name for outcome in sort_outcomes(outcomes)]
    assert names == ["one-e", "one-d", "one-f", "one-c", "one-b", "one-a", "two-a"]


def test_a_sweep_is_summarized_in_files(folder: Path) -> None:
    """For programs, for people, and side by side."""
    jobs = [make_job(f"one-{letter}") for letter in "abc"]
    outcomes = [
        JobOutcome(jobs[0], "failed", 5, "no <space> left", seconds=3.0),
        judged(jobs[1], "PASS", 2_000_000),
        judged(jobs[2], "FAIL", 1_000_000),
    ]
    root = Path("sweep")
    result = summarize(outcomes, root)
    assert result.exit_code == 5
    assert "take one-b" in result.choices["one"]
    document = json.loads((root / "sweep.json").read_text())
    assert document["exit_code"] == 5
    assert [job["name"] for job in document["jobs"]] == ["one-b", "one-c", "one-a"]
    assert document["jobs"][2]["error"] == "no <space> left"
    text = (root / "sweep.md").read_text()
    assert "| `one-b` | `b.yaml` | `one` | **PASS** | 2.00 MB |" in text
    assert "[Side by side](reports/one/report.html)" in text
    assert "- `one-a`: no \\<space\\> left ([log](one-a.log))" in text
    page = Path(result.reports["one"])
    assert page == root / "reports" / "one" / "report.html"
    assert "one-c" in page.read_text()
    early = summarize(
        [judged(jobs[1], "PASS", 1), JobOutcome(jobs[0], "waiting")], Path("early"), finished=False
    )
    assert early.reports == {}
    assert "not run" in Path("early", "sweep.md").read_text()


@pytest.mark.parametrize(
    "report",
    [
        make_report("FAIL"),
        make_report("UNJUDGED"),
        make_measured_report(),
        make_comparison(),
        make_encoder_report(),
    ],
    ids=["failed", "unjudged", "measured", "comparison", "encoder"],
)
def test_artifacts_come_back_from_report_json(report: Any) -> None:
    """All but what a comparison does not show of the positions and kinds of text."""
    document = json.loads(json.dumps(report_document(report)))
    again = report_document(
        replace(report, artifacts=tuple(map(read_artifact, document["artifacts"])))
    )
    for row in document["artifacts"]:
        if row["details"]:
            row["details"]["positions"] = row["details"]["domains"] = []
    assert json.loads(json.dumps(again)) == document


def test_a_number_that_is_not_finite_comes_back_as_none() -> None:
    """JSON has null for it."""
    report = make_report("PASS")
    row = report_document(report)["artifacts"][0]
    row["metrics"]["kl"]["high"] = None
    kl = read_artifact(row).judgement.kl
    assert kl is not None
    assert math.isnan(kl.high)
