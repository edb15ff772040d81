"""`inspect` and `verify` on GGUF files that gguf-py wrote, and on what is wrong with them."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import quantkit
from quantkit.errors import ArtifactError
from quantkit.formats.gguf.architecture import describe_architecture, read_architecture
from quantkit.formats.gguf.container import open_gguf, read_tensor_rows
from quantkit.formats.gguf.finiteness import count_infinite
from quantkit.formats.gguf.header import TYPES_BY_ID, Array, GgufSpec, MetadataValue, Value
from quantkit.formats.gguf.imatrix import Imatrix, ImatrixEntry, write_imatrix
from quantkit.formats.gguf.known_architectures import KNOWN_ARCHITECTURES
from quantkit.formats.gguf.tensors import lay_out_tensors
from quantkit.formats.gguf.writing import write_gguf
from quantkit.formats.inspect import inspect_artifact
from quantkit.formats.verify import Verification, verify_artifact
from quantkit.ggml_types import FILE_TYPES, GGML_TYPES
from tests.cli.running import run_here
from tests.formats.gguf.damage import try_all
from tests.formats.gguf.models import CASES, make_case
from tests.ggml_oracle import library
from tests.helpers import make_pico_model
from tests.judging import gguf_files

Q8_0 = gguf.GGMLQuantizationType.Q8_0
METADATA = dict[str, MetadataValue]
ROWS = dict[str, tuple[GgufSpec, torch.Tensor]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama checkpoint of two blocks."""
    folder = tmp_path_factory.mktemp("model") / "model"
    return make_pico_model(folder, hidden=64, layers=2, tied=False)


@pytest.fixture(scope="module")
def sound(model: Path) -> Path:
    """It as a GGUF file, written by gguf-py."""
    return gguf_files.write_gguf(model, model.parent / "sound-Q8_0.gguf", kind=Q8_0)


def rewrite(sound: Path, path: Path, change: Callable[[METADATA, ROWS], None]) -> Path:
    """Write the file again after a change of its metadata or tensors."""
    found = open_gguf(sound)
    metadata = dict(found.metadata)
    rows = {
        name: (GgufSpec(name, tensor.kind, tensor.shape), read_tensor_rows(found, name))
        for name, tensor in found.tensors.items()
    }
    change(metadata, rows)
    specs = [spec for spec, _ in rows.values()]
    contents = ((spec.name, data) for spec, data in rows.values())
    write_gguf(path.parent, path.stem, metadata, specs, contents, 1 << 40)
    return path


def test_a_file_is_inspected(model: Path, sound: Path) -> None:
    """Types, sizes and what people ask, the same as transformers' and gguf-py's numbers."""
    original = inspect_artifact(model)

    found = quantkit.inspect(sound)

    assert (found.format, found.scheme, found.architecture) == ("gguf", "Q8_0", "llama")
    assert (found.folder, found.file) == (sound.parent, sound)
    assert found.parameters == original.parameters
    tensors = gguf.GGUFReader(sound).tensors
    assert found.tensor_bytes == sum(tensor.n_bytes for tensor in tensors)
    assert found.bits_per_weight == 8 * found.tensor_bytes / found.parameters
    assert found.tensors == {"F32": 5, "Q8_0": 16}
    assert {(row.scheme, row.group_size, row.bits) for row in found.layers} == {("Q8_0", 32, 8)}
    assert len(found.layers) == 16
    assert found.details["context length"] == "512"
    assert found.details["tokenizer"] == "gpt2, pre-tokenizer llama-bpe, 300 tokens"
    assert found.details["chat template"] == "yes"
    assert found.details["importance matrix"] == "none recorded"
    assert found.details["bytes"].startswith("Q8_0 ")
    assert found.verdict is None


def test_importance_and_hostile_words_are_printed_safely(sound: Path, tmp_path: Path) -> None:
    """The record of llama-quantize; a name cannot move the cursor."""

    def change(metadata: METADATA, _: ROWS) -> None:
        metadata["general.name"] = Value("string", "a\x1b[2Jb\udcff" + "c" * 999)
        metadata["quantize.imatrix.dataset"] = Value("string", "wiki.txt")
        metadata["quantize.imatrix.chunks_count"] = Value("int32", 7)
        metadata["general.file_type"] = Value("uint32", 9999)
        del metadata["tokenizer.chat_template"]

    found = inspect_artifact(rewrite(sound, tmp_path / "x.gguf", change))

    assert found.details["name"].startswith("a?[2Jb?ccc")
    assert len(found.details["name"]) == 200
    assert found.details["importance matrix"] == "dataset wiki.txt, chunks_count 7"
    assert found.details["chat template"] == "none"
    assert found.scheme == "Q8_0"


def test_folders_with_one_file_or_its_parts_are_read(model: Path, tmp_path: Path) -> None:
    """With two files, one has to be named; a model beside comes first."""
    first = gguf_files.write_gguf(model, tmp_path / "m.gguf", kind=Q8_0, part_bytes=20000)
    assert first.name.startswith("m-00001-of-")

    found = quantkit.inspect(tmp_path)

    assert found.file == first
    assert found.details["file"] == f"{len(list(tmp_path.iterdir()))} parts"
    assert len(found.layers) == 16
    assert quantkit.verify(tmp_path).problems == ()
    other = gguf_files.write_gguf(model, tmp_path / "other.gguf", kind=Q8_0)
    with pytest.raises(ArtifactError, match="2 GGUF files: name one of m-00001-of-"):
        quantkit.inspect(tmp_path)
    assert quantkit.inspect(other).file == other


def test_damaged_and_absent_files_are_artifact_errors(tmp_path: Path) -> None:
    """One line each."""
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "x.gguf"):
        with pytest.raises(ArtifactError, match="the version takes 4 bytes"):
            quantkit.inspect(path)
    with pytest.raises(ArtifactError, match="there is no artifact"):
        quantkit.inspect(tmp_path / "y.gguf")


def test_an_output_is_found_with_its_verdict_and_hashes(sound: Path, tmp_path: Path) -> None:
    """quantkit.json beside the folder `gguf`."""
    folder = tmp_path / "gguf"
    folder.mkdir()
    file = folder / sound.name
    file.write_bytes(sound.read_bytes())
    row = {"path": "gguf", "files": {file.name: "0" * 64}}
    document = {"verdict": "PASS", "artifacts": [row]}
    (tmp_path / "quantkit.json").write_text(json.dumps(document))

    for path in (tmp_path, folder, file):
        assert quantkit.inspect(path).verdict == "PASS"
        (problem,) = quantkit.verify(path).problems
        assert file.name in problem


def test_sound_files_have_no_problem_and_llama_cpp_serves_them(sound: Path) -> None:
    """The same through the command line."""
    found = quantkit.verify(sound)

    assert (found.problems, found.notes) == ((), ())
    assert (found.tensors, found.layers, found.file) == (21, 16, sound)
    (support,) = found.runtimes
    assert (support.runtime, support.serves) == ("llama.cpp", "yes")
    assert {answer.what for answer in support.answers} == {"architecture llama", "F32", "Q8_0"}
    done = run_here("verify", sound)
    assert done.returncode == 0
    assert "no problem found" in done.stdout
    document = json.loads(run_here("inspect", sound, "--json").stdout)
    assert document["file"] == str(sound)
    assert document["details"]["blocks"] == "2"
    assert "context length" in run_here("inspect", sound).stdout


def test_files_are_compared_with_their_checkpoint(model: Path, sound: Path, tmp_path: Path) -> None:
    """Each layer's error is that of gguf-py's values; all else is equal."""
    found = verify_artifact(sound, against=str(model))

    assert found.problems == ()
    assert found.comparison is not None
    assert (found.comparison.equal, found.comparison.changed) == (5, ())
    errors = {layer.name: layer.relative_error for layer in found.comparison.layers}
    weights = load_file(model / "model.safetensors")
    assert len(errors) == 16
    for name, stem in (("model.layers.1.mlp.down_proj", "blk.1.ffn_down"), ("lm_head", "output")):
        (stored,) = (t for t in gguf.GGUFReader(sound).tensors if t.name == f"{stem}.weight")
        values = torch.tensor(gguf.quants.dequantize(stored.data, Q8_0))
        weight = weights[f"{name}.weight"].float()
        expected = float((values - weight).norm() / weight.norm())
        assert errors[name] == pytest.approx(expected, rel=1e-4)
    assert 0 < errors["model.layers.0.self_attn.q_proj"] < 0.01

    other = make_pico_model(tmp_path / "other", hidden=64, layers=2, tied=False, seed=5)
    against_other = verify_artifact(sound, against=str(other))
    assert "which no rounding to 8 bits does" in against_other.problems[0]
    smaller = make_pico_model(tmp_path / "smaller", hidden=32, layers=2, tied=False)
    with pytest.raises(ArtifactError, match="was not made from"):
        verify_artifact(sound, against=str(smaller))


def set_value(key: str, value: MetadataValue | None) -> Callable[[METADATA, ROWS], None]:
    """A change of one metadata value; None takes it away."""

    def change(metadata: METADATA, _: ROWS) -> None:
        if value is None:
            del metadata[key]
        else:
            metadata[key] = value

    return change


def drop(*names: str) -> Callable[[METADATA, ROWS], None]:
    """A file without some tensors."""

    def change(_: METADATA, rows: ROWS) -> None:
        for name in names:
            del rows[name]

    return change


def put(name: str, data: torch.Tensor) -> Callable[[METADATA, ROWS], None]:
    """A float32 tensor more, or in the place of another."""

    def change(_: METADATA, rows: ROWS) -> None:
        spec = GgufSpec(name, GGML_TYPES["F32"], tuple(data.shape))
        rows[name] = (spec, data.reshape(spec.rows, -1).view(torch.uint8))

    return change


def spoil_scale(_: METADATA, rows: ROWS) -> None:
    data = rows["blk.1.attn_q.weight"][1]
    data[0, :2] = torch.tensor([torch.inf], dtype=torch.float16).view(torch.uint8)
    data[3, 34:36] = torch.tensor([torch.nan], dtype=torch.float16).view(torch.uint8)


def repeat_token(metadata: METADATA, _: ROWS) -> None:
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, Array)
    words = list(map(str, tokens.items))
    metadata["tokenizer.ggml.tokens"] = Array("string", [*words[:-1], words[5]])


T = "tokenizer.ggml."
FAULTS: dict[str, tuple[Callable[[METADATA, ROWS], None], str]] = {
    "no architecture": (set_value("general.architecture", None), "no architecture None"),
    "architecture": (
        set_value("general.architecture", Value("string", "lama")),
        "no architecture 'lama'; did you mean 'llama'?",
    ),
    "block count": (set_value("llama.block_count", None), "llama.block_count is missing"),
    "more blocks": (set_value("llama.block_count", Value("uint32", 3)), "blocks 2 have no tensor"),
    "fewer blocks": (
        set_value("llama.block_count", Value("uint32", 1)),
        "blocks 1 have tensors, but there are 1 blocks",
    ),
    "many blocks": (
        set_value("llama.block_count", Value("uint32", 2**32 - 1)),
        "4294967295 blocks are claimed",
    ),
    "missing": (
        drop("output_norm.weight", "blk.1.ffn_up.weight"),
        "2 tensors are missing: output_norm.weight, blk.1.ffn_up.weight",
    ),
    "embedding": (
        put("token_embd.weight", torch.zeros(299, 64)),
        "token_embd.weight has the shape [299, 64], the metadata say [300, 64]",
    ),
    "queries": (
        put("blk.0.attn_q.weight", torch.zeros(32, 64)),
        "blk.0.attn_q.weight has the shape [32, 64], the metadata say [64, 64]",
    ),
    "stranger": (
        put("blk.0.odd.weight", torch.zeros(8)),
        "1 tensors do not belong to the architecture",
    ),
    "context": (set_value("llama.context_length", None), "llama.context_length is missing"),
    "scales": (
        spoil_scale,
        "blk.1.attn_q.weight has 2 scales or minimums of blocks that are not finite",
    ),
    "values": (
        put("blk.0.attn_norm.weight", torch.full((64,), torch.nan)),
        "blk.0.attn_norm.weight has 64 values that are not finite",
    ),
    "no tokenizer": (set_value(f"{T}model", None), "there is no tokenizer"),
    "tokenizer": (set_value(f"{T}model", Value("string", "gpt3")), "tokenizer 'gpt3'; did you"),
    "no tokens": (set_value(f"{T}tokens", None), "the tokenizer has no tokens"),
    "token types": (
        set_value(f"{T}token_type", Array("int32", [1, 1])),
        "tokenizer.ggml.token_type has 2 items for 300 tokens",
    ),
    "scores": (set_value(f"{T}scores", Value("float32", 1.0)), "scores is no array"),
    "special id": (
        set_value(f"{T}eos_token_id", Value("uint32", 300)),
        "tokenizer.ggml.eos_token_id is 300, the tokens are 0 to 299",
    ),
    "id kind": (
        set_value(f"{T}bos_token_id", Value("int32", 1)),
        "tokenizer.ggml.bos_token_id is no uint32",
    ),
    "repeated token": (repeat_token, "1 tokens are in the vocabulary more than once"),
    "no pre-tokenizer": (set_value(f"{T}pre", None), "no pre-tokenizer is named"),
    "pre-tokenizer": (
        set_value(f"{T}pre", Value("string", "lama-bpe")),
        "no pre-tokenizer 'lama-bpe'; did you mean 'llama-bpe'?",
    ),
    "merges": (set_value(f"{T}merges", None), "has no merges"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_a_line(sound: Path, tmp_path: Path, fault: str) -> None:
    """What llama.cpp refuses or would compute wrongly."""
    change, words = FAULTS[fault]

    found = verify_artifact(rewrite(sound, tmp_path / "x.gguf", change))

    assert [problem for problem in found.problems if words in problem], found.problems
    assert not [problem for problem in found.problems if "\n" in problem]


def become_olmo(metadata: METADATA, _: ROWS) -> None:
    for key in [key for key in metadata if key.startswith("llama.")]:
        metadata[key.replace("llama.", "olmo2.", 1)] = metadata.pop(key)
    metadata["general.architecture"] = Value("string", "olmo2")


NOTES: dict[str, tuple[Callable[[METADATA, ROWS], None], str]] = {
    "template": (set_value("tokenizer.chat_template", None), "there is no chat template"),
    "end": (set_value(f"{T}eos_token_id", None), "no end token is named"),
    "merges": (set_value(f"{T}merges", Array("string", ["q zq", "e"])), "2 merges make no token"),
    "experts": (
        set_value("llama.expert_count", Value("uint32", 8)),
        "those of llama with experts are not known here",
    ),
    "other architecture": (
        become_olmo,
        "those of olmo2 are not known here",
    ),
}


@pytest.mark.parametrize("case", NOTES)
def test_what_is_no_fault_is_noted(sound: Path, tmp_path: Path, case: str) -> None:
    """Said, and no problem for its own sake."""
    change, words = NOTES[case]

    found: Verification = verify_artifact(rewrite(sound, tmp_path / "x.gguf", change))

    assert [note for note in found.notes if words in note], found.notes
    assert found.problems == ()


@pytest.mark.parametrize(
    "name", ["llama3", "llama-biases", "qwen2", "qwen3", "gemma2", "gemma3", "phi3-long"]
)
def test_files_of_every_family_are_complete(name: str, tmp_path: Path) -> None:
    """Names and shapes are those that we give; without a block's tensor the file is not."""
    checkpoint = make_case(tmp_path / "model", CASES[name])
    architecture = read_architecture(checkpoint)
    metadata = describe_architecture(architecture, 1, "pico", FILE_TYPES["F32"])
    metadata["tokenizer.ggml.model"] = Value("string", "none")
    tensors = lay_out_tensors(checkpoint, architecture)
    specs = [GgufSpec(each.name, GGML_TYPES["F32"], each.shape) for each in tensors]
    for kept, problems in ((specs, 0), (specs[:-3] + specs[-2:], 1)):
        contents = ((spec.name, [bytes(spec.size)]) for spec in kept)
        write_gguf(tmp_path, "x", metadata, kept, contents, 1 << 40)
        found = verify_artifact(tmp_path / "x.gguf").problems
        assert len(found) == problems, found


def test_importance_matrices_are_no_models(tmp_path: Path) -> None:
    """They can be looked into; a number that is not finite is still found."""
    entry = ImatrixEntry(torch.tensor([[1.0, torch.nan]]), torch.tensor([1]))
    write_imatrix(tmp_path / "i.gguf", Imatrix({"a": entry}))

    assert quantkit.inspect(tmp_path / "i.gguf").details["kind of file"] == "imatrix"
    found = quantkit.verify(tmp_path / "i.gguf")
    assert found.problems == ("tensor a.in_sum2 has 1 values that are not finite numbers",)
    assert "it is no model" in found.notes[0]


# ggml narrows F64 before it looks, and has no check of the types that only inputs take.
@pytest.mark.parametrize(
    "name", sorted({kind.name for kind in TYPES_BY_ID.values()} - {"F64", "Q8_1", "Q8_K"})
)
def test_blocks_are_finite_where_ggml_says_so(name: str) -> None:
    """Random bytes with and without a NaN or infinity, one block at a time."""
    (kind,) = (kind for kind in TYPES_BY_ID.values() if kind.name == name)
    validate = library().ggml_validate_row_data
    validate.restype = ctypes.c_bool
    validate.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    generator = torch.Generator().manual_seed(kind.id)
    blocks = torch.randint(
        0, 256, (400, kind.block_bytes), generator=generator, dtype=torch.uint8
    ).numpy()
    blocks[3, 0] = 255
    blocks[::2] |= (np.arange(kind.block_bytes) % 4 // 3 * 0x7C).astype(np.uint8)
    blocks[1::4] |= (np.arange(kind.block_bytes) % 2 * 0x7C).astype(np.uint8)
    for block in blocks:
        data = np.ascontiguousarray(block)
        expected = bool(validate(kind.id, data.ctypes.data, data.size))
        ours = count_infinite(kind, torch.from_numpy(data)[None]) == 0
        assert ours == expected


def test_every_architecture_of_gguf_py_is_known() -> None:
    """Other than the parts of models that have no text of their own."""
    names = set(gguf.MODEL_ARCH_NAMES.values())
    assert names - KNOWN_ARCHITECTURES <= {"clip"}


def test_random_damage_never_escapes_as_another_error(sound: Path, tmp_path: Path) -> None:
    """Problems are lines, whatever the metadata say; errors are ours."""
    raw = sound.read_bytes()
    start = min(tensor.start for tensor in open_gguf(sound).tensors.values())

    def read(path: Path) -> None:
        found = verify_artifact(path)
        inspect_artifact(path)
        assert not [line for line in (*found.problems, *found.notes) if "\n" in line]

    try_all(tmp_path / "x.gguf", raw, start, read, 300)
