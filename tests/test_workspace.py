"""The workspace and the staging of outputs."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import quantkit.workspace
from quantkit.errors import InputError, OutputError, ResourceError
from quantkit.locking import locked
from quantkit.records import LayerRecord, QuantizedLayer, SolvedBlock
from quantkit.schemes import SCHEMES
from quantkit.staging import check_output, commit, gate_output, partial_of
from quantkit.workspace import (
    load_block,
    load_records,
    open_workspace,
    read_begun,
    store_block,
    store_matrices,
    stored_blocks,
    stored_matrices,
)


def make_block(index: int, scheme: str = "w4a16_asym") -> SolvedBlock:
    """A block of one layer."""
    name = f"model.layers.{index}.mlp.up_proj"
    codes = torch.randint(-8, 8, (4, 32), dtype=torch.int8)
    scale = torch.rand(4, 1).bfloat16()
    zero_point = torch.zeros(4, 1, dtype=torch.int8) if scheme.endswith("asym") else None
    layer = QuantizedLayer(name, SCHEMES[scheme], 32, codes, scale, zero_point)
    record = LayerRecord(name, scheme, 32, "gptq", 4.5, 0.01, 0.02, 0.03, damping=0.01)
    dense = {f"model.layers.{index}.norm.weight": torch.rand(32).bfloat16()}
    return SolvedBlock(index, (layer,), dense, (record,), {f"fold:{name}": torch.rand(32)})


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16_asym"])
def test_a_block_comes_back_as_it_was_stored(tmp_path: Path, scheme: str) -> None:
    """Every tensor, name and number survives."""
    workspace = open_workspace(tmp_path, {"a": 1}, restart=False)
    block = make_block(3, scheme)

    store_block(workspace, block)
    found = load_block(workspace, 3)

    assert stored_blocks(workspace) == {3}
    assert found.records == load_records(workspace, 3) == block.records
    layer, expected = found.layers[0], block.layers[0]
    assert (layer.name, layer.scheme, layer.group_size) == (
        expected.name,
        expected.scheme,
        expected.group_size,
    )
    assert torch.equal(layer.codes, expected.codes)
    assert torch.equal(layer.scale, expected.scale)
    assert (layer.zero_point is None) == (expected.zero_point is None)
    for name, tensor in block.dense.items():
        assert torch.equal(found.dense[name], tensor)
    for name, tensor in block.replay.items():
        assert torch.equal(found.replay[name], tensor)


def test_a_damaged_block_is_not_used(tmp_path: Path) -> None:
    """A file whose bytes are not those of its name is removed and solved again."""
    workspace = open_workspace(tmp_path, {}, restart=False)
    store_block(workspace, make_block(0))
    store_block(workspace, make_block(1))
    path = next(workspace.folder.glob("block-00001-*"))
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)

    assert stored_blocks(workspace) == {0}
    assert not path.exists()


def test_the_same_job_is_resumed_and_another_is_refused(tmp_path: Path) -> None:
    """A resume must agree in everything that the blocks depend on."""
    store_block(open_workspace(tmp_path, {"seed": 0}, restart=False), make_block(0))

    assert stored_blocks(open_workspace(tmp_path, {"seed": 0}, restart=False)) == {0}
    with pytest.raises(InputError, match="differs in seed"):
        open_workspace(tmp_path, {"seed": 1}, restart=False)
    assert stored_blocks(open_workspace(tmp_path, {"seed": 1}, restart=True)) == frozenset()


def hold(folder: Path, holding, release) -> None:
    """Hold the lock of a folder in another process."""
    with locked(folder):
        holding.set()
        release.wait(30)


def test_a_second_job_on_the_same_output_is_refused(tmp_path: Path) -> None:
    """The lock names its holder."""
    context = multiprocessing.get_context("fork")
    holding, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, holding, release))
    other.start()
    assert holding.wait(30)

    with pytest.raises(OutputError, match=f"process {other.pid} on "), locked(tmp_path):
        pass
    release.set()
    other.join(30)
    with locked(tmp_path):
        pass


def test_an_existing_output_needs_overwrite(tmp_path: Path) -> None:
    """And what quantkit did not write is never replaced."""
    output = tmp_path / "out"
    check_output(output, overwrite=False)
    output.mkdir()
    with pytest.raises(OutputError, match="--overwrite"):
        check_output(output, overwrite=False)
    check_output(output, overwrite=True)
    (output / "thesis.tex").write_text("dear")
    with pytest.raises(OutputError, match="leaves it alone"):
        check_output(output, overwrite=True)
    (output / "report.json").write_text("{}")
    with pytest.raises(OutputError, match="leaves it alone"):
        check_output(output, overwrite=True)
    (output / "quantkit.json").write_text("{}")
    check_output(output, overwrite=True)


@pytest.mark.parametrize("name", [".", "..", "", "a/..", "/"])
def test_an_output_without_a_name_of_its_own_is_refused(name: str) -> None:
    """A folder is renamed into its place: the working folder cannot be that place."""
    with pytest.raises(OutputError, match="has no name of its own"):
        check_output(Path(name), overwrite=True)


def test_a_gate_reports_beside_the_artifact_unless_told_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for an artifact that is called `.`: its folder has a name."""
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path / "demo")
    assert gate_output("artifacts/demo") == Path("artifacts/demo.gate")
    assert gate_output("artifacts/demo/", "reports") == Path("reports")
    assert gate_output(".") == tmp_path / "demo.gate"
    assert gate_output("/") == Path("/.gate")


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    """The error names the file that is in the way."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file is a file"):
        check_output(tmp_path / "file" / "deep" / "out", overwrite=False)


def test_commit_replaces_the_old_output_as_a_whole(tmp_path: Path) -> None:
    """Neither the workspace nor the lock nor the old files remain."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    partial = partial_of(output)
    (partial / "workspace").mkdir(parents=True)
    (partial / "lock").write_text("")
    (partial / "new").write_text("new")

    commit(partial, output, overwrite=True)

    assert [path.name for path in output.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", ["empty", "half", "zeros"])
@pytest.mark.parametrize("kind", ["block", "fisher"])
def test_what_power_took_from_a_file_is_found(tmp_path: Path, damage: str, kind: str) -> None:
    """A file that was renamed, and whose bytes never reached the disk."""
    workspace = open_workspace(tmp_path, {}, restart=False)
    store_block(workspace, make_block(0))
    store_matrices(workspace, 1, {"layer": torch.rand(4, 4)})
    (path,) = workspace.folder.glob(f"{kind}-*")
    data = path.read_bytes()
    lost = {"empty": b"", "half": data[: len(data) // 2], "zeros": bytes(len(data))}
    path.write_bytes(lost[damage])

    again = open_workspace(tmp_path, {}, restart=False)

    assert stored_blocks(again) == (set() if kind == "block" else {0})
    assert stored_matrices(again) == (set() if kind == "fisher" else {1})
    assert not path.exists()


@pytest.mark.parametrize("left", [b"", b'{"seed":', b"\0" * 12, b"[]", None])
def test_blocks_of_an_unknown_job_are_not_trusted(tmp_path: Path, left: bytes | None) -> None:
    """Without a whole job.json nobody knows what they are of."""
    workspace = open_workspace(tmp_path, {"seed": 0}, restart=False)
    store_block(workspace, make_block(0))
    if left is None:
        (workspace.folder / "job.json").unlink()
    else:
        (workspace.folder / "job.json").write_bytes(left)

    for _ in range(2):
        again = open_workspace(tmp_path, {"seed": 0}, restart=False)
        assert stored_blocks(again) == frozenset()
        assert [path.name for path in again.folder.iterdir()] == ["job.json"]


def test_blocks_stay_where_a_disk_cannot_be_read(tmp_path: Path) -> None:
    """A folder in the place of the file stands for whatever keeps it from being read."""
    workspace = open_workspace(tmp_path, {"seed": 0}, restart=False)
    store_block(workspace, make_block(0))
    job = workspace.folder / "job.json"
    job.unlink()
    job.mkdir()

    for restart in (False, True):
        with pytest.raises(OutputError, match=r"cannot read .*job\.json .*Is a directory; mend it"):
            open_workspace(tmp_path, {"seed": 0}, restart=restart)
    assert stored_blocks(workspace) == {0}


def test_a_workspace_holds_no_more_than_it_needs(tmp_path: Path) -> None:
    """Unfinished files go, and matrices with the block that needed them; a block is there once."""
    workspace = open_workspace(tmp_path, {}, restart=False)
    for index in range(3):
        store_matrices(workspace, index, {"layer": torch.rand(4, 4)})
    store_block(workspace, make_block(0))
    store_block(workspace, make_block(0))
    assert stored_matrices(workspace) == {1, 2}
    assert len(list(workspace.folder.glob("block-00000-*"))) == 1

    store_matrices(workspace, 0, {"layer": torch.rand(4, 4)})
    for name in ("block-00001.writing", "allocation.json.writing", ".tmpAbCdEf"):
        (workspace.folder / name).write_bytes(b"half")
    again = open_workspace(tmp_path, {}, restart=False)

    assert stored_matrices(again) == {1, 2}
    assert {path.suffix for path in again.folder.iterdir()} == {".json", ".safetensors"}


def test_a_block_that_cannot_be_written_leaves_nothing_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk it would keep the next one from its room."""
    workspace = open_workspace(tmp_path, {}, restart=False)

    def refuse(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantkit.workspace, "sync", refuse)
    with pytest.raises(ResourceError, match=r"no space left while writing .*block-00000"):
        store_block(workspace, make_block(0))
    assert [path.name for path in workspace.folder.iterdir()] == ["job.json"]


def test_the_lock_of_a_folder_that_is_gone_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opened the file before a job ended gets a new one."""
    folder = tmp_path / "out.partial"
    flock, gone = fcntl.flock, []

    def take_away_first(handle: object, how: int) -> None:
        if not gone:
            gone.append(True)
            shutil.rmtree(folder)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", take_away_first)
    with locked(folder):
        assert (folder / "lock").read_text().startswith("process ")


@pytest.mark.parametrize("damage", ["records", "scheme", "codes", "none", "name"])
def test_a_block_of_another_shape_is_made_again(tmp_path: Path, damage: str) -> None:
    """Its bytes are those of its name, and it is not what a job writes."""
    workspace = open_workspace(tmp_path, {}, restart=False)
    store_block(workspace, make_block(0))
    path = next(workspace.folder.glob("block-*"))
    with safe_open(path, framework="pt") as reader:
        about = json.loads(reader.metadata()["block"])
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    path.unlink()
    changes = {"records": {"records": [{}]}, "scheme": {"layers": [["a", "w9", None]]}}
    if damage == "codes":
        del tensors["codes:model.layers.0.mlp.up_proj"]
    metadata = {} if damage == "none" else {"block": json.dumps(about | changes.get(damage, {}))}
    save_file(tensors, path, metadata=metadata)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    name = f"block-0-0-{digest}" if damage == "name" else f"block-00000-{digest}"
    path.rename(workspace.folder / f"{name}.safetensors")

    assert stored_blocks(workspace) == frozenset()
    assert not any(workspace.folder.glob("block-*"))


def test_a_job_that_nests_without_end_is_none(tmp_path: Path) -> None:
    """Whose blocks those are cannot be told."""
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "job.json").write_text("[" * 100_000)

    assert read_begun(tmp_path) == {}
