"""Reading rows: jsonl and parquet files, and whatever the package `datasets` loads."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from quantkit.calibration.dataset_folders import check_dataset_folder
from quantkit.calibration.parquet import open_parquet
from quantkit.calibration.sources import (
    KINDS,
    MOST_ROW_BYTES,
    Columns,
    Kind,
    Row,
    Rows,
    check_columns,
    check_domain,
    make_row,
    refuse_pointer,
)
from quantkit.errors import (
    CalibrationError,
    MissingPackageError,
    ResourceError,
    is_of_machine,
    raise_alone,
    unreadable,
)

_MOST_NAMES = 1000
"""Columns that are remembered, for a message that names those that there are."""
_FAULTS = (
    *(ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError),
    ValueError,
)
"""What the package `datasets` trips with over a description or a row that is nonsense."""


def open_rows(data: str, kind: Kind, split: str, columns: Columns) -> Rows:
    """Return the rows of `data`; every row of a jsonl file is checked at once.

    Raises:
        CalibrationError: the data cannot be read, has no rows, or lacks the columns.
        MissingPackageError: the package that reads this kind is not installed.
    """
    rows = OPENERS[kind](data, split, columns)
    if not rows.count:
        raise CalibrationError(f"{rows.name} is empty: it has no rows")
    return rows


def _open_jsonl(data: str, split: str, columns: Columns) -> Rows:
    path = Path(data)
    # Sixteen bytes a row, of which a file may have millions.
    starts, numbers = array("q"), array("q")
    names: dict[str, None] = {}
    try:
        with path.open("rb") as file:
            start = 0
            for number, line in enumerate(_list_lines(file, path), 1):
                if line.strip():
                    where = f"{path}:{number}"
                    tree = _parse_line(line, where)
                    make_row(tree, columns, where)
                    if columns.domain is not None and len(names) < _MOST_NAMES:
                        names |= dict.fromkeys(tree)
                    if columns.domain in tree:
                        names[columns.domain] = None
                    starts.append(start)
                    numbers.append(number)
                start += len(line)
    except OSError as error:
        raise unreadable(path, error, CalibrationError) from error
    if starts:
        check_domain(names, columns, data)

    def read(index: int) -> Row:
        where = f"{path}:{numbers[index]}"
        with path.open("rb") as file:
            file.seek(starts[index])
            return make_row(_parse_line(file.readline(), where), columns, where)

    return Rows(data, len(starts), read)


def _list_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield the lines of a file.

    Raises:
        CalibrationError: one is too long.
    """
    for number in count(1):
        line = file.readline(MOST_ROW_BYTES + 1)
        if len(line) > MOST_ROW_BYTES:
            raise CalibrationError(
                f"{path}:{number}: a line of more than {MOST_ROW_BYTES >> 20} MB; a row is one "
                "JSON object on one line: cut it into several rows"
            )
        if number == 1:
            refuse_pointer(path, line)
        if not line:
            return
        yield line


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        tree = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise CalibrationError(f"{where}: not UTF-8 text; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise CalibrationError(
            f"{where}: not valid JSON: {error.msg} (column {error.colno}); a row is one JSON "
            "object on one line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise CalibrationError(
            f'{where}: a row is a JSON object like {{"text": ...}}, not a {type(tree).__name__}'
        )
    return tree


def _open_dataset(data: str, split: str, columns: Columns) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            "datasets", f"reading {data!r}", "pip install 'quantkit[datasets]'"
        ) from error

    name = f"{data} (split {split})"
    if Path(data).is_dir():
        check_dataset_folder(Path(data))
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        dataset = _load_dataset(datasets, data, split)
    except datasets.exceptions.DatasetsError as error:
        _give_up(data, name, error.__cause__ or error)
    except _FAULTS as error:
        _give_up(data, name, error)
    finally:
        if shown:
            datasets.enable_progress_bars()
    names = dataset.column_names
    check_columns(names, columns, name)
    check_domain(names, columns, name)
    wanted = [column for column in columns.names if column in names]
    dataset = dataset.select_columns(wanted)
    for column in wanted:
        opened = _find_opened(dataset.features[column])
        if opened:
            raise CalibrationError(
                f"{name}: the column {column!r} is described as {opened}, for which `datasets` "
                f"opens the files and addresses that its rows name: describe it as string"
            )

    def read(index: int) -> Row:
        where = f"{name}: row {index}"
        try:
            cells = dataset[index]
        except _FAULTS as error:
            raise CalibrationError(f"{where} cannot be read: {_reason(error)}") from error
        return make_row(cells, columns, where)

    return Rows(name, len(dataset), read)


def _find_opened(feature: Any) -> str:
    """Return the type within a feature whose values are opened to be read; empty: none is.

    They are pictures, sounds, and whatever else `datasets` decodes, but for the text of JSON.
    """
    if isinstance(feature, dict | list):
        inner = feature.values() if isinstance(feature, dict) else feature
        return next(filter(None, map(_find_opened, inner)), "")
    kind = type(feature).__name__
    if hasattr(feature, "decode_example") and kind != "Json":
        return kind
    return _find_opened(feature.feature) if hasattr(feature, "feature") else ""


def _load_dataset(datasets: Any, data: str, split: str) -> Any:
    """One split of a Hub id, of a folder of data files, or of a folder of `save_to_disk`."""
    folder = Path(data)
    # Rows as Python has them, whatever format was saved with them.
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return datasets.load_from_disk(data).with_format(None)
    if (folder / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(data)
        if split not in splits:
            raise ValueError(f"it has the splits {', '.join(splits)}")
        return splits[split].with_format(None)
    if folder.is_dir():
        return datasets.load_dataset(str(folder.resolve()), split=split)
    name, _, config = data.partition(":")
    return datasets.load_dataset(name, config or None, split=split)


def _give_up(data: str, name: str, error: BaseException) -> NoReturn:
    """Say why a dataset cannot be loaded, without the Hub client's exception, which has the token.

    Raises:
        CalibrationError: always, but
        ResourceError: where the machine is to blame.
    """
    words = _explain_dataset(data, name, error)
    raise_alone(ResourceError(words) if is_of_machine(error) else CalibrationError(words))


def _explain_dataset(data: str, name: str, error: BaseException) -> str:
    folder = Path(data)
    message = f"cannot load the dataset {name}: {_reason(error)}"
    if folder.is_dir():
        files = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in KINDS)
        return f"{message}; or name one of its files: {', '.join(files)}" if files else message
    if isinstance(error, ConnectionError):
        return (
            f"{message}; the Hub is needed for a datasets id: check the network, or name a local "
            f"{', '.join(KINDS)} file"
        )
    return message


def _reason(error: BaseException) -> str:
    lines, kind = str(error).strip().splitlines(), type(error).__name__
    if not lines:
        return kind
    # The others say no more than a key, or what some value is not.
    words = OSError, ValueError, ImportError
    return lines[0].strip() if isinstance(error, words) else f"{kind}: {lines[0].strip()}"


OPENERS: Mapping[Kind, Callable[[str, str, Columns], Rows]] = {
    "jsonl": _open_jsonl,
    "parquet": open_parquet,
    "folder": _open_dataset,
    "hub": _open_dataset,
}
