"""One job in a folder, whatever became of the last one and whoever made its files."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from quantkit.errors import OutputError
from quantkit.locking import CLAIM, LOCK, is_local, locked, refuse_held
from quantkit.locking.holders import is_gone, make_lines, name_holder, read_holder
from tests.no_locks import can_forbid, forbid_locks

FORK = multiprocessing.get_context("fork")
SECONDS = 60

needs_filter = pytest.mark.skipif(not can_forbid(), reason="the number of flock is not known here")


def hold(
    folder: Path, before: Callable[[], None] | None, saying: Connection, end: Connection
) -> None:
    """Hold the lock of a folder until a word comes."""
    if before is not None:
        before()
    with locked(folder):
        saying.send("held")
        end.recv()


@contextmanager
def held(folder: Path, before: Callable[[], None] | None = None) -> Iterator[ForkProcess]:
    """Let another process hold the lock of a folder; yield it."""
    said, saying = FORK.Pipe(duplex=False)
    end, ending = FORK.Pipe(duplex=False)
    process = FORK.Process(target=hold, args=(folder, before, saying, end))
    process.start()
    assert said.recv() == "held"
    try:
        yield process
    finally:
        ending.send("end")
        process.join(SECONDS)


def kill(process: ForkProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(SECONDS)


def call_without_locks(work: Callable[[], None]) -> list[str]:
    """Do some work in a process that cannot lock files; return the error that it raised, if any."""
    said, saying = FORK.Pipe(duplex=False)

    def run() -> None:
        forbid_locks()
        try:
            work()
        except Exception as error:
            saying.send([type(error).__name__, str(error)])
        else:
            saying.send([])

    process = FORK.Process(target=run)
    process.start()
    answer: list[str] = said.recv()
    process.join(SECONDS)
    return answer


def take(folder: Path) -> None:
    with locked(folder):
        pass


def test_the_refusal_names_the_holder_and_says_what_to_do(tmp_path: Path) -> None:
    """Whether the folder is only looked at or is to be locked; and then it is free again."""
    with held(tmp_path) as other:
        words = (
            rf"another job works on {re.escape(str(tmp_path))} \(process {other.pid} on "
            rf"{re.escape(os.uname().nodename)} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC\): "
            r"wait for it or stop it$"
        )
        for act in (take, refuse_held):
            with pytest.raises(OutputError, match=words):
                act(tmp_path)
    refuse_held(tmp_path)
    with locked(tmp_path):
        pass
    assert (tmp_path / LOCK).read_bytes() == b""
    refuse_held(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_two_threads_do_not_share_a_lock(tmp_path: Path) -> None:
    """A process can do two jobs at once, on two outputs."""
    errors = []

    def try_it() -> None:
        try:
            take(tmp_path)
        except OutputError as error:
            errors.append(str(error))

    with locked(tmp_path):
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join(SECONDS)
    assert f"(process {os.getpid()} on " in errors[0]


def test_the_lock_of_a_killed_job_is_taken_over(tmp_path: Path) -> None:
    """Its file names it still."""
    with held(tmp_path) as other:
        kill(other)
        assert f"process {other.pid} on ".encode() in (tmp_path / LOCK).read_bytes()
        refuse_held(tmp_path)
        take(tmp_path)


def test_what_a_killed_job_has_started_is_told_from_it(tmp_path: Path) -> None:
    """A child that was forked keeps the lock: the number in the file is of no use."""
    said, saying = os.pipe()
    end, ending = os.pipe()
    parent = os.fork()
    if not parent:
        with locked(tmp_path):
            child = os.fork()
            if not child:
                os.read(end, 1)
                os._exit(0)
            os.write(saying, b"x")
            signal.pause()
    os.read(said, 1)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        with pytest.raises(OutputError, match=r"has ended while something .* goes on.*`fuser /"):
            take(tmp_path)
    finally:
        os.write(ending, b"x")
        for descriptor in (said, saying, end, ending):
            os.close(descriptor)


def test_who_only_looks_takes_no_lock_from_a_job(tmp_path: Path) -> None:
    """Looking locks the file for a moment: the job that begins then waits for that."""
    stop = FORK.Event()

    def look() -> None:
        while not stop.is_set():
            with suppress(OutputError):
                refuse_held(tmp_path)

    looker = FORK.Process(target=look)
    looker.start()
    try:
        for _ in range(100):
            take(tmp_path)
    finally:
        stop.set()
        looker.join(SECONDS)


def make_link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def make_loose_link(path: Path, victim: Path) -> None:
    path.symlink_to(victim.with_name("new"))


def make_second_name(path: Path, victim: Path) -> None:
    os.link(victim, path)


def make_pipe(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path, victim: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("name", [LOCK, CLAIM])
@pytest.mark.parametrize(
    "make", [make_link, make_loose_link, make_second_name, make_pipe, make_folder]
)
def test_what_is_no_file_of_ours_is_neither_followed_nor_waited_for(
    tmp_path: Path, make: Callable[[Path, Path], None], name: str
) -> None:
    """A folder that was unpacked from an archive may hold anything under that name."""
    victim, folder = tmp_path / "victim", tmp_path / "out.partial"
    victim.write_bytes(b"dear")
    folder.mkdir()
    make(folder / name, victim)
    if name == LOCK:
        refuse_held(folder)
        with pytest.raises(OutputError, match=r"remove it|cannot write"):
            take(folder)
    elif can_forbid():
        kind, words = call_without_locks(lambda: take(folder))
        assert (kind, "remove " in words) == ("OutputError", True)
    assert victim.read_bytes() == b"dear"
    assert sorted(os.listdir(tmp_path)) == ["out.partial", "victim"]


@pytest.mark.parametrize("content", [b"\x00\xff" * 300, b"process 1 on \x1b[2J since", b"", "huge"])
def test_a_file_that_says_nothing_is_a_lock_all_the_same(
    tmp_path: Path, content: bytes | str
) -> None:
    """A few bytes of it are read; nothing of what they say reaches the terminal."""

    def write() -> None:
        if isinstance(content, str):
            os.truncate(tmp_path / LOCK, 1 << 40)
        else:
            (tmp_path / LOCK).write_bytes(content)

    (tmp_path / LOCK).touch()
    write()
    take(tmp_path)
    with held(tmp_path):
        os.truncate(tmp_path / LOCK, 0)
        write()
        with pytest.raises(OutputError, match=r"\(its lock does not say which\): wait for it"):
            take(tmp_path)


def test_a_number_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    """Nor is one that waits to be buried there; of another machine nobody knows."""
    own = name_holder()
    assert not is_gone(own)
    assert is_gone(replace(own, started=own.started + 1))
    assert not is_gone(replace(own, started=0))
    assert not is_gone(replace(own, machine="0" * 16, process=1 << 30))
    assert is_gone(replace(own, process=1 << 22))
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert is_gone(replace(own, process=child))
    os.waitpid(child, 0)
    (tmp_path / "file").write_bytes(make_lines(own))
    with (tmp_path / "file").open("rb") as file:
        assert read_holder(file.fileno()) == own


@needs_filter
def test_without_locks_a_file_keeps_others_out(tmp_path: Path) -> None:
    """It names its holder, goes with it, and says that it is there in place of a lock."""
    notes = []

    def look_at_note() -> None:
        with locked(tmp_path) as found:
            assert found.note is not None
            raise OutputError(found.note)

    with held(tmp_path, forbid_locks) as other:
        for act in (take, refuse_held):
            kind, words = call_without_locks(lambda act=act: act(tmp_path))
            assert kind == "OutputError"
            assert f"(process {other.pid} on " in words
            assert words.endswith(f"if it has ended, remove {tmp_path / CLAIM}")
    assert os.listdir(tmp_path) == [LOCK]
    notes += call_without_locks(look_at_note)
    assert "cannot lock files: the file 'holder' in there keeps other jobs out" in notes[1]
    assert os.listdir(tmp_path) == [LOCK]


@needs_filter
def test_without_locks_the_file_of_a_killed_job_is_taken_away(tmp_path: Path) -> None:
    """If it was of this machine: of another one the user has to know."""
    with held(tmp_path, forbid_locks) as other:
        kill(other)
        assert (tmp_path / CLAIM).exists()
        assert call_without_locks(lambda: refuse_held(tmp_path)) == []
        assert call_without_locks(lambda: take(tmp_path)) == []
    assert not (tmp_path / CLAIM).exists()

    elsewhere = replace(name_holder(), host="node7", machine="0" * 16, process=1 << 30)
    for content in (make_lines(elsewhere), b"", b"\xff"):
        (tmp_path / CLAIM).write_bytes(content)
        kind, words = call_without_locks(lambda: take(tmp_path))
        assert kind == "OutputError"
        assert words.endswith(f"if it has ended, remove {tmp_path / CLAIM}")
        assert (tmp_path / CLAIM).read_bytes() == content
    (tmp_path / CLAIM).unlink()
    assert call_without_locks(lambda: take(tmp_path)) == []


@needs_filter
def test_without_locks_one_of_many_takes_a_dead_jobs_place(tmp_path: Path) -> None:
    """Two that see at once that it has ended do not take away each other's files."""
    dead = make_lines(replace(name_holder(), process=1 << 22))
    inside = FORK.Value("i", 0)
    most, rounds = FORK.Value("i", 0), FORK.Value("i", 0)
    start = FORK.Barrier(4)

    def compete() -> None:
        forbid_locks()
        for _ in range(30):
            if start.wait(SECONDS) == 0:
                (tmp_path / CLAIM).write_bytes(dead)
            start.wait(SECONDS)
            try:
                with locked(tmp_path):
                    with inside.get_lock():
                        inside.value += 1
                        most.value = max(most.value, inside.value)
                    os.sched_yield()
                    with inside.get_lock():
                        inside.value -= 1
                        rounds.value += 1
            except OutputError:
                pass

    processes = [FORK.Process(target=compete) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    assert [process.exitcode for process in processes] == [0] * 4
    assert most.value == 1
    assert rounds.value >= 30
    assert os.listdir(tmp_path) == [LOCK]


def test_mounts_whose_locks_stay_at_home_are_known() -> None:
    """Lines as of nfs(5) and of Lustre, one of another device, and none."""
    line = "36 35 0:52 / /mnt rw,relatime shared:1 - {} server:/export rw,vers=3,{}"
    here, other = os.makedev(0, 52), os.makedev(0, 53)
    for kind, options, local in (
        ("nfs", "nolock,local_lock=all,addr=10.0.0.1", True),
        ("nfs4", "local_lock=flock", True),
        ("nfs4", "local_lock=posix", False),
        ("nfs4", "local_lock=none,addr=10.0.0.1", False),
        ("lustre", "localflock,lazystatfs", True),
        ("lustre", "flock", False),
    ):
        mounts = f"22 1 259:1 / / rw - ext4 /dev/root rw\n{line.format(kind, options)}\n"
        assert is_local(here, mounts) is local
        assert not is_local(other, mounts)
    for text in ("", "\n", "36 35 0:52", " - ", "36 35 0:52 / - nfs"):
        assert not is_local(here, text)


def test_of_many_jobs_one_is_in_the_folder(tmp_path: Path) -> None:
    """Though each takes its folder away at the end, as a job that was refused does."""
    folder, counter = tmp_path / "out.partial", tmp_path / "inside"
    done = FORK.Value("i", 0)

    def work() -> None:
        for number in itertools.count():
            if done.value >= 100 or number > 100_000:
                return
            try:
                with locked(folder):
                    counter.mkdir()
                    counter.rmdir()
                    with done.get_lock():
                        done.value += 1
                    (folder / LOCK).unlink()
                    with suppress(OSError):
                        folder.rmdir()
            except OutputError as error:
                if "another job works on" not in str(error):
                    raise

    processes = [FORK.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    assert [process.exitcode for process in processes] == [0] * 3
    assert done.value >= 100
