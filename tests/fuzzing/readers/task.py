"""Tasks of lm-eval in files: YAML that an artifact's recipe may name, and their templates."""

from __future__ import annotations

from pathlib import Path

from quantkit.judging.tasks.files import find_data_files, read_task_file
from tests.fuzzing.damage import BYTES
from tests.fuzzing.reader import Reader
from tests.fuzzing.trees import damage_yaml

_TASK = """\
task: own
dataset_path: json
dataset_kwargs:
  data_files:
    test: rows.jsonl
test_split: test
output_type: generate_until
doc_to_text: "Question: {{ question | trim }} Answer:"
doc_to_target: "{{ answer }}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
filter_list:
  - name: first
    filter:
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
num_fewshot: 0
"""


def _build(folder: Path) -> None:
    (folder / "own").mkdir()
    (folder / "own" / "task.yaml").write_text(_TASK)
    (folder / "own" / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')


def _read(folder: Path) -> object:
    path = folder / "task.yaml"
    config = read_task_file(path)
    return find_data_files(path, config)


READERS = (
    Reader(
        name="task",
        build=_build,
        damages={"task.yaml": (*[damage_yaml] * 20, *BYTES)},
        read=_read,
    ),
)
