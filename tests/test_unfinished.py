"""What a job leaves that ends before its end: as little as can be, and all that was finished."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import quantkit.staging
from quantkit.errors import CheckpointError, ResourceError
from quantkit.running import staged
from quantkit.staging import check_output, commit, partial_of
from quantkit.workspace import (
    Workspace,
    as_os_error,
    load_block,
    open_workspace,
    store_block,
    store_tensors,
    stored_tensors,
    take_out,
)
from tests.changes import act_before_changes, die
from tests.helpers import no_more_files
from tests.test_staging import fill, words_of
from tests.test_workspace import make_block


def commit_and_die(output: Path, call: int) -> None:
    """In a process of its own."""
    act_before_changes({call: die})
    commit(partial_of(output), output, overwrite=True)


@pytest.mark.parametrize("fails", [True, False], ids=["disk fails", "damaged"])
def test_a_checkpoint_that_cannot_be_read_costs_no_block(tmp_path: Path, fails: bool) -> None:
    """A damaged one does: its files have to change before the job can go on."""
    output = tmp_path / "out"
    workspace = partial_of(output) / "workspace"

    def work() -> None:
        with staged(output, overwrite=True):
            workspace.mkdir()
            (workspace / "block-00000-0").write_text("solved")
            cause = OSError(errno.EIO if fails else errno.EINVAL, "cannot be read")
            raise CheckpointError("cannot read model.safetensors") from cause

    with pytest.raises(ResourceError if fails else CheckpointError):
        work()
    assert (workspace / "block-00000-0").exists() is fails


def test_an_old_output_gets_its_name_back_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between its two renames as anywhere else, a job leaves the old one or the new one."""
    monkeypatch.setattr(quantkit.staging, "exchange", lambda *_: False)
    fork, was_away = multiprocessing.get_context("fork"), False
    for call in itertools.count(1):
        folder = tmp_path / str(call)
        output = folder / "out"
        partial = partial_of(output)
        for place, word in ((output, "old"), (partial, "new")):
            fill(place, word)
        (partial / "lock").write_text("")
        process = fork.Process(target=commit_and_die, args=(output, call))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        was_away |= not output.exists()
        check_output(output, overwrite=True)
        assert words_of(output) in ({"old"}, {"new"})
        if words_of(output) == {"old"}:
            with staged(output, overwrite=True) as again:
                fill(again, "new")
                commit(again, output, overwrite=True)
        assert words_of(output) == {"new"}
        assert [path.name for path in folder.iterdir()] == ["out"]
        assert sorted(path.name for path in output.iterdir()) == ["quantkit.json", "weights"]
    assert was_away


def test_a_folder_of_somebody_else_is_not_removed_as_what_was_replaced(tmp_path: Path) -> None:
    """It came to the place of the partial folder after the job was killed."""
    output = tmp_path / "out"
    fill(output, "new")
    (output / "lock").write_text("")
    (output / "workspace").mkdir()
    partial_of(output).mkdir()
    (partial_of(output) / "letter.txt").write_text("mine")
    with pytest.raises(quantkit.errors.OutputError):
        check_output(output, overwrite=False)
    assert (partial_of(output) / "letter.txt").read_text() == "mine"
    assert sorted(path.name for path in output.iterdir()) == ["quantkit.json", "weights"]


def test_what_an_output_has_replaced_goes_at_one_stroke(tmp_path: Path) -> None:
    """Killed in the midst of its removal, nothing is left that is nobody's."""
    output = tmp_path / "out"
    fill(output, "new")
    (output / "lock").write_text("")
    fill(output / "workspace" / "replaced", "old")
    (output / "workspace" / "replaced" / "quantkit.json").unlink()
    with pytest.raises(quantkit.errors.OutputError, match="exists"):
        check_output(output, overwrite=False)
    assert sorted(path.name for path in output.iterdir()) == ["quantkit.json", "weights"]


@pytest.mark.parametrize("links", [True, False])
def test_statistics_stay_in_the_workspace_until_the_output_stands(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk that is killed while it names its files need not be walked again."""
    workspace = open_workspace(tmp_path / "out.partial", {}, restart=False)
    store_tensors(workspace, "statistics", 0, {"a": torch.ones(3)}, {})

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    place = tmp_path / "out.partial" / "block-00000.safetensors"
    take_out(workspace, "statistics", 0, place)
    assert place.is_file()
    assert stored_tensors(workspace, "statistics") == (frozenset({0}) if links else frozenset())


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ('No space left on device (os error 28) at path "/a/.tmpX (os error 5"', errno.ENOSPC),
        ("header too large", 0),
    ],
)
def test_the_number_of_an_error_is_found_in_the_words_of_the_library(
    words: str, number: int
) -> None:
    """safetensors says where, too."""
    assert as_os_error(SafetensorError(words)).errno == number


def test_a_block_that_cannot_be_opened_is_not_said_to_be_missing(tmp_path: Path) -> None:
    """safetensors calls every refusal "no such file": too many open files is another thing."""
    workspace = open_workspace(tmp_path / "out.partial", {}, restart=False)
    store_block(workspace, make_block(0))
    assert load_block(workspace, 0).index == 0
    found = Workspace(workspace.folder)
    path = next(found.folder.glob("block-*"))
    with (
        no_more_files(),
        pytest.raises(ResourceError, match="is there and cannot be opened"),
        quantkit.workspace._opened(path),
    ):
        pass
