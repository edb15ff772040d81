"""Conversions to and from GGUF: the oracle's bytes, gguf-py's values, transformers' own loader."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit import gguf_conversion
from quantkit.conversion import convert
from quantkit.errors import (
    ArtifactError,
    CalibrationError,
    CheckpointError,
    InputError,
    NotYetError,
)
from quantkit.formats.gguf.container import open_gguf, read_tensor_rows
from quantkit.formats.gguf.header import Array, GgufSpec, Value
from quantkit.formats.gguf.imatrix import Imatrix, ImatrixEntry, write_imatrix
from quantkit.formats.gguf.tensors import order_rows
from quantkit.formats.gguf.writing import write_gguf
from quantkit.ggml_types import GGML_TYPES
from quantkit.recipe import ExportSpec
from tests.formats.readers.packers import make_awq
from tests.ggml_oracle import encode_with_ggml
from tests.helpers import make_pico_model

UP, QUERIES, DOWN = "blk.1.ffn_up.weight", "blk.0.attn_q.weight", "blk.1.ffn_down.weight"
SOURCES = {
    UP: "model.layers.1.mlp.up_proj.weight",
    QUERIES: "model.layers.0.self_attn.q_proj.weight",
    DOWN: "model.layers.1.mlp.down_proj.weight",
}
COLUMNS = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows are whole super-blocks."""
    folder = tmp_path_factory.mktemp("gguf-conversion") / "model"
    return make_pico_model(folder, hidden=COLUMNS, intermediate=COLUMNS, vocab=270)


@pytest.fixture(scope="module")
def eight(model: Path) -> Path:
    """It as a file of Q8_0."""
    return made(model, model.parent / "eight", "gguf:Q8_0")


def made(source: Path, output: Path, to: str, **options: Any) -> Path:
    """Convert; return the GGUF file."""
    path: Path = convert(source, to=to, output=output, **options).artifact.path
    return path


def rows_of(path: Path) -> dict[str, Tensor]:
    file = open_gguf(path)
    return {name: read_tensor_rows(file, name) for name in file.tensors}


def original(model: Path, name: str) -> Tensor:
    """The float32 weight as the file has it."""
    weight = load_file(model / "model.safetensors")[SOURCES[name]].float()
    return weight[torch.from_numpy(order_rows(len(weight), 4))] if name == QUERIES else weight


def make_imatrix(model: Path, blocks: int = 2, columns: int = COLUMNS, experts: int = 1) -> Imatrix:
    """Importance that differs from column to column, over one chunk."""
    stems = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = [f"blk.{block}.{stem}.weight" for block in range(blocks) for stem in stems]
    generator = torch.Generator().manual_seed(3)
    return Imatrix(
        {
            name: ImatrixEntry(
                torch.rand(experts, columns, generator=generator) ** 4 * 512,
                torch.full((experts,), 512),
            )
            for name in names
        },
        ("text.txt",),
        chunks=1,
    )


# --- a checkpoint -> GGUF


@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q5_0"])
def test_codes_are_those_of_ggml(model: Path, tmp_path: Path, file_type: str) -> None:
    """Also of queries, whose rows llama.cpp wants in another order."""
    path = made(model, tmp_path / "out", f"gguf:{file_type}")

    file, rows = open_gguf(path), rows_of(path)
    assert path.name == f"model-{file_type}.gguf"
    for name in SOURCES:
        kind = file.tensors[name].kind
        assert torch.equal(rows[name], encode_with_ggml(kind, original(model, name), None)), name


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_an_importance_matrix_weighs_errors_as_ggml_does(
    model: Path, tmp_path: Path, form: Any
) -> None:
    """In both forms of the file; the file names it, and so does the evidence."""
    matrix = make_imatrix(model)
    write_imatrix(tmp_path / f"matrix.{form}", matrix, form)

    found = convert(
        model, to="gguf:q4_k_s", output=tmp_path / "out", imatrix=tmp_path / f"matrix.{form}"
    )

    rows = rows_of(found.artifact.path)
    file = open_gguf(found.artifact.path)
    for name in SOURCES:
        importance = matrix.entries[name].sums[0] / 512
        expected = encode_with_ggml(file.tensors[name].kind, original(model, name), importance)
        assert torch.equal(rows[name], expected), name
    plain = encode_with_ggml(file.tensors[UP].kind, original(model, UP), None)
    assert not torch.equal(rows[UP], plain)
    assert file.find("quantize.imatrix.file") == f"matrix.{form}"
    document = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert document["conversion"]["imatrix"] == str(tmp_path / f"matrix.{form}")
    assert document["conversion"]["to"] == "gguf:q4_k_s"
    assert "has no entry for token_embd.weight: rounded without" in found.notes[-1]


def test_a_mix_that_needs_importance_is_refused_without(model: Path, tmp_path: Path) -> None:
    """As llama-quantize refuses it; with an importance matrix it is made."""
    with pytest.raises(InputError, match=r"Q2_K_S .*: choose Q2_K, or calibrate .* --imatrix"):
        convert(model, to="gguf:Q2_K_S", output=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    write_imatrix(tmp_path / "m.gguf", make_imatrix(model))
    path = made(model, tmp_path / "out", "gguf:Q2_K_S", imatrix=tmp_path / "m.gguf")
    assert open_gguf(path).tensors[UP].kind.name == "Q2_K"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"blocks": 3}, r"blk\.2\.attn_k\.weight, which the model does not have \(and 6 more\)"),
        ({"experts": 3}, r"has 3 matrices for blk\.0\.attn_q\.weight, which is one"),
        ({"columns": 128}, r"128\] values for blk\.0\.attn_q\.weight, which has 256 columns"),
    ],
)
def test_an_importance_matrix_of_another_model_is_refused(
    model: Path, eight: Path, tmp_path: Path, options: dict[str, int], says: str
) -> None:
    """Before anything is written, from a checkpoint and from a file."""
    write_imatrix(tmp_path / "m.gguf", make_imatrix(model, **options))
    for source, more in ((model, {}), (eight, {"requantize": True})):
        with pytest.raises(CalibrationError, match=says):
            convert(
                source,
                to="gguf:Q4_0",
                output=tmp_path / "out",
                imatrix=tmp_path / "m.gguf",
                **more,
            )
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_model_is_no_importance_matrix(model: Path, eight: Path, tmp_path: Path) -> None:
    """Nor are bytes of any kind."""
    with pytest.raises(CalibrationError, match="is a GGUF file, but no importance matrix"):
        convert(model, to="gguf:Q4_0", output=tmp_path / "out", imatrix=eight)
    (tmp_path / "m.dat").write_bytes(b"words that are no numbers")
    with pytest.raises(CalibrationError, match="is no importance matrix"):
        convert(model, to="gguf:Q4_0", output=tmp_path / "out", imatrix=tmp_path / "m.dat")


def test_a_quantized_checkpoint_is_made_plain_first(tmp_path: Path) -> None:
    """One line says how."""
    plain = make_pico_model(tmp_path / "model", layers=1, dtype="float16", tokenizer=False)
    make_awq(plain, tmp_path / "awq")
    with pytest.raises(InputError, match=r"is quantized, and .*quantkit convert .* safetensors"):
        convert(tmp_path / "awq", to="gguf:Q4_0", output=tmp_path / "out")


# --- GGUF -> a checkpoint


def test_a_file_becomes_the_checkpoint_that_transformers_makes_of_it(
    model: Path, tmp_path: Path
) -> None:
    """transformers' own loader of GGUF files reads the same weights from the same file."""
    path = made(model, tmp_path / "file", "gguf:Q5_1")

    found = convert(path, to="safetensors", output=tmp_path / "out", base=model, dtype="float32")

    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert (found.source_format, found.notes, found.artifact.name) == ("gguf, Q5_1", (), "out")
    document = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert document["conversion"] == {
        "from": "gguf, Q5_1",
        "to": "safetensors",
        "base": str(model),
        "notes": [],
    }
    assert list(document["model"]["files"]) == [path.name]


def test_weights_get_the_dtype_of_the_original(model: Path, eight: Path, tmp_path: Path) -> None:
    """With a note that this rounds them; the folder of the file stands for it."""
    found = convert(eight.parent, to="safetensors", output=tmp_path / "out", base=model)

    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    (note,) = found.notes
    assert "rounded to bfloat16" in note
    assert "--dtype float32 is exact" in note


def test_without_the_original_there_is_no_checkpoint(
    model: Path, eight: Path, tmp_path: Path
) -> None:
    """For the file, and for its folder; another original is refused by what contradicts it."""
    for source in (eight, eight.parent):
        with pytest.raises(InputError, match="config and tokenizer come from the original"):
            convert(source, to="safetensors", output=tmp_path / "out")
    other = make_pico_model(tmp_path / "other", hidden=COLUMNS, intermediate=128, vocab=270)
    with pytest.raises(ArtifactError, match="was not made from"):
        convert(eight, to="safetensors", output=tmp_path / "out", base=other)
    assert not (tmp_path / "out").exists()


# --- GGUF -> GGUF


def test_a_quantized_file_is_rounded_again_only_where_that_is_asked_for(
    eight: Path, tmp_path: Path
) -> None:
    """Codes are those of ggml for what the first codes stand for; all else stays."""
    with pytest.raises(InputError, match=r"is Q8_0: .* start from the original, or say --req"):
        convert(eight, to="gguf:Q4_K_M", output=tmp_path / "out")

    found = convert(eight, to="gguf:Q4_K_M", output=tmp_path / "out", requantize=True)

    path = found.artifact.path
    assert path.name == "model-Q4_K_M.gguf"
    assert found.source_format == "gguf, Q8_0"
    assert any("rounded twice" in note for note in found.notes)
    before, after = gguf.GGUFReader(eight), gguf.GGUFReader(path)
    assert [each.name for each in after.tensors] == [each.name for each in before.tensors]
    assert open_gguf(path).tensors[UP].kind.name == "Q4_K"
    assert open_gguf(path).tensors[DOWN].kind.name == "Q6_K"
    for old, new in zip(before.tensors, after.tensors, strict=True):
        if new.tensor_type == old.tensor_type:
            assert np.array_equal(new.data, old.data), new.name
            continue
        values = torch.from_numpy(gguf.quants.dequantize(old.data, old.tensor_type))
        kind = GGML_TYPES[new.tensor_type.name]
        expected = encode_with_ggml(kind, values.reshape(-1, COLUMNS), None)
        assert np.array_equal(new.data.reshape(-1), expected.numpy().reshape(-1)), new.name
    assert {each.name for each in before.tensors if each.tensor_type.name == "F32"} == {
        each.name for each in after.tensors if each.tensor_type.name == "F32"
    }
    changed = {"general.file_type"}
    old_metadata, new_metadata = open_gguf(eight).metadata, open_gguf(path).metadata
    assert list(new_metadata) == list(old_metadata)
    assert {key for key in old_metadata if old_metadata[key] != new_metadata[key]} == changed
    assert open_gguf(path).find("general.file_type") == 15


def test_tensors_that_have_their_type_already_are_copied(model: Path, tmp_path: Path) -> None:
    """Codes that were encoded again from what they stand for would not be the same."""
    first = made(model, tmp_path / "first", "gguf:Q4_K_M")
    second = made(first, tmp_path / "second", "gguf:Q5_K_M", requantize=True)

    old, new = open_gguf(first).tensors, open_gguf(second).tensors
    same = [name for name in old if old[name].kind == new[name].kind]
    assert {"Q6_K", "F32"} == {old[name].kind.name for name in same}
    one, two = rows_of(first), rows_of(second)
    assert all(torch.equal(one[name], two[name]) for name in same)


def test_a_file_of_plain_weights_is_as_good_as_the_checkpoint(model: Path, tmp_path: Path) -> None:
    """BF16 holds this model exactly, so its file is rounded once, without being told to."""
    plain = made(model, tmp_path / "plain", "gguf:BF16")
    write_imatrix(tmp_path / "m.gguf", make_imatrix(model))
    options = {"to": "gguf:Q4_0", "imatrix": tmp_path / "m.gguf"}

    found = convert(plain, output=tmp_path / "one", **options)  # type: ignore[arg-type]
    direct = convert(model, output=tmp_path / "two", **options)  # type: ignore[arg-type]

    assert set(found.notes) < set(direct.notes)
    assert found.artifact.bits_per_weight == pytest.approx(direct.artifact.bits_per_weight)
    one, two = found.artifact.path, direct.artifact.path
    assert one.read_bytes() == two.read_bytes()


def test_a_split_file_and_another_alignment_come_out_as_one(
    eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What described the old parts is left out; old importance matrices are no longer true."""
    file = open_gguf(eight)
    specs = [GgufSpec(name, each.kind, each.shape) for name, each in file.tensors.items()]
    metadata = {
        **file.metadata,
        "general.alignment": Value("uint32", 32),
        "quantize.imatrix.file": Value("string", "old.gguf"),
    }
    names = write_gguf(tmp_path, "x-Q8_0", metadata, specs, rows_of(eight).items(), 100_000)
    assert len(names) > 2

    found = convert(
        tmp_path / sorted(names)[0], to="gguf:Q5_0", output=tmp_path / "out", requantize=True
    )

    assert found.artifact.path.name == "x-Q5_0.gguf"
    whole = made(eight, tmp_path / "whole", "gguf:Q5_0", requantize=True)
    assert found.artifact.path.read_bytes() == whole.read_bytes()
    document = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert sorted(document["model"]["files"]) == sorted(names)
    limit = ExportSpec.model_construct(max_shard_bytes=100_000)
    monkeypatch.setattr(gguf_conversion, "ExportSpec", lambda: limit)
    made(eight, tmp_path / "parts", "gguf:Q5_0", requantize=True)
    parts = sorted((tmp_path / "parts").glob("*.gguf"))
    assert len(parts) > 1
    again = rows_of(parts[0])
    assert all(torch.equal(rows, again[name]) for name, rows in rows_of(whole).items())


def rewrite(eight: Path, path: Path, change: Any) -> Path:
    """Write the file with other metadata and tensors."""
    file, rows = open_gguf(eight), rows_of(eight)
    tensors = {
        name: (GgufSpec(name, each.kind, each.shape), rows[name])
        for name, each in file.tensors.items()
    }
    metadata = dict(file.metadata)
    change(metadata, tensors)
    specs = [spec for spec, _ in tensors.values()]
    contents = ((spec.name, data) for spec, data in tensors.values())
    write_gguf(path.parent, path.stem, metadata, specs, contents, 1 << 40)
    return path


def rename(metadata: Any, tensors: Any) -> None:
    metadata["general.architecture"] = Value("string", "mamba")


def remove_number(metadata: Any, tensors: Any) -> None:
    metadata["llama.attention.head_count"] = Array("int32", [4, 4])


def remove_tensor(metadata: Any, tensors: Any) -> None:
    del tensors[UP]


def add_tensor(metadata: Any, tensors: Any) -> None:
    spec, data = tensors[UP]
    name = "blk.1.ffn_gate_inp.weight"
    tensors[name] = (GgufSpec(name, spec.kind, spec.shape), data)


def spoil(metadata: Any, tensors: Any) -> None:
    spec, data = tensors[UP]
    damaged = data.clone()
    # The scale of the first block becomes a NaN.
    damaged[0, :2] = torch.tensor([0xFF, 0x7F], dtype=torch.uint8)
    tensors[UP] = (spec, damaged)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (rename, "architecture 'mamba', which is not built: start from the original"),
        (remove_number, "does not say one positive number for each of llama.block_count"),
        (remove_tensor, "lacks tensors of llama: `quantkit verify` tells which"),
        (add_tensor, "without a place in llama, for instance blk.1.ffn_gate_inp.weight"),
        (spoil, "tensor blk.1.ffn_up.weight has values that are not finite"),
    ],
)
def test_files_that_the_mixes_do_not_know_are_refused(
    eight: Path, tmp_path: Path, change: Any, says: str
) -> None:
    """One line each, and nothing beside."""
    path = rewrite(eight, tmp_path / "x.gguf", change)
    with pytest.raises(ArtifactError, match=re.escape(says)):
        convert(path, to="gguf:Q4_0", output=tmp_path / "out", requantize=True)
    assert [each.name for each in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize(
    ("start", "end", "says"),
    [(0, -100, "is cut short"), (0, 100, "is damaged at byte"), (4, None, "is not a GGUF file")],
)
def test_damaged_files_are_refused(
    model: Path, eight: Path, tmp_path: Path, start: int, end: int | None, says: str
) -> None:
    """Cut short or of another format, to either side."""
    path = tmp_path / "x.gguf"
    path.write_bytes(eight.read_bytes()[start:end])
    for options in ({"to": "gguf:Q4_0"}, {"to": "safetensors", "base": model}):
        with pytest.raises(CheckpointError, match=says):
            convert(path, output=tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("gguf_source", "options", "says"),
    [
        (False, {"to": "gguf:Q4_0", "requantize": True}, "--requantize goes with GGUF files"),
        (False, {"to": "safetensors", "base": "model"}, "--base goes with GGUF files"),
        (True, {"to": "gguf:Q4_0", "base": "model"}, "--base goes with --to safetensors"),
        (True, {"to": "gguf:Q4_0", "pre_tokenizer": "gpt-2"}, "--pre-tokenizer goes with checkp"),
        (True, {"to": "safetensors", "requantize": True}, "--requantize goes with --to gguf"),
        (False, {"to": "safetensors", "pre_tokenizer": "gpt-2"}, "--pre-tokenizer goes with --to"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    model: Path, eight: Path, tmp_path: Path, gguf_source: bool, options: Any, says: str
) -> None:
    """Nothing is taken in silence."""
    if "base" in options:
        options = {**options, "base": model}
    with pytest.raises(InputError, match=re.escape(says)):
        convert(eight if gguf_source else model, output=tmp_path / "out", **options)


def test_blocks_do_not_become_other_codes(eight: Path, tmp_path: Path) -> None:
    """What is built is named."""
    with pytest.raises(NotYetError, match=r"not yet built \(built: safetensors, gguf:TYPE\)"):
        convert(eight, to="compressed-tensors", output=tmp_path / "out")
