"""The Trainer's callback: what is refused before a training, which steps, and what is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import InputError, OutputError, QuantkitError, RecipeError, ResourceError
from quantkit.integrations.alone import job_environment, read_refusal, run_alone
from quantkit.integrations.milestone_jobs import make_jobs
from quantkit.integrations.milestones import (
    Milestone,
    describe_artifacts,
    find_best,
    keep_best,
    read_milestones,
    record,
    remove_stale,
    remove_unfinished,
    sort_milestones,
)
from quantkit.locking import locked
from quantkit.records import Verdict
from quantkit.running import alone_in
from quantkit.sweeping.records import Ended
from tests.helpers import make_pico_model, pico_text
from tests.report.sample import make_report

RECIPE = """\
version: 1
calibration: {data: text.txt, samples: 8, sequence_length: 32}
quantize: {scheme: w4a16, group_size: 32, method: rtn}
gate: {data: text.txt, samples: 8, sequence_length: 32}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe beside the text that it names, in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(pico_text(50, 0))
    Path("recipe.yaml").write_text(RECIPE)
    return Path("recipe.yaml")


def make_callback(recipe: Path, **settings: Any) -> Any:
    """A callback with an output of its own."""
    from quantkit.integrations import QuantizeCallback

    return QuantizeCallback(recipe, **({"output": "out"} | settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every_steps": 0}, "every_steps is 0: steps are whole numbers from 1"),
        ({"steps": [5, 2.5]}, "steps is 2.5"),
        ({"steps": 5}, "steps is 5: write a list"),
        ({"at_end": False}, "there is nothing to do"),
        ({"keep": "last"}, "keep is 'last': pass best, all, or how many"),
        ({"keep": 0}, "keep is 0"),
        ({"best_by": "size"}, "best_by 'size' is unknown (known: kl, perplexity)"),
        ({"device": "cud"}, "device 'cud' is unknown; did you mean 'cuda'?"),
        ({"overrides": ["model=other"]}, "'model=other': model and output are those of the"),
        ({"overrides": ["quantize.schem=w8a16"]}, "--set quantize.schem=w8a16: unknown key"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_when_it_is_given(
    recipe: Path, settings: dict[str, Any], words: str
) -> None:
    """Long before the training; nothing is written."""
    with pytest.raises(InputError) as caught:
        make_callback(recipe, **settings)
    assert words in str(caught.value)
    assert not Path("out").exists()


def test_a_recipe_that_measures_nothing_is_refused(recipe: Path) -> None:
    """The gate is what the figures come from."""
    recipe.write_text("\n".join(RECIPE.splitlines()[:-1]))
    with pytest.raises(RecipeError, match="no gate, which measures what is logged"):
        make_callback(recipe)
    with pytest.raises(RecipeError, match="no recipe 'nix'"):
        make_callback(Path("nix"))


def test_a_recipe_that_publishes_is_refused(recipe: Path) -> None:
    """Else each step that passes would go out; the remedy in the message is one."""
    recipe.write_text(RECIPE + "publish: {repo: owner/name}\n")
    with pytest.raises(RecipeError, match="a training does not publish its milestones"):
        make_callback(recipe)
    make_callback(recipe, overrides=["publish=null"])


def test_a_defect_is_no_end_of_the_training(recipe: Path, tmp_path: Path) -> None:
    """A tokenizer that cannot be saved, by an error that nobody has foreseen."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_pico_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    del tokenizer._tokenizer
    jobs = make_jobs(
        recipe,
        tmp_path / "out",
        count=1,
        best_by="kl",
        overrides=(),
        device="cpu",
        gpu=None,
        overwrite=False,
    )
    (found,) = jobs.attempt(model, tokenizer, 3, None, ())
    assert (found.step, found.verdict, found.kept) == (3, None, False)
    assert str(found.error).startswith("AttributeError: ")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["training.json"]


def test_two_trainings_do_not_write_in_one_folder(recipe: Path, tmp_path: Path) -> None:
    """Of the second nothing begins, and what the first one works on stays."""
    jobs = make_jobs(
        recipe,
        tmp_path / "root",
        count=None,
        best_by="kl",
        overrides=(),
        device="cpu",
        gpu=None,
        overwrite=True,
    )
    with alone_in(tmp_path / "root"), locked(tmp_path / "root" / "step-5.partial"):
        with pytest.raises(OutputError, match="another job works on"):
            jobs.begin(None, None, 0)
        (milestone,) = jobs.attempt(None, None, 5, None, ())
        assert milestone.verdict is None
        assert "another job works on" in str(milestone.error)
        assert (tmp_path / "root" / "step-5.partial" / "lock").exists()
        assert not (tmp_path / "root" / "training.json").exists()


def test_a_job_is_alone() -> None:
    """It sees none of the training's processes, and has the cores on which they wait."""
    training = {
        "PATH": "/bin",
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "here",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "none",
        "ACCELERATE_USE_FSDP": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    alone = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0,1", "QUANTKIT_CACHE_BYTES": "0"}
    assert job_environment(training, None) == alone
    assert job_environment(training, "3")["CUDA_VISIBLE_DEVICES"] == "3"
    # Not what torchrun has chosen, but the user.
    assert job_environment({"OMP_NUM_THREADS": "1"}, None)["OMP_NUM_THREADS"] == "1"
    assert job_environment(training | {"OMP_NUM_THREADS": "4"}, None)["OMP_NUM_THREADS"] == "4"
    kept = job_environment(training | {"QUANTKIT_CACHE_BYTES": "9"}, None)
    assert kept["QUANTKIT_CACHE_BYTES"] == "9"


def test_a_job_leaves_its_words_behind_those_of_others(tmp_path: Path) -> None:
    """Its answer is read, its log kept, and its exit code told."""
    log = tmp_path / "logs" / "job.log"
    log.parent.mkdir()
    log.write_text("before\n")
    ended = run_alone("json.tool", ["--no-such-option"], log, os.environ)
    assert (ended.exit_code, ended.said) == (2, "")
    assert log.read_text().startswith("before\n$ json.tool --no-such-option\n")
    assert "unrecognized arguments" in log.read_text()


@pytest.mark.parametrize(
    ("code", "said", "kind", "words"),
    [
        (2, 'warning\n{"error": "no such data"}\n', InputError, "no such data"),
        (5, '{"error": "no room"}', ResourceError, "no room"),
        (1, "", QuantkitError, "ended with exit code 1: see out.log"),
    ],
)
def test_a_refusal_keeps_its_kind(
    code: int, said: str, kind: type[QuantkitError], words: str
) -> None:
    """What the rehearsal has refused is raised in the training."""
    refusal = read_refusal(Ended(code, said, 1.0), Path("out.log"))
    assert type(refusal) is kind
    assert words in str(refusal)
    assert read_refusal(Ended(0, "{}", 1.0), Path("out.log")) is None


def make_milestone(step: int, verdict: Verdict | None, kl: float, perplexity: float) -> Milestone:
    """A step with two artifacts, of which the worse has `kl`."""
    figures = {"a/kl": kl / 2, "b/kl": kl, "b/perplexity": perplexity, "seconds": 1.0}
    return Milestone(step, verdict, figures, kept=verdict is not None)


def test_what_passed_is_better_and_then_what_is_closer() -> None:
    """By the worse artifact of a step; among equals the later step is the better."""
    steps = [
        make_milestone(1, "FAIL", 0.1, 9.0),
        make_milestone(2, "PASS", 0.3, 7.0),
        make_milestone(3, None, 0.0, 0.0),
        make_milestone(4, "INCONCLUSIVE", 0.2, 8.0),
        make_milestone(5, "PASS", 0.2, 8.0),
        make_milestone(6, "PASS", 0.2, 9.0),
    ]
    assert [each.step for each in sort_milestones(steps, "kl")] == [6, 5, 2, 4, 1]
    assert [each.step for each in sort_milestones(steps, "perplexity")] == [2, 5, 6, 4, 1]
    assert find_best(steps, "kl") == steps[5]
    assert find_best([steps[0], steps[2], steps[3]], "kl") is None


def make_outputs(root: Path, milestones: list[Milestone]) -> None:
    """The folders that jobs have written."""
    for milestone in milestones:
        if milestone.kept:
            (root / milestone.name).mkdir(parents=True, exist_ok=True)
            (root / milestone.name / "quantkit.json").write_text("{}")


def test_the_best_outputs_stay_and_the_best_has_a_name(tmp_path: Path) -> None:
    """`best` names nothing that did not pass."""
    steps = [make_milestone(1, "FAIL", 0.1, 9.0)]
    make_outputs(tmp_path, steps)
    now = keep_best(tmp_path, steps, "kl", 1)
    assert not (tmp_path / "best").exists()
    assert (tmp_path / "step-1").is_dir()
    for milestone, best in [
        (make_milestone(2, "PASS", 0.3, 7.0), "step-2"),
        (make_milestone(3, "PASS", 0.4, 7.0), "step-2"),
        (make_milestone(4, "PASS", 0.2, 7.0), "step-4"),
        (make_milestone(5, None, 0.0, 0.0), "step-4"),
    ]:
        make_outputs(tmp_path, [milestone])
        now = keep_best(tmp_path, [*now, milestone], "kl", 1)
        assert os.readlink(tmp_path / "best") == best
        assert [path.name for path in tmp_path.glob("step-*")] == [best]
    assert [each.kept for each in now] == [False, False, False, True, False]
    document = json.loads((tmp_path / "training.json").read_text())
    assert document["best"] == "step-4"
    assert [row["folder"] for row in document["steps"]] == [f"step-{step}" for step in range(1, 6)]


def test_more_than_the_best_may_stay(tmp_path: Path) -> None:
    """Two of three, or all of them."""
    steps = [make_milestone(step, "PASS", step / 10, 7.0) for step in (1, 2, 3)]
    make_outputs(tmp_path, steps)
    assert [each.kept for each in keep_best(tmp_path, steps, "kl", None)] == [True] * 3
    assert [each.kept for each in keep_best(tmp_path, steps, "kl", 2)] == [True, True, False]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-1", "step-2"]


def test_a_training_goes_on_with_what_it_had(tmp_path: Path) -> None:
    """Up to the step that it goes on from; another training is refused the same output."""
    steps = [make_milestone(1, "PASS", 0.1, 7.0), make_milestone(2, "PASS", 0.2, 7.0)]
    assert read_milestones(tmp_path, 0, overwrite=False) == []
    make_outputs(tmp_path, steps)
    record(tmp_path, steps, "kl")
    assert read_milestones(tmp_path, 1, overwrite=False) == steps[:1]
    with pytest.raises(OutputError, match=r"the steps of another training \(step-1, step-2\)"):
        read_milestones(tmp_path, 0, overwrite=False)
    assert read_milestones(tmp_path, 0, overwrite=True) == []
    # What is gone is not the best any more, and the next step takes its place.
    (tmp_path / "step-1" / "quantkit.json").unlink()
    (tmp_path / "step-1").rmdir()
    found = read_milestones(tmp_path, 1, overwrite=False)
    assert found == [replace(steps[0], kept=False)]
    assert [each.kept for each in keep_best(tmp_path, [*found, steps[1]], "kl", 1)] == [False, True]
    assert os.readlink(tmp_path / "best") == "step-2"
    (tmp_path / "training.json").write_text('{"steps": [{}]}')
    with pytest.raises(OutputError, match=r"training.json cannot be read"):
        read_milestones(tmp_path, 1, overwrite=False)
    (tmp_path / "best").unlink()
    (tmp_path / "best").mkdir()
    with pytest.raises(OutputError, match="best is in the way"):
        read_milestones(tmp_path, 1, overwrite=False)


def test_a_failed_job_leaves_no_blocks(tmp_path: Path) -> None:
    """They would fill the disk that it may have failed for."""
    partial = tmp_path / "step-3.partial"
    (partial / "workspace").mkdir(parents=True)
    remove_unfinished(tmp_path, 3)
    assert not partial.exists()
    remove_unfinished(tmp_path, 3)


def test_what_a_killed_training_has_left_is_removed(tmp_path: Path) -> None:
    """Its unfinished job and the checkpoint that was written for it; nothing of others."""
    for name in ("step-3.partial/workspace", "step-3.in-memory/model", "mine.in-memory/notes"):
        (tmp_path / name).mkdir(parents=True)
    remove_stale(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.in-memory"]


def test_figures_are_finite_numbers() -> None:
    """Several artifacts have theirs behind what they are; what is not finite is left out."""
    artifact = make_report("PASS").artifacts[0]
    one = describe_artifacts([artifact], "PASS", 2.0)
    assert one["passed"] == 1.0
    assert one["seconds"] == 2.0
    assert one["size_bytes"] == artifact.size_bytes
    assert artifact.judgement.kl is not None
    assert one["kl"] == artifact.judgement.kl.value
    assert {"perplexity", "perplexity_baseline", "perplexity_increase"} <= one.keys()
    assert {"top1_agreement", "bits_per_weight"} <= one.keys()
    lost = replace(artifact.judgement.kl, value=float("inf"))
    broken = replace(artifact, format="gguf", judgement=replace(artifact.judgement, kl=lost))
    two = describe_artifacts([artifact, broken], "FAIL", 2.0)
    assert two["passed"] == 0.0
    assert two[f"{artifact.format}/kl"] == one["kl"]
    assert "gguf/kl" not in two
    assert "gguf/perplexity" in two
    files = [replace(artifact, format="gguf", scheme=kind) for kind in ("Q4_0", "Q8_0")]
    assert {"gguf-Q4_0/kl", "gguf-Q8_0/kl"} < describe_artifacts(files, "PASS", 2.0).keys()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_training_that_cannot_be_served_is_refused_before_its_first_step(
    recipe: Path, tmp_path: Path
) -> None:
    """No tokenizer, adapters, another training's output: each by a line of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    folder = make_pico_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 2
    options = TrainingArguments(
        output_dir="trained", max_steps=1, use_cpu=True, report_to="none", save_strategy="no"
    )

    def train(callback: Any, **settings: Any) -> int:
        trainer = Trainer(
            model=model, args=options, train_dataset=rows, callbacks=[callback], **settings
        )
        with pytest.raises(InputError) as caught:
            trainer.train()
        words.append(str(caught.value))
        steps: int = trainer.state.global_step
        return steps

    words: list[str] = []
    assert train(make_callback(recipe)) == 0
    assert "the Trainer has no tokenizer" in words.pop()
    (tmp_path / "out" / "step-7").mkdir(parents=True)
    assert train(make_callback(recipe), processing_class=tokenizer) == 0
    assert "holds the steps of another training (step-7)" in words.pop()
    model.peft_config = {}
    assert train(make_callback(recipe), processing_class=tokenizer) == 0
    assert "the model has adapters (PEFT)" in words.pop()
    with pytest.raises(InputError, match="belongs to a Trainer of transformers"):
        make_callback(recipe).on_train_begin(options, None, None)


def test_the_name_of_the_callback_needs_no_torch_until_it_is_used() -> None:
    """`import quantkit.integrations` is light, like quantkit."""
    probe = "import sys, quantkit.integrations; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
