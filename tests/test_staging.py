"""An output appears whole, and what quantkit did not write stays where it is."""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
import signal
from pathlib import Path

import pytest

from quantkit.errors import OutputError, ResourceError
from quantkit.planning import check_disk
from quantkit.running import staged
from quantkit.staging import check_output, commit, held_bytes, partial_of
from tests.changes import act_before_changes, die


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

    commit(make_partial(output), output)

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
        commit(partial, output)

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
    commit(partial_of(output), output)


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
