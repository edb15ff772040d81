"""Windows of what the package `datasets` loads: folders, saved datasets and ids of the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from quantkit.errors import CalibrationError, MissingPackageError
from quantkit.plain_yaml import MAX_YAML_BYTES
from tests.helpers import pico_text

TEXTS = [pico_text(words, seed) for seed, words in enumerate((3, 40, 9, 2, 60, 5, 17, 30))]


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _cache_of_datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `datasets` prepares out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def test_the_same_rows_give_the_same_windows_from_every_kind_of_file(
    tmp_path: Path, load: Any
) -> None:
    """jsonl, parquet, a folder of data files and a saved dataset agree."""
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    table = pa.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    parquet.write_table(table, tmp_path / "rows.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"text": text} for text in TEXTS])
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    dataset.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "splits"))

    names = ["rows.jsonl", "rows.parquet", "folder", "saved", "splits"]
    windows = [load(tmp_path / name) for name in names]

    assert len({window.sha256 for window in windows}) == 1
    assert windows[2].source == f"{folder} (split train)"


def test_a_folder_that_datasets_cannot_load_names_its_files(tmp_path: Path, load: Any) -> None:
    """A folder of mixed files is answered with the files that could be meant."""
    (tmp_path / "eval.txt").write_text("a")
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    (tmp_path / "test.txt").write_text("a")

    with pytest.raises(CalibrationError, match=r"name one of its files: eval\.txt, test\.txt, tr"):
        load(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path, load: Any) -> None:
    """A folder is no data by itself."""
    with pytest.raises(CalibrationError, match=r"cannot load the dataset .* \(split train\): "):
        load(tmp_path)


def test_a_missing_split_names_those_that_exist(tmp_path: Path, load: Any) -> None:
    """Both ways of loading a folder say which splits there are."""
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": "a"}])
    dataset = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "saved"))

    for name in ("data", "saved"):
        with pytest.raises(CalibrationError, match=r"\(split test\): .*train"):
            load(tmp_path / name, split="test")


def test_a_dataset_of_the_hub_without_network_is_one_clear_line(tokenizer_folder: Path) -> None:
    """Offline, a datasets id ends in what to do instead."""
    script = (
        "import sys; from pathlib import Path\n"
        "from quantkit.calibration.data import load_tokenizer, load_windows\n"
        "from quantkit.errors import CalibrationError\n"
        "try:\n"
        "    load_windows('org/no-such-data:plain', split='train', text_column='text',\n"
        "        tokenizer=load_tokenizer(Path(sys.argv[1])), samples=1, sequence_length=8,\n"
        "        seed=0)\n"
        "except CalibrationError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tokenizer_folder)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )

    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("cannot load the dataset org/no-such-data:plain (split train): ")
    assert "name a local .txt, .jsonl, .parquet file" in lines[0]


def test_a_missing_file_in_an_existing_folder_is_not_taken_for_a_dataset(
    tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`calib_data/genral` has the shape of an id; where calib_data exists, it is a file."""
    (tmp_path / "calib_data").mkdir()
    (tmp_path / "calib_data" / "general").write_text("a")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(CalibrationError, match="did you mean 'general'"):
        load("calib_data/genral")


_ELSEWHERE = (
    "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {}/rows.jsonl\n"
)


@pytest.mark.parametrize(
    ("name", "head", "tail"),
    [
        ("README.md", f"---\n# {'é' * 140_000}\n", "---\n"),
        ("README.md", f"{' ' * 300_000}\n---\n", "---\n"),
        ("README.md", f"---\n# {'x' * (MAX_YAML_BYTES - 9)}\n---", "---\n"),
        ("README.md", "---\n", "---  \n"),
        (".huggingface.yaml", f"# {'x' * MAX_YAML_BYTES}\n", ""),
    ],
    ids=["letters-of-two-bytes", "blanks", "an-end-at-the-cut", "blanks-behind-it", "no-header"],
)
def test_a_description_is_read_as_far_as_datasets_reads_it(
    tmp_path: Path, load: Any, name: str, head: str, tail: str
) -> None:
    """What lies elsewhere is refused wherever the description names it."""
    (tmp_path / "elsewhere").mkdir()
    write_jsonl(tmp_path / "elsewhere" / "rows.jsonl", [{"text": "of another folder"}])
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"text": "a"}])
    description = head + _ELSEWHERE.format(tmp_path / "elsewhere") + tail
    (folder / name).write_text(description, encoding="utf-8")

    with pytest.raises(CalibrationError, match=r"is longer than \d+ bytes|it is absolute"):
        load(folder)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["train"] * 1000 + ["../other"], "names 1001 splits, and at most 1000"),
        ({"../other": 1}, "no list of names as its splits"),
        (["../other"], "climbs out of the folder"),
    ],
)
def test_every_split_of_a_saved_dataset_is_looked_at(
    tmp_path: Path, load: Any, splits: object, message: str
) -> None:
    """None of them lies elsewhere."""
    datasets.Dataset.from_dict({"text": ["b"]}).save_to_disk(str(tmp_path / "other"))
    dataset = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": splits}))

    with pytest.raises(CalibrationError, match=message):
        load(tmp_path / "saved", split="../other")


@pytest.mark.parametrize("kind", ["dtype: image", "list:\n    - name: content\n      dtype: audio"])
def test_a_column_of_pictures_or_sounds_is_refused_before_a_row_is_read(
    tmp_path: Path, load: Any, kind: str
) -> None:
    """`datasets` would open what the row names, on this disk or in the network."""
    write_jsonl(tmp_path / "train.jsonl", [{"text": None}])
    features = f"dataset_info:\n  features:\n  - name: text\n    {kind}\n"
    (tmp_path / "README.md").write_text(f"---\n{features}---\n")

    with pytest.raises(CalibrationError, match=r"'text' is described as (Image|Audio), for which"):
        load(tmp_path)


def test_a_saved_format_changes_no_row(tmp_path: Path, load: Any) -> None:
    """Texts are texts, also of a dataset that was saved for numpy."""
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    dataset.save_to_disk(str(tmp_path / "plain"))
    dataset.with_format("arrow").save_to_disk(str(tmp_path / "formatted"))

    assert load(tmp_path / "plain").sha256 == load(tmp_path / "formatted").sha256


@pytest.mark.parametrize(
    "files",
    [
        {"README.md": "---\nconfigs: [5]\n---\n"},
        {"README.md": "---\ndataset_info: {features: 5}\n---\n"},
        {"state.json": "{}", "dataset_info.json": "{}"},
        {"dataset_infos.json": "[]"},
    ],
    ids=["configs", "features", "state", "infos"],
)
def test_a_description_that_is_nonsense_is_one_clear_line(
    tmp_path: Path, load: Any, files: dict[str, str]
) -> None:
    """It names what failed, and the file that can be named instead."""
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    with pytest.raises(CalibrationError, match=r"(Type|Key|Attribute)Error: .*: train\.jsonl$"):
        load(tmp_path)


def test_without_the_package_datasets_the_install_line_is_given(
    tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an extra, and says which."""
    monkeypatch.setitem(sys.modules, "datasets", None)

    with pytest.raises(MissingPackageError, match=r"pip install 'quantkit\[datasets\]'"):
        load(tmp_path)
