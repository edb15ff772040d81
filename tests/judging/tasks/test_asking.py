"""Tasks of lm-eval from the recipe to the result: real models, workers, files and lm-eval."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from quantkit.calibration.tokenizer import load_tokenizer
from quantkit.errors import InputError
from quantkit.judging.evaluate import WORKERS
from quantkit.judging.tasks.asking import run_tasks
from quantkit.judging.tasks.loading import load_tasks
from quantkit.judging.worker import Pair, running_pair, worker_command
from quantkit.recipe.judging import TaskSpec
from quantkit.records import Event, TaskResult
from tests.helpers import make_pico_model

ROOT = Path(__file__).parent.parent.parent.parent
DEMO = ROOT / "models" / "demo-llama"
CONTINUATION = "calib_data/tasks/continuation.yaml"

QUIZ = {
    "task": "quiz",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "quiz.jsonl", "train": "quiz.jsonl"}},
    "test_split": "test",
    "fewshot_split": "train",
    "output_type": "multiple_choice",
    "doc_to_text": "{{ question }}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [
        {"metric": name, "aggregation": how, "higher_is_better": True}
        for name, how in (("acc", "mean"), ("acc_norm", "mean"), ("mcc", "matthews_corrcoef"))
    ],
}

_PLAIN = pa.schema(
    [("question", pa.string()), ("choices", pa.list_(pa.string())), ("answer", pa.int64())]
)


def write_quiz(folder: Path, **changes: object) -> str:
    """A task of twenty questions; JSON is YAML too."""
    rows = [
        {"question": f"{a} and {b} are", "choices": ["ba", "ce", "di"], "answer": (a + b) % 3}
        for a in range(4)
        for b in range(5)
    ]
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "quiz.yaml").write_text(json.dumps(QUIZ | changes))
    return str(folder / "quiz.yaml")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tasks")
    return make_pico_model(folder / "one"), make_pico_model(folder / "two", seed=1)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    command = worker_command(None, WORKERS["transformers"])
    with running_pair(command, command, 120) as pair:
        yield pair


def run(
    pair: Pair, models: tuple[Path, Path], folder: Path, *specs: TaskSpec, vocabulary: int = 300
) -> tuple[tuple[TaskResult, ...], list[Event]]:
    """Load both models, and run the tasks."""
    events: list[Event] = []
    first, second = (
        {"op": "load", "path": str(model), "device": "cpu", "threads": 1} for model in models
    )
    pair.ask(first, second)
    pair.answers()
    tokenizer = load_tokenizer(models[0])
    results = run_tasks(
        pair,
        models[0],
        tokenizer,
        vocabulary,
        load_tasks(specs),
        confidence=0.95,
        folder=folder,
        progress=events.append,
    )
    return results, events


def test_the_bundled_task_is_one_that_the_demo_model_can_do(
    pair: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """More right than the quarter of chance; against itself nothing is lost, and no word said."""
    spec = TaskSpec(name=CONTINUATION, limit=24, min_recovery=0.5)

    (result,), events = run(pair, (DEMO, DEMO), tmp_path, spec, vocabulary=4096)

    assert (result.name, result.metric, result.samples) == ("continuation", "acc", 24)
    assert result.baseline == result.artifact > 0.4
    assert (result.lost, result.won, result.p_value, result.verdict) == (0, 0, 1.0, "PASS")
    assert {event.message for event in events} == {"task continuation"}
    assert capfd.readouterr() == ("", "")


def test_scores_are_those_of_lm_eval_with_its_own_model(
    pair: Pair, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With examples before each question, drawn by lm-eval's own seed."""
    import torch
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    name = write_quiz(tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    config = json.loads(Path(name).read_text())
    config["dataset_kwargs"]["data_files"] = {
        split: str(tmp_path / "quiz.jsonl") for split in ("test", "train")
    }

    results, _ = run(
        pair,
        models,
        scratch,
        TaskSpec(name=name, num_fewshot=2),
        TaskSpec(name=name, num_fewshot=2, metric="acc_norm", limit=15),
    )

    for which, folder in enumerate(models):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        own = HFLM(pretrained=model, tokenizer=load_tokenizer(folder), device="cpu", batch_size=1)
        for result, metric, limit in zip(results, ("acc", "acc_norm"), (None, 15), strict=True):
            found = simple_evaluate(
                own,
                tasks=[config],
                num_fewshot=2,
                limit=limit,
                bootstrap_iters=0,
                task_manager=TaskManager(include_defaults=False),
            )
            want = found["results"]["quiz"][f"{metric},none"]
            assert (result.baseline, result.artifact)[which] == pytest.approx(want)
    assert [result.samples for result in results] == [20, 15]
    assert results[0].lost + results[0].won > 0


def test_texts_that_a_model_writes_are_counted_through_the_filter_that_is_named(
    pair: Pair, models: tuple[Path, Path], tmp_path: Path
) -> None:
    name = write_quiz(
        tmp_path,
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target="{{ answer }}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        filter_list=[
            {"name": "whole", "filter": [{"function": "take_first"}]},
            {
                "name": "all_two",
                "filter": [
                    {"function": "regex", "regex_pattern": "nowhere", "fallback": "2"},
                    {"function": "take_first"},
                ],
            },
        ],
    )
    (tmp_path / "scratch").mkdir()

    (result,), _ = run(
        pair, models, tmp_path / "scratch", TaskSpec(name=name, metric="exact_match,all_two")
    )

    assert (result.metric, result.baseline) == ("exact_match,all_two", 6 / 20)
    assert result.recovery == 1


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tasks in the place of those that lm-eval brings: reading its 14,000 takes seconds."""
    folder = tmp_path / "lm_eval"
    folder.mkdir()
    data = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "quiz.jsonl")}}}
    write_quiz(tmp_path)
    tasks = {
        "quiz": {"tag": "all_quizzes"},
        "other": {"tag": "all_quizzes", "doc_to_text": "{{ question }} not", "metric_list": None},
        "hub": {"dataset_path": "org/quiz", "dataset_kwargs": {}},
        "code": {"unsafe_code": True},
    }
    for name, changes in tasks.items():
        tree = {**QUIZ, **data, "fewshot_split": None, "task": name, **changes}
        (folder / f"{name}.yaml").write_text(json.dumps(tree))
    (folder / "group.yaml").write_text(json.dumps({"group": "quizzes", "task": ["quiz", "other"]}))
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("own_tasks")
@pytest.mark.parametrize("name", ["quizzes", "all_quizzes"])
def test_a_group_or_a_tag_is_one_task_over_the_documents_of_all(
    pair: Pair, models: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """Its score is the mean over all documents."""
    (tmp_path / "scratch").mkdir()

    results, _ = run(
        pair,
        models,
        tmp_path / "scratch",
        *(TaskSpec(name=each, limit=15) for each in (name, "quiz", "other")),
    )

    whole, first, second = results
    assert (whole.name, whole.samples) == (name, 30)
    assert whole.artifact == pytest.approx((first.artifact + second.artifact) / 2)
    assert whole.lost == first.lost + second.lost


@pytest.mark.usefixtures("own_tasks")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "quizz"}, "lm-eval has no task 'quizz'; did you mean 'quiz'?"),
        ({"name": "hub"}, "cannot load 'hub': .*; its data comes from the Hub"),
        ({"name": "code"}, "code runs code that the model writes"),
        ({"name": "quizzes", "metric": "mcc"}, "mcc is no mean over documents"),
        ({"name": "quiz.yaml"}, "there is no file 'quiz.yaml'"),
    ],
)
def test_a_task_of_lm_eval_that_cannot_be_judged_is_refused(
    spec: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_tasks([TaskSpec.model_validate(spec)])


@pytest.mark.usefixtures("own_tasks")
def test_a_home_that_cannot_be_written_is_told_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` keeps what it reads, even of files."""

    def refuse(*arguments: object, **keywords: object) -> None:
        raise PermissionError(13, "Permission denied", "/home/me/.cache")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(InputError, match=r"'/home/me/.cache'; it keeps .* set HF_HOME to a folder"):
        load_tasks([TaskSpec(name="quiz")])


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        ({"metric": "bleu"}, {}, "no metric 'bleu' .it has: acc, acc_norm, mcc"),
        ({"metric": "acc,strict"}, {}, "no metric 'acc,strict'"),
        ({"metric": "mcc"}, {}, "mcc is no mean over documents.*possible: acc, acc_norm"),
        ({"num_fewshot": 1}, {"num_fewshot": 0}, "made to be asked without examples"),
        ({}, {"test_split": "gone"}, "cannot load '.*quiz.yaml': KeyError"),
        ({}, {"metric_list": [{"metric": "rouge"}]}, "metric 'rouge' is none of lm-eval's own"),
        ({}, {"doc_to_text": "{{ x.__class__ }}"}, "attribute __class__"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_a_model_is_loaded(
    tmp_path: Path, spec: dict[str, object], changes: dict[str, object], message: str
) -> None:
    name = write_quiz(tmp_path, **changes)

    with pytest.raises(InputError, match=message):
        load_tasks([TaskSpec.model_validate({"name": name} | spec)])


ENDLESS = "{% for a in range(99999999) %}{% for b in range(99999999) %}{% endfor %}{% endfor %}"
HUGE = "{% for a in range(9) %}{{ 'x' * 90000000 }}{% endfor %}"


@pytest.mark.parametrize("changes", [{"doc_to_text": ENDLESS}, {"doc_to_target": HUGE}])
def test_a_template_that_takes_too_much_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    """Of time and of memory; what asks for them is another process."""
    monkeypatch.setattr("quantkit.judging.tasks.loading._READ_SECONDS", 1.0)
    monkeypatch.setattr("quantkit.judging.tasks.rehearsal.MOST_BYTES", 200 << 20)

    with pytest.raises(InputError, match=r"quiz.yaml: takes far more time or memory .* stopped"):
        load_tasks([write_quiz(tmp_path, **changes)])


def test_an_expression_that_takes_too_much_is_stopped(
    pair: Pair, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a filter's, and looked for in what the models answer."""
    regex = {"function": "regex", "regex_pattern": "(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*never"}
    name = write_quiz(
        tmp_path,
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target="{{ answer }}",
        generation_kwargs={"until": ["never"], "max_gen_toks": 24},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        filter_list=[{"name": "slow", "filter": [regex, {"function": "take_first"}]}],
    )
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("quantkit.judging.tasks.loading._READ_SECONDS", 1.0)

    with pytest.raises(InputError, match=r"quiz.yaml: takes far more time or memory"):
        run(pair, models, tmp_path / "scratch", TaskSpec(name=name, limit=1))


@pytest.mark.parametrize("length", [30, 1 << 20])
def test_texts_that_rows_of_parquet_share_are_bounded(tmp_path: Path, length: int) -> None:
    """Some kilobytes would be hundreds of megabytes; what is honest is read whole."""
    texts = pa.DictionaryArray.from_arrays(np.zeros(200, np.int32), pa.array(["x" * length]))
    table = pa.table({"question": texts, "choices": [["ba", "ce"]] * 200, "answer": [1] * 200})
    parquet.write_table(table.cast(_PLAIN), tmp_path / "quiz.parquet", data_page_size=1 << 30)
    files = {"data_files": {"test": "quiz.parquet"}}
    changes = {"dataset_path": "parquet", "dataset_kwargs": files, "fewshot_split": None}
    name = write_quiz(tmp_path, **changes)

    if length > 30:
        with pytest.raises(InputError, match="unpacks to more than 128 MB, since its rows share"):
            load_tasks([name])
        return
    (task,) = load_tasks([name])
    assert len(task.parts["quiz"].eval_docs) == 200


def test_a_missing_lm_eval_is_told_with_the_line_that_installs_it() -> None:
    """And without tasks nobody needs it."""
    script = (
        "import sys\n"
        "sys.modules['lm_eval'] = None\n"
        "from quantkit.judging.tasks.loading import load_tasks\n"
        "assert load_tasks([]) == ()\n"
        "load_tasks(['hellaswag'])\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert "MissingPackageError: gate.tasks needs the package 'lm-eval'" in done.stderr
    assert 'pip install "quantkit[tasks]"' in done.stderr


_INTERRUPTED = """
import os, signal, sys
from quantkit.judging.tasks.rehearsal import rehearse

os.register_at_fork(**{sys.argv[1]: lambda: signal.raise_signal(signal.SIGINT)})
heard = 0
for _ in range(3):
    try:
        rehearse("task", lambda allow: None, 1)
    except KeyboardInterrupt:
        heard += 1
try:
    os.wait()
except ChildProcessError:
    print(heard)
"""


@pytest.mark.parametrize("moment", ["before", "after_in_parent"])
def test_a_signal_while_the_rehearsal_forks_is_heard(moment: str) -> None:
    """And the process that was begun is ended."""
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, moment], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("3\n", "")
