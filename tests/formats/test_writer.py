"""What the compressed-tensors writer copies, splits and refuses, and what it leaves behind."""

from __future__ import annotations

import json
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.errors import CheckpointError, ResourceError
from quantkit.formats.compressed_tensors import write_compressed_tensors
from quantkit.formats.shards import INDEX_NAME
from quantkit.numerics.affine import dequantize_layer
from quantkit.records import SolvedBlock
from tests.formats.cases import ALL_IN_ONE, MIXED, list_files, make_case, stored_tensors
from tests.helpers import make_pico_model


def test_the_tokenizer_and_the_terms_travel_but_code_does_not(tmp_path: Path) -> None:
    """Named side files are copied byte for byte; scripts, pickles and notes stay behind."""
    model = make_pico_model(tmp_path / "model")
    (model / "LICENSE").write_text("terms")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    for name in (
        "modeling_pico.py",
        "optimizer.bin",
        "notes.txt",
        "additional_chat_templates/x.py",
    ):
        (model / name).write_text("print('no')")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_pico.Config"}
    (model / "config.json").write_text(json.dumps(config))
    artifact = make_case(model, [("*", "w4a16", 32)]).write(tmp_path / "artifact")
    for name in (
        "LICENSE",
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert (tmp_path / "artifact" / name).read_bytes() == (model / name).read_bytes()
    kept = {"config.json", "model.safetensors"}
    assert artifact.files.keys() - kept == {
        path.relative_to(model).as_posix()
        for path in list_files(model)
        if path.suffix not in (".py", ".bin", ".txt") and path.name not in kept
    }
    assert "auto_map" not in json.loads((tmp_path / "artifact" / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "artifact")
    assert tokenizer("ba ce").input_ids[0] == 0


def test_shards_hold_the_same_tensors_and_load(tmp_path: Path) -> None:
    """A small shard size gives an index and several files with the tensors of the single file."""
    model = make_pico_model(tmp_path / "model", hidden=128, shards=3)
    case = make_case(model, MIXED)
    case.write(tmp_path / "single")
    artifact = case.write(tmp_path / "sharded", max_shard_bytes=30_000)
    index = json.loads((tmp_path / "sharded" / INDEX_NAME).read_text())
    stored = stored_tensors(tmp_path / "sharded")
    single = stored_tensors(tmp_path / "single")
    assert len(set(index["weight_map"].values())) > 3
    assert set(index["weight_map"]) == set(stored) == set(single)
    assert all(torch.equal(stored[name], single[name]) for name in single)
    assert index["metadata"]["total_size"] == artifact.tensor_bytes
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", dtype=torch.float32)
    # The first forward decompresses the weights.
    loaded(torch.arange(3, 9)[None])
    for name, layer in case.layers.items():
        assert torch.equal(loaded.get_submodule(name).weight, dequantize_layer(layer))


def test_a_pickled_checkpoint_gives_the_same_weights(tmp_path: Path) -> None:
    """Tensors of a .bin file are written as those of a safetensors file."""
    model = make_pico_model(tmp_path / "model", hidden=128)
    first = make_case(model, MIXED).write(tmp_path / "first")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    second = make_case(model, MIXED).write(tmp_path / "second")
    assert first.files == second.files


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_is_stored_twice_is_written_once(
    tmp_path: Path, equal: bool, suffix: str
) -> None:
    """An equal copy of the embedding is left out; one that differs is kept, as in transformers."""
    model = make_pico_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if not equal:
        tensors["lm_head.weight"][-1, -1] += 1
    (model / "model.safetensors").unlink()
    if suffix == ".bin":
        torch.save(tensors, model / "pytorch_model.bin")
    else:
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    make_case(model, [("*", "w4a16", 32)]).write(tmp_path / "artifact")
    assert ("lm_head.weight" in stored_tensors(tmp_path / "artifact")) == (not equal)


def test_changed_tensors_replace_those_of_the_checkpoint(tmp_path: Path) -> None:
    """A folded norm and a bias of a solved block are written under their names."""
    case = make_case(make_pico_model(tmp_path / "model", family="qwen2"), [("*", "w4a16", 32)])
    norm, bias = "model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.q_proj.bias"
    dense = {
        norm: torch.full((64,), 0.5, dtype=torch.bfloat16),
        bias: torch.full((64,), 0.25, dtype=torch.bfloat16),
    }
    case.blocks[1] = SolvedBlock(1, case.blocks[1].layers, dense, ())
    case.write(tmp_path / "artifact")
    stored = stored_tensors(tmp_path / "artifact")
    assert torch.equal(stored[norm], dense[norm])
    assert torch.equal(stored[bias], dense[bias])


@pytest.mark.parametrize("fault", ["absent", "other layer", "unknown tensor", "other dtype"])
def test_a_block_that_was_not_solved_as_planned_is_refused(tmp_path: Path, fault: str) -> None:
    """Missing, swapped, unknown and misfit tensors are defects, and nothing is left."""
    case = make_case(make_pico_model(tmp_path / "model"), [("*", "w4a16", 32)])
    layers = case.blocks[1].layers
    dense: dict[str, Tensor] = {}
    if fault == "absent":
        layers = layers[1:]
    elif fault == "other layer":
        layers = case.blocks[0].layers
    elif fault == "unknown tensor":
        dense = {"model.layers.1.extra.weight": torch.zeros(1)}
    else:
        dense = {"model.layers.1.input_layernorm.weight": torch.zeros(64)}
    case.blocks[1] = SolvedBlock(1, layers, dense, ())
    with pytest.raises(ValueError, match=r"block 1|input_layernorm"):
        case.write(tmp_path / "artifact")
    assert list_files(tmp_path / "artifact") == []


def test_one_solved_block_is_alive_at_a_time(tmp_path: Path) -> None:
    """When a block is asked for, the one before it is gone; each is asked for once, in order."""
    case = make_case(make_pico_model(tmp_path / "model", layers=4), [("*", "w4a16", 32)])
    asked: list[int] = []
    alive: list[weakref.ref[SolvedBlock]] = []

    def solved(index: int) -> SolvedBlock:
        assert not [reference for reference in alive if reference() is not None]
        block = case.blocks[index]
        fresh = SolvedBlock(index, block.layers, {}, ())
        asked.append(index)
        alive.append(weakref.ref(fresh))
        return fresh

    write_compressed_tensors(case.checkpoint, case.plan, solved, tmp_path / "artifact", ALL_IN_ONE)
    assert asked == [0, 1, 2, 3]


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    """A NaN in a tensor that is only copied stops the writer, and nothing is left."""
    model = make_pico_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][7, 3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    case = make_case(model, [("*", "w4a16", 32)])
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight"):
        case.write(tmp_path / "artifact")
    assert list_files(tmp_path / "artifact") == []


def test_a_checkpoint_that_shrinks_is_a_checkpoint_error(tmp_path: Path) -> None:
    """A weight file that was cut after it was opened stops the writer, and nothing is left."""
    model = make_pico_model(tmp_path / "model")
    case = make_case(model, [("*", "w4a16", 32)])
    with (model / "model.safetensors").open("r+b") as handle:
        handle.truncate(10_000)
    with pytest.raises(CheckpointError, match="cut short"):
        case.write(tmp_path / "artifact")
    assert list_files(tmp_path / "artifact") == []


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    """Let this process write files of at most so many bytes, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("max_shard_bytes", [ALL_IN_ONE, 50_000])
def test_a_full_disk_leaves_no_weights_and_no_config(
    tmp_path: Path, max_shard_bytes: int, request: pytest.FixtureRequest
) -> None:
    """The file or a later shard that does not fit removes all; the message says what to do."""
    # The head and the embedding, 38 kB each, fit into shards; a packed matrix of 66 kB does not.
    model = make_pico_model(tmp_path / "model", tied=False, intermediate=1024)
    case = make_case(model, [("*", "w8a16", 32)])
    request.getfixturevalue("file_size_limit")
    with pytest.raises(ResourceError, match="no space left while writing"):
        case.write(tmp_path / "artifact", max_shard_bytes)
    assert list_files(tmp_path / "artifact") == []
