from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.reader import Checkpoint, hash_files, open_checkpoint, read_tensor
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import CheckpointError
from tests.helpers import make_pico_model, write_shards


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_model(tmp_path_factory.mktemp("pico"), hidden=32, intermediate=48)


@pytest.fixture
def folder(pico: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pico, tmp_path / "model"))


def open_folder(folder: Path) -> Checkpoint:
    return open_checkpoint(resolve_source(str(folder)))


def reshard(folder: Path, shards: int) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_shards(folder, tensors, shards)
    return tensors


def edit_index(folder: Path, name: str, file: str | None) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if file is None:
        del index["weight_map"][name]
    else:
        index["weight_map"][name] = file
    path.write_text(json.dumps(index))


def test_every_tensor_is_read_as_the_library_reads_it(pico: Path) -> None:
    """Names, dtypes, shapes and values of a single file."""
    expected = load_file(pico / "model.safetensors")
    checkpoint = open_folder(pico)

    assert list(checkpoint.tensors) == sorted(expected)
    for name, tensor in expected.items():
        found = read_tensor(checkpoint, name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_config_and_side_files_are_listed(pico: Path) -> None:
    """What an artifact takes along is known from the start."""
    checkpoint = open_folder(pico)

    assert checkpoint.config == json.loads((pico / "config.json").read_text())
    assert [path.name for path in checkpoint.side_files] == [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]


def test_shards_are_read_as_one(folder: Path) -> None:
    """An index over three shards gives the tensors of the single file."""
    expected = reshard(folder, 3)
    checkpoint = open_folder(folder)

    assert checkpoint.tensors.keys() == expected.keys()
    assert len({info.file for info in checkpoint.tensors.values()}) == 3
    assert all(torch.equal(read_tensor(checkpoint, name), expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.bool, torch.float64])
def test_rare_dtypes_are_read_exactly(folder: Path, dtype: torch.dtype) -> None:
    """Tensors that are copied keep their dtype, scalars and empty ones their shape."""
    tensors = {
        "matrix": torch.arange(6).reshape(2, 3).to(dtype),
        "scalar": torch.ones(()).to(dtype),
        "empty": torch.zeros((0, 2)).to(dtype),
    }
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_folder(folder)

    for name, tensor in tensors.items():
        found = read_tensor(checkpoint, name)
        assert (found.dtype, found.shape) == (dtype, tensor.shape)
        assert torch.equal(found.double(), tensor.double())


def test_missing_shard_is_named(folder: Path) -> None:
    """The index names a file that is not there."""
    reshard(folder, 2)
    (folder / "model-00002-of-00002.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"shard model-00002-of-00002.safetensors is missing"):
        open_folder(folder)


def test_tensor_missing_in_its_shard_is_named(folder: Path) -> None:
    """The index names a tensor that no shard has."""
    reshard(folder, 2)
    edit_index(folder, "model.ghost.weight", "model-00001-of-00002.safetensors")

    with pytest.raises(CheckpointError, match=r"'model.ghost.weight' is missing in model-00001"):
        open_folder(folder)


def test_tensor_in_another_shard_than_the_index_says_is_named(folder: Path) -> None:
    """Readers that trust the index would not find it."""
    reshard(folder, 2)
    found = open_folder(folder).tensors["model.norm.weight"].file.name
    other = {"1": "2", "2": "1"}[found[10]]
    edit_index(folder, "model.norm.weight", f"model-0000{other}-of-00002.safetensors")

    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is missing in"):
        open_folder(folder)


def test_tensor_in_two_shards_is_named(folder: Path) -> None:
    """Which of the two is meant cannot be known."""
    tensors = reshard(folder, 2)
    path = folder / "model-00002-of-00002.safetensors"
    name = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
    save_file({**load_file(path), name: tensors[name]}, path)

    with pytest.raises(CheckpointError, match=f"'{name}' is in two shards"):
        open_folder(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "C:x"])
def test_index_cannot_name_files_outside(folder: Path, name: str) -> None:
    """Names from an index go through the one join function."""
    reshard(folder, 2)
    edit_index(folder, "model.norm.weight", name)

    with pytest.raises(CheckpointError, match="refused"):
        open_folder(folder)


def test_truncated_weights_are_named(folder: Path) -> None:
    """As an interrupted download leaves them."""
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)

    with pytest.raises(CheckpointError, match=r"model.safetensors is cut short"):
        open_folder(folder)


def test_file_that_shrinks_after_opening_is_an_error_not_a_crash(folder: Path) -> None:
    """A memory map would die of SIGBUS here."""
    checkpoint = open_folder(folder)
    os.truncate(folder / "model.safetensors", 4096)

    with pytest.raises(CheckpointError, match="cut short while it was in use"):
        read_tensor(checkpoint, "model.norm.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_counted(
    folder: Path, dtype: torch.dtype, bad: float
) -> None:
    """The tensor is named when it is read; opening reads no values."""
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["model.layers.1.mlp.up_proj.weight"].to(dtype)
    weight[3, 5:8] = bad
    tensors["model.layers.1.mlp.up_proj.weight"] = weight
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_folder(folder)

    with pytest.raises(
        CheckpointError, match=r"model.layers.1.mlp.up_proj.weight in .* holds 3 NaN or infinite"
    ):
        read_tensor(checkpoint, "model.layers.1.mlp.up_proj.weight")


def test_folder_without_config_is_refused(folder: Path) -> None:
    """It is no model folder."""
    (folder / "config.json").unlink()

    with pytest.raises(CheckpointError, match=r"has no config.json"):
        open_folder(folder)


@pytest.mark.parametrize("config", [True, False])
def test_folder_with_an_adapter_is_refused(folder: Path, config: bool) -> None:
    """Who has peft would get another model; a folder may also hold nothing else."""
    (folder / "adapter_config.json").write_text("{}")
    if not config:
        (folder / "config.json").unlink()

    with pytest.raises(CheckpointError, match=r"an adapter .*merge_and_unload") as caught:
        open_folder(folder)
    assert "\n" not in str(caught.value)


def test_folder_without_weights_is_refused(folder: Path) -> None:
    """The line names the files that were looked for."""
    (folder / "model.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"holds no weights: neither model.safetensors"):
        open_folder(folder)


def test_hashes_are_those_of_sha256sum(folder: Path) -> None:
    """Config, side files, index and shards, each by its name in the folder."""
    reshard(folder, 2)
    expected = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
    }

    assert hash_files(open_folder(folder)) == expected


# --- pytorch_model.bin ------------------------------------------------------------------------


def pickle_weights(folder: Path, shards: int = 1) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return tensors
    places: dict[str, str] = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        torch.save(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_tensors_are_read(folder: Path, shards: int) -> None:
    """A .bin of plain tensors gives the same values, single or sharded."""
    expected = pickle_weights(folder, shards)
    checkpoint = open_folder(folder)

    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert torch.equal(read_tensor(checkpoint, name), tensor)
    assert set(hash_files(checkpoint)) == {path.name for path in folder.iterdir()}


def test_safetensors_are_preferred_to_pickles(folder: Path) -> None:
    """Where both are there the pickle is not even opened."""
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")

    assert open_folder(folder).tensors["model.norm.weight"].file.name == "model.safetensors"


class Evil:
    """Its unpickling would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o755)


def test_pickle_with_code_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    """The line says why, and nothing happened."""
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.ones(1), "y": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match="possibly code, and is not opened"):
        open_folder(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04garbage"])
def test_damaged_pickle_is_named(folder: Path, content: bytes) -> None:
    """Truncated and foreign files give one line."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)

    with pytest.raises(CheckpointError, match=r"pytorch_model.bin") as caught:
        open_folder(folder)
    assert "\n" not in str(caught.value)


def test_pickle_of_something_else_is_refused(folder: Path) -> None:
    """A list of tensors has no names."""
    (folder / "model.safetensors").unlink()
    torch.save([torch.ones(1)], folder / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match="not named tensors"):
        open_folder(folder)


def test_pickled_tensor_that_claims_more_than_the_file_has_is_refused(folder: Path) -> None:
    """One number that stands for 2**40, as an expanded tensor is stored."""
    (folder / "model.safetensors").unlink()
    expanded = torch.zeros(1).expand(2**20, 2**20)
    torch.save({"model.norm.weight": expanded}, folder / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match="claims 4398046511104 bytes and the file has"):
        open_folder(folder)


def test_nan_in_a_pickle_is_refused(folder: Path) -> None:
    """The same check as for safetensors."""
    tensors = pickle_weights(folder)
    tensors["model.norm.weight"][0] = float("nan")
    torch.save(tensors, folder / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match="holds 1 NaN or infinite value of 32"):
        read_tensor(open_folder(folder), "model.norm.weight")


def test_helpers_write_what_transformers_loads(pico: Path) -> None:
    """The pico models of these tests are real checkpoints: nothing is missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(pico, output_loading_info=True)

    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
