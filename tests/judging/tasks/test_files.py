"""YAML files of the user's own are read as data: what would run code is refused."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from quantkit.errors import InputError
from quantkit.judging.tasks.files import find_data_files, find_task_file, read_task_file

ROOT = Path(__file__).parent.parent.parent.parent

PLAIN = """\
task: quiz
dataset_path: json
dataset_kwargs:
  data_files:
    test: quiz.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{ question.strip() }}\\nAnswer:"
doc_to_choice: "{{ [choices[0], choices[index|int], choices[-1]] }}"
doc_to_target: answer
"""


def write(folder: Path, text: str, name: str = "quiz.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    (folder / "quiz.jsonl").write_text("{}\n")
    return path


def test_a_file_is_read_on_top_of_what_it_includes(tmp_path: Path) -> None:
    """And its data is beside it, wherever the work is done."""
    write(tmp_path, PLAIN, "base.yaml")
    path = write(
        tmp_path, "include: base.yaml\ntask: other\nnum_fewshot: 2\nmetadata: {version: 1}\n"
    )

    config = read_task_file(path)

    assert (config["task"], config["num_fewshot"], config["test_split"]) == ("other", 2, "test")
    assert "metadata" not in config
    assert find_data_files(path, config) == {"test": [tmp_path / "quiz.jsonl"]}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "process_results: !function utils.run",
            r"quiz.yaml:11: a tag such as !function runs code",
        ),
        ("metadata: !!python/object/apply:os.system [true]", "runs code"),
        ("class: evil", "names a Python class"),
        ("unsafe_code: true", "what the model writes"),
        ("use_prompt: 'promptsource:*'", "from another place"),
        ("metric_list: [{metric: bleu, hf_evaluate: true}]", "hf_evaluate runs code"),
        ("group: many", "describes no task"),
        ("include: quiz.yaml", "includes itself"),
        ("include: none.yaml", "cannot read .*none.yaml"),
        ("description: '{{ x.__class__ }}'", "attribute __class__"),
        ("description: '{{ x[\"__class__\"] }}'", "field __class__"),
        ("description: '{{ x[name] }}'", r"an index without \|int"),
        ("description: '{{ x|attr(name) }}'", "filter attr"),
        ("description: '{{ x|join(attribute=name) }}'", "filter join"),
        ("description: '{{ x.gi_frame }}'", "attribute gi_frame"),
        ("description: '{{ \"{0.a}\".format(x) }}'", "attribute format"),
        ("description: '{% include \"other\" %}'", "another template"),
        ("description: '{{ 9 ** 9 ** 9 }}'", "a power"),
        ("description: '{{ lipsum(n=9) }}'", "a call of lipsum"),
        ("description: '{% macro a() %}{% endmacro %}'", "a part that calls itself"),
        ("description: '{% for a in x recursive %}{{ loop(x) }}{% endfor %}'", "a call of loop"),
        ("description: '{{ x'", "unexpected end of template"),
        ("description: [1, 2", "is no YAML"),
    ],
)
def test_what_runs_code_or_is_broken_is_refused(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_task_file(write(tmp_path, PLAIN + more + "\n"))


def test_loops_over_what_a_document_has_are_read(tmp_path: Path) -> None:
    """As lm-eval's own tasks write their choices."""
    choices = "{% for i in range(choices|length) %}{{ choices[i|int] }}{% endfor %}"

    config = read_task_file(write(tmp_path, f"{PLAIN}description: '{choices}'\n"))

    assert config["description"] == choices


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("quiz.jsonl", "gone.jsonl", "there is no data file .*gone.jsonl"),
        ("quiz.jsonl", "quiz.csv", "data files of this task end in .jsonl"),
        ("  data_files:\n    test: quiz.jsonl", "  field: rows", "names data_files"),
    ],
)
def test_data_that_is_not_there_is_told_of(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = write(tmp_path, PLAIN.replace(old, new))

    with pytest.raises(InputError, match=message):
        find_data_files(path, read_task_file(path))


def test_data_on_the_hub_is_left_to_lm_eval(tmp_path: Path) -> None:
    path = write(tmp_path, PLAIN.replace("dataset_path: json", "dataset_path: org/quiz"))

    assert find_data_files(path, read_task_file(path)) is None


def test_a_file_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, PLAIN)

    with pytest.raises(InputError, match=r"no file .*quizz.yaml'; did you mean .*quiz.yaml"):
        find_task_file(str(path.with_name("quizz.yaml")))


def test_the_bundled_task_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    config = read_task_file(find_task_file("calib_data/tasks/continuation.yaml"))

    assert config["task"] == "continuation"


def test_the_bundled_questions_are_what_their_script_makes() -> None:
    names = runpy.run_path(str(ROOT / "scripts" / "make_task.py"))
    text = names["SOURCE"].read_text(encoding="utf-8")

    rows = names["make_questions"](names["find_passages"](text))

    written = names["TARGET"].read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in written] == rows
    assert len({row["context"] for row in rows}) == 200
    assert all(row["choices"].count(row["choices"][row["answer"]]) == 1 for row in rows)
