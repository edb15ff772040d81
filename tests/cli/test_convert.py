"""`quantkit convert` and `quantkit inspect` on checkpoints of other tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quantkit.formats.gguf.header import GgufSpec, Value
from quantkit.formats.gguf.writing import write_gguf
from quantkit.ggml_types import GGML_TYPES
from tests.cli.running import run_here
from tests.formats.readers.packers import make_awq, make_gptq
from tests.helpers import make_pico_model


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two that other tools have quantized."""
    folder = tmp_path_factory.mktemp("convert")
    model = make_pico_model(folder / "model", layers=1, dtype="float16", tokenizer=False)
    make_gptq(model, folder / "gptq", desc_act=True)
    make_awq(model, folder / "awq")
    make_pico_model(folder / "spoken", layers=1)
    kind = GGML_TYPES["F32"]
    metadata = {"general.architecture": Value("string", "mamba")}
    content = torch.zeros(2, 4, dtype=torch.uint8)
    write_gguf(folder, "mamba", metadata, [GgufSpec("x", kind, (2, 1))], [("x", content)], 1 << 20)
    return folder


def test_a_conversion_says_what_it_made(bench: Path, tmp_path: Path) -> None:
    """For people and as JSON."""
    arguments = ("convert", bench / "awq", "--to", "compressed-tensors", "--output")
    done = run_here(*arguments, tmp_path / "out", "--quiet")
    assert done.returncode == 0, done.stderr
    assert f"{bench / 'awq'} (AWQ)" in done.stdout
    assert f"{tmp_path / 'out'} (compressed-tensors)" in done.stdout
    assert done.stderr == ""
    again = run_here(*arguments, tmp_path / "out", "--overwrite", "--json")
    assert again.returncode == 0, again.stderr
    document = json.loads(again.stdout)
    assert (document["source_format"], document["layers"], document["notes"]) == ("AWQ", 7, [])
    assert document["artifact"]["format"] == "compressed-tensors"
    assert document["artifact"]["folder"] == str(tmp_path / "out")
    assert "model.safetensors" in document["artifact"]["files"]
    assert "convert 7/7" in again.stderr


def test_gguf_files_are_converted_to_each_other_and_back(bench: Path, tmp_path: Path) -> None:
    """Each step names the file or the folder that the next one takes."""
    first, second, plain = (tmp_path / name for name in ("first", "second", "plain"))
    done = run_here("convert", bench / "spoken", "--to", "gguf:q8_0", "--output", first)
    assert done.returncode == 0, done.stderr
    assert f"{first / 'spoken-Q8_0.gguf'} (Q8_0)" in done.stdout

    again = ("convert", first, "--to", "gguf:Q4_0", "--output", second)
    refused = run_here(*again)
    assert refused.returncode == 2
    assert "or say --requantize" in refused.stderr
    done = run_here(*again, "--requantize")
    assert done.returncode == 0, done.stderr
    assert f"{second / 'spoken-Q4_0.gguf'} (Q4_0)" in done.stdout
    assert "note: its weights were rounded twice" in done.stdout

    file = second / "spoken-Q4_0.gguf"
    back = ("convert", file, "--to", "safetensors", "--output", plain, "--json")
    done = run_here(*back, "--base", bench / "spoken", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["source_format"], document["notes"]) == ("gguf, Q4_0", [])
    assert document["artifact"]["folder"] == str(plain)
    for folder in (first, second, plain):
        assert run_here("verify", folder).returncode == 0


def test_inspect_shows_what_other_tools_wrote(bench: Path) -> None:
    """Format, scheme, and no problem."""
    done = run_here("inspect", bench / "gptq", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["format"], document["scheme"]) == ("gptq", "w4a16_asym g32")
    shown = run_here("inspect", bench / "awq").stdout
    assert "7 x w4a16_asym, group size 32" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("awq", "--to", "onnx"), "--to 'onnx' is not yet built"),
        (("awq", "--to", "gguf:Q4_KM"), "did you mean 'Q4_K_M'?"),
        (("awq", "--to", "safetensor"), "did you mean 'safetensors'?"),
        (("model", "--to", "compressed-tensors"), "is not quantized"),
        (("gptq", "--to", "compressed-tensors"), "groups of columns that lie apart"),
        (("./nothing", "--to", "safetensors"), "there is no such folder"),
        (("awq", "--to", "safetensors", "--dtype", "f32"), "--dtype 'f32' is unknown"),
        (("nothing.gguf", "--to", "gguf:Q4_0"), "nothing.gguf: there is no such file"),
        (("awq", "--to", "gguf:Q4_0"), "is quantized, and GGUF files are made of plain weights"),
        (("model", "--to", "gguf:Q4_0", "--requantize"), "--requantize goes with GGUF files"),
        (("model", "--to", "gguf:Q4_0", "--imatrix", "x.dat"), "--imatrix x.dat: there is no"),
        (("model", "--to", "gguf:Q4_0", "--base", "model"), "--base goes with --to safetensors"),
        (("mamba.gguf", "--to", "safetensors"), "pass --base MODEL"),
        (("mamba.gguf", "--to", "compressed-tensors"), "of GGUF files is not yet built"),
        (("mamba.gguf", "--to", "gguf:Q4_0"), "architecture 'mamba', which is not built"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    bench: Path, arguments: tuple[str, ...], says: str
) -> None:
    """Exit code 2 and nothing beside."""
    before = sorted(bench.iterdir())
    done = run_here("convert", *arguments, "--output", "out", folder=bench)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert sorted(bench.iterdir()) == before
