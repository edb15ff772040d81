"""Tests of quantkit.judging.baseline.store, .entries and .folder on real disks and processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from stat import S_IMODE
from typing import Any

import numpy as np
import pytest

from quantkit.errors import InputError, OutputError
from quantkit.judging.baseline import entries
from quantkit.judging.baseline.folder import DEFAULT_BYTES, find_bound, find_folder, find_limit
from quantkit.judging.baseline.store import (
    AnswerStore,
    clear_store,
    describe_store,
    open_store,
)

KEY = "{:064x}"


def opened() -> AnswerStore:
    store = open_store(True)
    assert store is not None
    return store


def keep(store: AnswerStore, number: int, file: Path | None = None, **more: object) -> None:
    draft = store.start(KEY.format(number), {"ok": True, "number": number, **more}, file)
    if draft is not None:
        store.finish(draft)


def kept_numbers() -> list[int]:
    """What is kept, the least recently used first."""
    return [int(entry.key, 16) for entry in entries.list_entries(describe_store().folder)]


def answer_of(store: AnswerStore, number: int, file: Path | None = None) -> Mapping[str, object]:
    found = store.recall(KEY.format(number), file)
    assert found is not None
    return found.answer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "logits"
    path.write_bytes(bytes(range(250)) * 4)
    return path


def test_what_is_kept_comes_back_and_belongs_to_the_user_alone(tmp_path: Path, data: Path) -> None:
    """The caller's file may go; folders and files are closed to others."""
    content = data.read_bytes()
    keep(opened(), 1, data)
    data.unlink()

    assert answer_of(opened(), 1, tmp_path / "again") == {"ok": True, "number": 1}
    assert (tmp_path / "again").read_bytes() == content
    folder = describe_store().folder
    modes = {path.name: S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    assert {name: mode for name, mode in modes.items() if mode & 0o077} == {}


@pytest.mark.parametrize("damage", ["none", "flip", "cut", "add"])
def test_bfloat16_numbers_take_half_of_the_bytes_and_none_is_lost(
    tmp_path: Path, damage: str
) -> None:
    """Infinities, negative zeros and subnormal numbers included; damage is seen as in others."""
    upper = np.arange(1 << 16, dtype="<u4")
    content = (upper << 16).tobytes()
    (tmp_path / "numbers").write_bytes(content)
    keep(opened(), 1, tmp_path / "numbers")
    [halves] = describe_store().folder.glob("*/halves")
    assert halves.stat().st_size == len(content) // 2

    if damage == "none":
        answer_of(opened(), 1, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == content
        return
    kept = bytearray(halves.read_bytes())
    kept[1000] ^= damage == "flip"
    halves.write_bytes(kept[:-1] if damage == "cut" else kept + b"x" * (damage == "add"))
    store = opened()
    assert store.recall(KEY.format(1), tmp_path / "again") is None
    assert not (tmp_path / "again").exists()
    assert "damaged" in store.take_notes()[0]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_a_file_on_another_disk_is_copied_there_and_back(data: Path) -> None:
    """Where no hard link can be made."""
    other = Path("/dev/shm") / f"quantkit-test-{os.getpid()}"
    content = data.read_bytes()
    try:
        other.write_bytes(content)
        keep(opened(), 1, other)
        other.unlink()
        answer_of(opened(), 1, other)
        assert other.read_bytes() == content
    finally:
        other.unlink(missing_ok=True)


def test_the_least_recently_used_goes_first(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the bound holds at each moment."""
    monkeypatch.setenv("QUANTKIT_CACHE_BYTES", "4000")
    for number in range(1, 4):
        keep(opened(), number, data)
        os.utime(describe_store().folder / KEY.format(number), (number, number))
    assert kept_numbers() == [1, 2, 3]
    answer_of(opened(), 1, data.with_name("read"))

    keep(opened(), 4, data)

    assert kept_numbers() == [3, 1, 4]
    assert describe_store().bytes <= describe_store().bound == 4000


def test_a_lower_bound_is_kept_when_the_store_is_opened(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 4):
        keep(opened(), number, data)
    monkeypatch.setenv("QUANTKIT_CACHE_BYTES", "1500")

    opened()

    assert kept_numbers() == [3]


def test_many_small_answers_are_kept_without_counting_all_before_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task's take no time that grows with their square, and the bound holds."""
    monkeypatch.setenv("QUANTKIT_CACHE_BYTES", "40000")
    store = opened()
    counted = []
    monkeypatch.setattr(entries, "list_entries", _counting(entries.list_entries, counted))

    for number in range(300):
        keep(store, number)

    assert len(counted) < 100
    assert describe_store().bytes <= 40000
    assert 200 < len(kept_numbers()) < 300


def _counting(function: Callable[[Path], list[entries.Entry]], calls: list[Path]) -> Any:
    def count(folder: Path) -> list[entries.Entry]:
        calls.append(folder)
        return function(folder)

    return count


def test_one_entry_beyond_the_bound_is_not_kept(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It drives nothing out."""
    keep(opened(), 1)
    monkeypatch.setenv("QUANTKIT_CACHE_BYTES", "900")
    store = opened()
    keep(store, 2, data)

    assert kept_numbers() == [1]
    assert "not all of the baseline's answers are kept" in store.take_notes()[0]


def test_a_run_never_drives_out_what_it_kept_or_used_itself(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A baseline that does not fit is kept as far as it does, and that is said once."""
    monkeypatch.setenv("QUANTKIT_CACHE_BYTES", "4000")
    keep(opened(), 1, data)
    keep(opened(), 2)
    store = opened()
    answer_of(store, 1, tmp_path / "used")
    for number in range(3, 8):
        keep(store, number, data)
    keep(store, 8)

    assert sorted(kept_numbers()) == [1, 3, 4, 8]
    assert len(store.take_notes()) == 1


def test_a_baseline_that_will_not_fit_drives_nothing_out(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of its logits are kept, only what is small."""
    monkeypatch.setenv("QUANTKIT_CACHE_BYTES", "4000")
    keep(opened(), 1, data)
    store = opened()
    store.expect(4001)
    keep(store, 2, data)
    keep(store, 3)

    assert sorted(kept_numbers()) == [1, 3]
    assert "4,001 bytes or more are wanted and 4,000 allowed" in store.take_notes()[0]


def test_the_bound_is_within_a_tenth_of_the_free_space(tmp_path: Path) -> None:
    """Of what would be free without the store."""
    assert find_bound(tmp_path, 10**30) < 10**15
    assert find_bound(tmp_path, 7) == 7


def test_an_entry_that_goes_while_it_is_used_stays_with_its_user(
    tmp_path: Path, data: Path
) -> None:
    """What was put in a job's folder is not the store's any more."""
    content = data.read_bytes()
    keep(opened(), 1, data)
    answer_of(opened(), 1, tmp_path / "used")

    assert clear_store().entries == 1

    assert (tmp_path / "used").read_bytes() == content
    assert describe_store().entries == 0
    assert opened().recall(KEY.format(1), tmp_path / "again") is None


def _keep_many(folder: str, seed: int) -> None:
    store = opened()
    file = Path(folder, f"data-{seed}")
    for number in range(60):
        # Every third key is the other process's too; most others are driven out meanwhile.
        key = number if number % 3 == 0 else number + 1000 * seed
        file.write_bytes(bytes([key % 251]) * 1000)
        keep(store, key, file)
        file.unlink()
        opened().recall(KEY.format(key), file)
        assert not file.exists() or file.read_bytes() == bytes([key % 251]) * 1000
        file.unlink(missing_ok=True)
        store = opened()


def test_two_processes_at_once_leave_whole_entries_within_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They write the same keys, and drive out each other's entries."""
    monkeypatch.setenv("QUANTKIT_CACHE_BYTES", "12000")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_keep_many, args=(str(tmp_path), seed)) for seed in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]

    found = describe_store()
    assert 0 < found.bytes <= found.bound
    assert list(found.folder.glob("writing-*")) == []
    store = opened()
    for number in kept_numbers():
        answer_of(store, number, tmp_path / "read")
        assert (tmp_path / "read").read_bytes() == bytes([number % 251]) * 1000
        (tmp_path / "read").unlink()
    assert store.take_notes() == ()


KILLED = """
import os, signal, sys
from pathlib import Path
from quantkit.judging.baseline import entries
from quantkit.judging.baseline.store import open_store
store = open_store(True)
draft = store.start("0" * 64, {"ok": True}, Path(sys.argv[1]))
if sys.argv[2] == "late":
    entries.finish_entry(draft.unfinished, draft.answer)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["early", "late"])
def test_a_killed_writer_leaves_no_entry_and_is_cleaned_up_after(data: Path, moment: str) -> None:
    """Nothing of it is seen; what it left goes when a store is opened next."""
    ended = subprocess.run([sys.executable, "-c", KILLED, str(data), moment], check=False)
    assert ended.returncode == -signal.SIGKILL
    folder = describe_store().folder
    assert len(list(folder.glob("writing-*"))) == 1
    assert describe_store().entries == 0
    alive = entries.start_entry(folder, data)

    opened()

    assert list(folder.glob("writing-*")) == [alive]


FULL = """
import resource, sys
from quantkit.judging.baseline.store import open_store
store = open_store(True)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
draft = store.start("0" * 64, {"ok": True, "ids": [1] * 1000})
store.finish(draft)
assert store.start("1" * 64, {"ok": True}) is None
print(store.take_notes())
"""


def test_a_full_disk_is_a_note_and_nothing_else() -> None:
    """No second attempt is made, and nothing is left."""
    said = subprocess.run(
        [sys.executable, "-c", FULL], check=True, capture_output=True, text=True
    ).stdout

    assert said.count("the baseline's answers are not kept: cannot write in") == 1
    assert "File too large" in said
    assert [path.name for path in describe_store().folder.iterdir()] == ["lock"]


def test_a_place_that_cannot_be_made_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a home that is read-only."""
    (tmp_path / "file").touch()
    for place in (str(tmp_path / "file"), "/proc/nowhere"):
        monkeypatch.setenv("QUANTKIT_CACHE", place)
        store = opened()
        assert store.recall(KEY.format(1)) is None
        keep(store, 1)
        notes = store.take_notes()
        assert len(notes) == 1
        assert notes[0].startswith(f"the baseline's answers are not kept: cannot make {place}")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_store_that_is_read_only_is_still_read() -> None:
    keep(opened(), 1)
    folder = describe_store().folder
    folder.chmod(0o500)
    try:
        store = opened()
        answer_of(store, 1)
        keep(store, 2)
        assert len(store.take_notes()) == 1
    finally:
        folder.chmod(0o700)


def test_a_link_in_the_place_of_the_folder_is_refused(own_store: Path, tmp_path: Path) -> None:
    """It could lead anywhere."""
    own_store.mkdir()
    (tmp_path / "target").mkdir()
    (own_store / "baselines").symlink_to(tmp_path / "target")

    store = opened()
    keep(store, 1)

    assert "is a link or a file" in store.take_notes()[0]
    assert list((tmp_path / "target").iterdir()) == []
    with pytest.raises(OutputError, match="is a link or a file"):
        clear_store()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_somebody_elses_folder_is_refused(own_store: Path) -> None:
    (own_store / "baselines").mkdir(parents=True)
    os.chown(own_store / "baselines", 12345, 12345)

    assert "belongs to the user 12345" in opened().take_notes()[0]


def test_a_folder_that_was_open_to_others_is_closed(own_store: Path) -> None:
    (own_store / "baselines").mkdir(parents=True, mode=0o777)
    (own_store / "baselines").chmod(0o777)

    opened()

    assert S_IMODE((own_store / "baselines").stat().st_mode) == 0o700


def test_a_data_file_that_is_a_link_is_neither_kept_nor_read(tmp_path: Path, data: Path) -> None:
    """A worker could name any file of the user's by it."""
    link = tmp_path / "link"
    link.symlink_to(data)
    store = opened()
    keep(store, 1, link)
    assert kept_numbers() == []

    store = opened()
    keep(store, 2, data)
    place = describe_store().folder / KEY.format(2) / "data"
    place.unlink()
    place.symlink_to(data)
    assert store.recall(KEY.format(2), tmp_path / "read") is None
    assert kept_numbers() == []


def test_the_environment_says_where_and_how_much() -> None:
    """QUANTKIT_CACHE before XDG_CACHE_HOME before the home folder; 0 bytes are none at all."""
    assert find_folder({"QUANTKIT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a/baselines")
    assert find_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/quantkit/baselines")
    home = Path.home() / ".cache" / "quantkit" / "baselines"
    assert find_folder({"XDG_CACHE_HOME": "relative"}) == find_folder({}) == home
    assert find_limit({}) == DEFAULT_BYTES
    assert find_limit({"QUANTKIT_CACHE_BYTES": "12"}) == 12
    for wrong in ("8G", "-1", "1e9", "²"):
        with pytest.raises(InputError, match="QUANTKIT_CACHE_BYTES is"):
            find_limit({"QUANTKIT_CACHE_BYTES": wrong})


def test_nothing_is_made_where_nothing_is_wanted(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_store(False) is None
    monkeypatch.setenv("QUANTKIT_CACHE_BYTES", "0")
    assert open_store(True) is None
    assert describe_store().entries == clear_store().entries == 0
    assert not own_store.exists()
