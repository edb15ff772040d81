"""GGUF files back into checkpoints: against the originals, gguf-py and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.errors import ArtifactError
from quantkit.formats.gguf.architecture import describe_architecture, read_architecture
from quantkit.formats.gguf.container import open_gguf
from quantkit.formats.gguf.dequantizing import plan_dequantizing, write_dequantized
from quantkit.formats.gguf.header import TYPES_BY_ID, GgufSpec
from quantkit.formats.gguf.tensors import lay_out_tensors, make_values
from quantkit.formats.gguf.writing import write_gguf
from quantkit.ggml_types import FILE_TYPES, GGML_TYPES
from quantkit.numerics.ggml.codec import encode_rows
from quantkit.running import silent
from tests.formats.gguf.models import CASES, make_case, reopen
from tests.helpers import make_pico_model
from tests.judging import gguf_files

ALL_IN_ONE = 1 << 40
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def write_file(checkpoint: Checkpoint, folder: Path, limit: int = ALL_IN_ONE) -> Path:
    """Write a checkpoint as float32 into GGUF; return the first file."""
    architecture = read_architecture(checkpoint)
    metadata = describe_architecture(architecture, 1, "pico", FILE_TYPES["F32"])
    kind = GGML_TYPES["F32"]
    tensors = lay_out_tensors(checkpoint, architecture)
    contents = []
    for each in tensors:
        weight = None if each.source is None else read_tensor(checkpoint, each.source)
        values = make_values(each, weight).reshape(-1, each.shape[-1])
        contents.append((each.name, encode_rows(kind, values, None)))
    specs = [GgufSpec(each.name, kind, each.shape) for each in tensors]
    return folder / sorted(write_gguf(folder, "x", metadata, specs, contents, limit))[0]


def dequantize(
    file: Path, base: Checkpoint, folder: Path, dtype: str = "float32"
) -> dict[str, Tensor]:
    """Write the checkpoint and load its tensors."""
    write_dequantized(plan_dequantizing(open_gguf(file), base, dtype), folder, ALL_IN_ONE, silent)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_every_family_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    """Names, order of rows, norms and biases; from split files too."""
    base = make_case(tmp_path / "model", CASES[name])

    found = dequantize(write_file(base, tmp_path, limit=20000), base, tmp_path / "out")

    assert found.keys() <= base.tensors.keys()
    assert base.tensors.keys() - found.keys() <= {"lm_head.weight"}
    for source, tensor in found.items():
        expected = read_tensor(base, source).float()
        assert tensor.dtype == torch.float32
        # Gemma's norms lose what adding one to a float32 takes.
        torch.testing.assert_close(tensor, expected, rtol=0, atol=2**-23 if "norm" in source else 0)


def test_codes_become_what_gguf_py_and_transformers_make_of_them(tmp_path: Path) -> None:
    """transformers' own reader of GGUF turns the rows of queries and keys back as well."""
    folder = make_pico_model(tmp_path / "model", hidden=64, layers=2, tied=False)
    file = gguf_files.write_gguf(folder, tmp_path / "x.gguf", kind=Q8_0)

    found = dequantize(file, reopen(folder), tmp_path / "out")

    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32
    ).state_dict()
    assert found.keys() == theirs.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, theirs[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], theirs[name]) for name in theirs)
    original = {path.name: path.read_bytes() for path in folder.glob("tokenizer*")}
    assert original
    assert all((tmp_path / "out" / name).read_bytes() == raw for name, raw in original.items())


def test_weights_get_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    """With the config; what float16 cannot hold is refused."""
    base = make_case(tmp_path / "model", CASES["qwen3"])
    file = write_file(base, tmp_path)

    found = dequantize(file, base, tmp_path / "out", "bfloat16")

    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    raw = file.read_bytes()
    start = open_gguf(file).tensors["blk.0.attn_q.weight"].start
    large = torch.tensor([1e6]).numpy().tobytes()
    file.write_bytes(raw[:start] + large + raw[start + 4 :])
    with pytest.raises(ArtifactError, match=r"blk\.0\.attn_q\.weight has values that"):
        dequantize(file, base, tmp_path / "half", "float16")
    assert not list((tmp_path / "half").iterdir())


def test_files_of_other_models_are_refused(tmp_path: Path) -> None:
    """Another family, another number, another rotation, a tensor of another name."""
    base = make_case(tmp_path / "model", CASES["llama3"])
    file = write_file(base, tmp_path)
    path = base.source.folder / "config.json"
    config = json.loads(path.read_text())

    other = make_case(tmp_path / "other", CASES["qwen3"])
    with pytest.raises(ArtifactError, match="architecture llama, not qwen3"):
        plan_dequantizing(open_gguf(file), other)
    path.write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(ArtifactError, match=r"layer_norm_rms_epsilon is '.*' in the file, 0\.5 by"):
        plan_dequantizing(open_gguf(file), reopen(base.source.folder))
    rope = {**config["rope_parameters"], "factor": 4.0}
    path.write_text(json.dumps({**config, "rope_parameters": rope}))
    with pytest.raises(ArtifactError, match=r"rope_freqs\.weight does not follow"):
        plan_dequantizing(open_gguf(file), reopen(base.source.folder))
    path.write_text(json.dumps(config))
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(
        ArtifactError, match=r"the file lacks blk\.1\.ffn_up\.weight \(and 1 more\)"
    ):
        plan_dequantizing(open_gguf(file), base)


def test_types_that_are_not_decoded_are_named(tmp_path: Path) -> None:
    """Ternary and integer-grid types are inspected, not read."""
    base = make_case(tmp_path / "model", CASES["qwen3"])
    sound = open_gguf(write_file(base, tmp_path))
    specs = [
        GgufSpec(name, TYPES_BY_ID[26] if name == "output_norm.weight" else each.kind, each.shape)
        for name, each in sound.tensors.items()
    ]
    contents = ((spec.name, [bytes(spec.size)]) for spec in specs)
    write_gguf(tmp_path, "odd", sound.metadata, specs, contents, ALL_IN_ONE)

    with pytest.raises(ArtifactError, match="tensors of I32, which are not decoded"):
        plan_dequantizing(open_gguf(tmp_path / "odd.gguf"), base)
