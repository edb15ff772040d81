"""An output appears whole, and what quantkit did not write stays where it is."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from quantkit.errors import InputError, OutputError, ResourceError
from quantkit.locking import locked
from quantkit.planning import check_disk
from quantkit.ranks import Ranks
from quantkit.running import alone_in, silent, staged, staged_by_first
from quantkit.staging import check_output, commit, held_bytes, partial_of
from tests.changes import act_before_changes, die
from tests.no_locks import can_forbid, forbid_locks


def make_partial(output: Path) -> Path:
    """A job's folder that is ready to become `output`."""
    partial = partial_of(output)
    partial.mkdir()
    (partial / "lock").write_text("")
    (partial / "new").write_text("new")
    return partial


def test_a_strangers_folder_is_never_filled(tmp_path: Path) -> None:
    """A job would discard it or rename it; a folder that a job left is gone on with."""
    output = tmp_path / "out"
    partial = partial_of(output)
    partial.mkdir()
    check_output(output, overwrite=False)
    (partial / "thesis.tex").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"out\.partial is in the way"):
            check_output(output, overwrite=overwrite)
    (partial / "lock").write_text("")
    check_output(output, overwrite=False)


def test_a_link_in_place_of_the_folder_to_be_filled_is_refused(tmp_path: Path) -> None:
    """What it points to would be filled and then forgotten."""
    (tmp_path / "elsewhere").mkdir()
    partial_of(tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is in the way"):
        check_output(tmp_path / "out", overwrite=False)


def test_replacing_an_output_touches_nothing_beside_it(tmp_path: Path) -> None:
    """Whatever it is called."""
    output = tmp_path / "out"
    for folder in (output, tmp_path / "out.replaced"):
        folder.mkdir()
        (folder / "old").write_text("old")

    commit(make_partial(output), output, overwrite=True)

    assert sorted(path.name for path in output.iterdir()) == ["new"]
    assert (tmp_path / "out.replaced" / "old").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.replaced"]


def test_the_old_output_stays_when_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    """The rename fails here because its source was moved aside with the output."""
    output = tmp_path / "out"
    partial = output / "inside.partial"
    partial.mkdir(parents=True)
    (output / "old").write_text("old")

    with pytest.raises(OutputError, match="cannot write"):
        commit(partial, output, overwrite=True)

    assert (output / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def make_job(folder: Path, *, replaces: bool) -> Path:
    """A job that is done but for its commit; return its output."""
    output = folder / "out"
    if replaces:
        fill(output, "old")
    partial = make_partial(output)
    fill(partial, "new")
    (partial / "workspace").mkdir()
    for index in range(3):
        (partial / "workspace" / f"block-{index}").write_text("solved")
    return output


def fill(folder: Path, word: str) -> None:
    """Write what an output holds."""
    (folder / "weights").mkdir(parents=True)
    (folder / "quantkit.json").write_text(word)
    for name in ("model", "config"):
        (folder / "weights" / name).write_text(word)


def words_of(output: Path) -> set[str]:
    """What is written in the files of an output, which are all there."""
    names = ("quantkit.json", "weights/model", "weights/config")
    return {(output / name).read_text() for name in names}


def commit_and_die(output: Path, call: int) -> None:
    """In a process of its own."""
    act_before_changes({call: die})
    commit(partial_of(output), output, overwrite=True)


@pytest.mark.parametrize("replaces", [False, True], ids=["first", "replaces"])
def test_a_job_killed_in_its_last_steps_is_done_or_has_its_blocks(
    tmp_path: Path, replaces: bool
) -> None:
    """Before every one of them; the next job on the output removes what is left of the last."""
    fork, ends = multiprocessing.get_context("fork"), []
    for call in itertools.count(1):
        folder = tmp_path / str(call)
        folder.mkdir()
        output = make_job(folder, replaces=replaces)
        process = fork.Process(target=commit_and_die, args=(output, call))
        process.start()
        process.join(30)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL

        found = words_of(output) if output.exists() else set()
        ends.append(found)
        assert found in ([{"old"}, {"new"}] if replaces else [set(), {"new"}])
        partial = partial_of(output)
        assert found == {"new"} or len(list((partial / "workspace").iterdir())) == 3
        if found == {"new"}:
            with pytest.raises(OutputError, match="exists"):
                check_output(output, overwrite=False)
            assert [path.name for path in folder.iterdir()] == ["out"]
            assert not {"lock", "workspace"} & {path.name for path in output.iterdir()}
        else:
            with staged(output, overwrite=replaces):
                assert sorted(path.name for path in partial.iterdir()) == ["lock", "workspace"]
    assert ends[0] != ends[-1] == {"new"}


def test_what_an_unfinished_job_holds_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is room that the same job need not find again."""
    output = tmp_path / "out"
    assert held_bytes(output) == 0
    workspace = partial_of(output) / "workspace"
    workspace.mkdir(parents=True)
    (workspace / "block-0").write_bytes(bytes(1 << 20))
    (workspace / "link").symlink_to("nowhere")
    assert 1 << 20 <= held_bytes(output) < 2 << 20
    # Of the real disk others use more or less from one moment to the next.
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    check_disk(output, 1 << 20)
    with pytest.raises(ResourceError, match="the job needs"):
        check_disk(output, 2 << 20)


def test_an_output_whose_job_is_at_its_last_step_is_left_alone(tmp_path: Path) -> None:
    """It has its name, and what it replaced is being removed still."""
    output = tmp_path / "out"
    fill(output, "new")
    (output / "workspace").mkdir()
    with locked(output):
        for overwrite in (False, True):
            with pytest.raises(OutputError, match=r"another job works on .*out \(process"):
                check_output(output, overwrite=overwrite)
        assert (output / "workspace").exists()
    check_output(output, overwrite=True)
    assert sorted(path.name for path in output.iterdir()) == ["quantkit.json", "weights"]


def replace_often(output: Path, word: str, times: int) -> None:
    """In a process of its own: write an output again and again, in turn with others."""
    done = 0
    while done < times:
        try:
            with staged(output, overwrite=True) as partial:
                fill(partial, word)
                (partial / "workspace").mkdir()
                (partial / "workspace" / "block-0").write_text(word)
                commit(partial, output, overwrite=True)
                done += 1
        except OutputError as error:
            if "another job works on" not in str(error):
                raise


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no-locks"])
def test_jobs_that_replace_one_output_at_once_take_turns(tmp_path: Path, locks: bool) -> None:
    """Each is refused or has its turn, to the last step: nothing of two jobs gets mixed."""
    if not locks and not can_forbid():
        pytest.skip("the number of flock is not known here")
    output, fork = tmp_path / "out", multiprocessing.get_context("fork")

    def work(word: str) -> None:
        if not locks:
            forbid_locks()
        replace_often(output, word, 15)

    processes = [fork.Process(target=work, args=(word,)) for word in ("one", "two", "six")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(words_of(output)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in output.iterdir()) == ["quantkit.json", "weights"]


def commit_and_wait(output: Path, call: int, saying: Connection, going: Connection) -> None:
    """In a process of its own: stop before a call of the commit until a word comes."""

    def wait() -> None:
        saying.send("waits")
        going.recv()

    with staged(output, overwrite=True) as partial:
        fill(partial, "new")
        (partial / "workspace").mkdir()
        act_before_changes({call: wait})
        commit(partial, output, overwrite=True)
    saying.send("done")


@pytest.mark.parametrize("replaces", [False, True], ids=["first", "replaces"])
def test_between_the_last_steps_of_a_job_no_other_begins(tmp_path: Path, replaces: bool) -> None:
    """Before every one of them; whoever begins behind the last is disturbed by nothing."""
    fork, entered = multiprocessing.get_context("fork"), []
    for call in itertools.count(1):
        output = tmp_path / str(call) / "out"
        if replaces:
            fill(output, "old")
        said, saying = fork.Pipe(duplex=False)
        going, go = fork.Pipe(duplex=False)
        process = fork.Process(target=commit_and_wait, args=(output, call, saying, going))
        process.start()
        if said.recv() == "done":
            break
        refused = ""
        try:
            with staged(output, overwrite=True) as partial:
                entered.append(call)
                fill(partial, "next")
                go.send("on")
                process.join(60)
                commit(partial, output, overwrite=True)
        except OutputError as error:
            refused = str(error)
            go.send("on")
            process.join(60)
        assert ("another job works on" in refused) is (call not in entered)
        assert words_of(output) == {"new" if refused else "next"}
        assert process.exitcode == 0
        assert os.listdir(output.parent) == ["out"]
    process.join(60)
    assert entered == list(range(call - len(entered), call))
    assert len(entered) < call // 2


def test_what_was_made_for_a_refused_job_goes_with_it(tmp_path: Path) -> None:
    """The folders above its output too, unless others have come to use them."""
    for other in (False, True):
        with suppress(InputError), staged(tmp_path / "a" / "b" / "out", overwrite=False):
            assert (tmp_path / "a" / "b" / "out.partial" / "lock").exists()
            if other:
                (tmp_path / "a" / "other").mkdir()
            raise InputError("refused")
        assert (tmp_path / "a").exists() is other
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other"]


def test_a_job_that_fails_behind_its_commit_leaves_the_next_one_alone(tmp_path: Path) -> None:
    """Which has begun in a folder of the same name."""
    output = tmp_path / "out"
    with suppress(InputError), staged(output, overwrite=False) as partial:
        fill(partial, "new")
        commit(partial, output, overwrite=True)
        with locked(partial):
            raise InputError("late")
    assert (partial / "lock").exists()
    assert words_of(output) == {"new"}


def test_of_several_processes_of_a_job_the_first_holds_the_lock(tmp_path: Path) -> None:
    """The others, perhaps on other machines, write nothing."""
    output = tmp_path / "out"
    for rank in (0, 1):
        ranks = Ranks(rank, 2)
        with staged_by_first(ranks, output, overwrite=False, tell=silent) as partial:
            assert partial == partial_of(output)
            assert partial.exists() is (rank == 0)
            if rank == 0:
                commit(partial, tmp_path / "away", overwrite=True)


def test_a_folder_that_fills_has_one_writer_and_keeps_no_lock(tmp_path: Path) -> None:
    """As the root of a sweep; what is in it stays, and it goes if there is nothing."""
    root = tmp_path / "a" / "root"
    with alone_in(root), pytest.raises(OutputError, match="another job works on"), alone_in(root):
        pass
    assert not root.parent.exists()
    with alone_in(root):
        (root / "table").touch()
    assert [path.name for path in root.iterdir()] == ["table"]
