"""Conversions of other tools' checkpoints, read again by transformers and compressed-tensors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit import conversion
from quantkit.conversion import convert, dequantized_folder, note_dequantized
from quantkit.errors import (
    ArtifactError,
    CheckpointError,
    InputError,
    NotYetError,
    OutputError,
    ResourceError,
)
from quantkit.formats.decode import read_layer
from quantkit.formats.inspect import inspect_artifact
from quantkit.formats.verify import verify_artifact
from quantkit.numerics.affine import dequantize_layer
from quantkit.records import Event
from tests.formats.cases import make_case, stored_tensors
from tests.formats.readers.packers import (
    Foreign,
    draw_codes,
    make_awq,
    make_fp8,
    make_gptq,
    pack_gptq,
)
from tests.helpers import make_pico_model, write_shards

Make = Callable[..., Foreign]

KINDS: dict[str, tuple[Make, dict[str, Any], str]] = {
    "gptq": (make_gptq, {}, "w4a16_asym g32"),
    "gptq-v2-sym": (
        make_gptq,
        {"version": 2, "checkpoint_format": "gptq_v2", "sym": True},
        "w4a16 g32",
    ),
    "gptq-8-channel": (
        make_gptq,
        {"bits": 8, "sym": True, "group_size": -1, "g_idx": False},
        "w8a16 channel",
    ),
    "awq": (make_awq, {}, "w4a16_asym g32"),
    "awq-sym-channel": (make_awq, {"zero_point": False, "group_size": -1}, "w4a16 channel"),
}
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
IDS = torch.arange(3, 30)[None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block with biases, tied embeddings and a tokenizer, in float16 as such models come."""
    root = tmp_path_factory.mktemp("conversion")
    return make_pico_model(
        root / "model", family="qwen2", intermediate=96, layers=1, dtype="float16"
    )


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block whose matrices are whole FP8 blocks."""
    root = tmp_path_factory.mktemp("conversion-fp8")
    return make_pico_model(root / "model", hidden=128, intermediate=256, layers=1, tied=False)


def load(folder: Path) -> Any:
    """The model as transformers loads it in float32, after its first forward."""
    loaded, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    logits(loaded)
    return loaded


def logits(loaded: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = loaded(IDS).logits
    return found


@pytest.mark.parametrize("name", KINDS)
def test_repacked_and_dequantized_are_the_same_model(
    model: Path, tmp_path: Path, name: str
) -> None:
    """To transformers: bit-equal weights, and so the same logits; and both are what was packed."""
    make, options, scheme = KINDS[name]
    made = make(model, tmp_path / "made", **options)
    packed = convert(made.folder, to="compressed-tensors", output=tmp_path / "packed")
    plain = convert(made.folder, to="safetensors", output=tmp_path / "plain", dtype="float32")
    assert (packed.layers, plain.layers, packed.notes, plain.notes) == (7, 7, (), ())
    one, other = load(tmp_path / "packed"), load(tmp_path / "plain")
    for layer, weight in made.weights.items():
        assert torch.equal(one.get_submodule(layer).weight, weight)
        assert torch.equal(other.get_submodule(layer).weight, weight)
    assert torch.equal(logits(one), logits(other))
    found = inspect_artifact(tmp_path / "packed")
    assert (found.scheme, found.problems) == (scheme, ())
    assert found.bits_per_weight == pytest.approx(packed.artifact.bits_per_weight)
    assert verify_artifact(tmp_path / "packed").problems == ()


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_codes_scales_and_zero_points_are_the_stored_ones(
    model: Path, tmp_path: Path, name: str
) -> None:
    """Nothing is rounded on the way, and scales keep their dtype."""
    make, options, _ = KINDS[name]
    made = make(model, tmp_path / "made", **options)
    convert(made.folder, to="compressed-tensors", output=tmp_path / "packed")
    for layer, numbers in made.codes.items():
        found = read_layer(tmp_path / "packed", layer)
        assert torch.equal(found.codes.int(), numbers.codes.int() - 8)
        assert torch.equal(found.scale, numbers.scales)
        assert found.zero_point is not None
        assert torch.equal(found.zero_point.int(), numbers.zeros.int() - 8)


def test_everything_else_is_copied(model: Path, tmp_path: Path) -> None:
    """Biases, norms and embeddings byte for byte, the tokenizer too; a tied head stays absent."""
    made = make_gptq(model, tmp_path / "made")
    original = stored_tensors(model)
    for to in ("compressed-tensors", "safetensors"):
        output = tmp_path / to
        convert(made.folder, to=to, output=output)
        written = stored_tensors(output)
        others = original.keys() - {f"{layer}.weight" for layer in made.weights}
        assert "lm_head.weight" not in written
        assert {f"{UP.replace('mlp.up', 'self_attn.q')}.bias", "model.norm.weight"} <= others
        for name in others:
            assert torch.equal(written[name], original[name])
        for file in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
            assert (output / file).read_bytes() == (model / file).read_bytes()


def test_weights_are_written_in_the_dtype_of_the_model(model: Path, tmp_path: Path) -> None:
    """By default; `--dtype` chooses another, and the config says which it is."""
    made = make_gptq(model, tmp_path / "made")
    for dtype, expected in ((None, torch.float16), ("bfloat16", torch.bfloat16)):
        output = tmp_path / str(dtype)
        convert(made.folder, to="safetensors", output=output, dtype=dtype)
        config = json.loads((output / "config.json").read_text())
        assert config["dtype"] == str(expected).removeprefix("torch.")
        assert "quantization_config" not in config
        weight = stored_tensors(output)[f"{UP}.weight"]
        assert torch.equal(weight, made.weights[UP].to(expected))


def test_columns_in_act_order_are_dequantized_and_not_packed(model: Path, tmp_path: Path) -> None:
    """compressed-tensors would need a g_idx, which vLLM refuses."""
    made = make_gptq(model, tmp_path / "made", desc_act=True)
    with pytest.raises(
        ArtifactError,
        match=r"layer model\.layers\.0.* \(and 6 more\) has groups of columns that lie apart "
        r"\(g_idx of desc_act\).*--to safetensors",
    ):
        convert(made.folder, to="compressed-tensors", output=tmp_path / "packed")
    assert not list(tmp_path.glob("packed*"))
    convert(made.folder, to="safetensors", output=tmp_path / "plain", dtype="float32")
    written = stored_tensors(tmp_path / "plain")
    for layer, weight in made.weights.items():
        assert torch.equal(written[f"{layer}.weight"], weight)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 2, "sym": True}, "is w2a16, which quantkit does not write"),
        ({"bits": 8}, "is w8a16_asym, which quantkit does not write"),
        ({"group_size": 40}, "has groups of columns that lie apart"),
    ],
)
def test_codes_without_a_scheme_are_dequantized_and_not_packed(
    model: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    """The message says what works instead."""
    made = make_gptq(model, tmp_path / "made", **options)
    with pytest.raises(ArtifactError, match=rf"layer .*{says}.*--to safetensors"):
        convert(made.folder, to="compressed-tensors", output=tmp_path / "packed")
    convert(made.folder, to="safetensors", output=tmp_path / "plain", dtype="float32")
    written = stored_tensors(tmp_path / "plain")
    assert torch.equal(written[f"{DOWN}.weight"], made.weights[DOWN])


def test_fp8_is_dequantized_as_transformers_does_it(wide: Path, tmp_path: Path) -> None:
    """Its own reader of the FP8 checkpoint, on a machine without FP8, has the same weights."""
    made = make_fp8(wide, tmp_path / "made")
    convert(made.folder, to="safetensors", output=tmp_path / "plain", dtype="float32")
    ours = load(tmp_path / "plain")
    theirs = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32)
    for layer, weight in made.weights.items():
        assert torch.equal(ours.get_submodule(layer).weight, weight)
        assert torch.equal(theirs.get_submodule(layer).weight, weight)
    with pytest.raises(NotYetError, match=r"is FP8.*not yet built \(built: --to safetensors\)"):
        convert(made.folder, to="compressed-tensors", output=tmp_path / "packed")


def test_compressed_tensors_is_dequantized(tmp_path: Path) -> None:
    """Mixed schemes, an output of quantkit, and what was left in 16 bits."""
    source = make_pico_model(tmp_path / "model", layers=1, tokenizer=False)
    choices = [
        ("*.down_proj", "w8a16", None),
        ("*.mlp.*", "w4a16_asym", 32),
        ("*.o_proj", "w8a8", None),
        ("*.v_proj", "fp8_dynamic", None),
        ("*", "w4a16", 64),
    ]
    case = make_case(source, choices)
    case.write(tmp_path / "output" / "compressed-tensors")
    (tmp_path / "output" / "quantkit.json").write_text("{}")
    made = convert(
        tmp_path / "output", to="safetensors", output=tmp_path / "plain", dtype="float32"
    )
    assert (made.source_format, made.layers) == ("compressed-tensors", len(case.layers))
    written = stored_tensors(tmp_path / "plain")
    for name, layer in case.layers.items():
        assert torch.equal(written[f"{name}.weight"], dequantize_layer(layer))
    load(tmp_path / "plain")
    with pytest.raises(InputError, match="is compressed-tensors already"):
        convert(tmp_path / "output", to="compressed-tensors", output=tmp_path / "again")


def test_shards_of_the_source_are_read_and_names_kept(model: Path, tmp_path: Path) -> None:
    """An index with three files."""
    made = make_gptq(model, tmp_path / "made")
    tensors = stored_tensors(made.folder)
    (made.folder / "model.safetensors").unlink()
    write_shards(made.folder, tensors, 3)
    convert(made.folder, to="compressed-tensors", output=tmp_path / "packed")
    assert torch.equal(load(tmp_path / "packed").get_submodule(DOWN).weight, made.weights[DOWN])


def test_the_output_says_where_it_is_from(model: Path, tmp_path: Path) -> None:
    """quantkit.json has the source's hashes and the hashes of what was written."""
    made = make_gptq(model, tmp_path / "made")
    events: list[Event] = []
    done = convert(
        made.folder, to="compressed-tensors", output=tmp_path / "out", progress=events.append
    )
    evidence = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert evidence["conversion"] == {
        "from": "GPTQ",
        "to": "compressed-tensors",
        "layers": 7,
        "notes": [],
    }
    source = (made.folder / "model.safetensors").read_bytes()
    assert evidence["model"]["files"]["model.safetensors"] == hashlib.sha256(source).hexdigest()
    (row,) = evidence["artifacts"]
    assert (row["path"], row["name"]) == ("out", "out")
    for file, digest in row["files"].items():
        assert hashlib.sha256((tmp_path / "out" / file).read_bytes()).hexdigest() == digest
    assert done.artifact.folder == tmp_path / "out"
    assert [event.done for event in events] == list(range(1, 8))
    assert {event.total for event in events} == {7}
    assert not (tmp_path / "out" / "lock").exists()
    assert inspect_artifact(tmp_path / "out").verdict == "UNJUDGED"


def test_the_same_conversion_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    """Of every file but the evidence, which names the output."""
    made = make_awq(model, tmp_path / "made")
    first = convert(made.folder, to="compressed-tensors", output=tmp_path / "one")
    again = convert(made.folder, to="compressed-tensors", output=tmp_path / "two")
    assert first.artifact.files == again.artifact.files


def test_an_output_is_replaced_only_when_asked_for(model: Path, tmp_path: Path) -> None:
    """And only one that quantkit wrote; a failed conversion leaves the old one."""
    made, output = make_gptq(model, tmp_path / "made"), tmp_path / "out"
    convert(made.folder, to="safetensors", output=output)
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists: choose another --output"):
        convert(made.folder, to="compressed-tensors", output=output)
    order = torch.full((96,), 3, dtype=torch.int32)
    made.edit_tensors({f"{DOWN}.g_idx": order})
    with pytest.raises(ArtifactError, match="names group 3"):
        convert(made.folder, to="safetensors", output=output, overwrite=True)
    assert (output / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("out.*"))
    made.edit_tensors({f"{DOWN}.g_idx": order // 32})
    with pytest.raises(OutputError, match="not a folder that quantkit wrote"):
        convert(made.folder, to="safetensors", output=made.folder, overwrite=True)


def test_an_unfinished_job_of_the_same_output_is_left_alone(model: Path, tmp_path: Path) -> None:
    """Its blocks may be hours of work."""
    made = make_gptq(model, tmp_path / "made")
    blocks = tmp_path / "out.partial" / "workspace"
    blocks.mkdir(parents=True)
    (blocks.parent / "lock").touch()
    (blocks / "block-00000-0123456789abcdef.safetensors").touch()
    with pytest.raises(OutputError, match="holds an unfinished job"):
        convert(made.folder, to="safetensors", output=tmp_path / "out", overwrite=True)
    assert len(list(blocks.iterdir())) == 1


def test_a_model_that_is_not_quantized_is_sent_to_quantize(model: Path, tmp_path: Path) -> None:
    """The error names the command."""
    with pytest.raises(InputError, match=r"is not quantized.*`quantkit quantize .*model`"):
        convert(model, to="compressed-tensors", output=tmp_path / "out")


@pytest.mark.parametrize(
    ("to", "dtype", "error", "says"),
    [
        ("gguf", None, InputError, "--to 'gguf' needs a type: write --to gguf:Q4_K_M"),
        ("gguf:Q4_KM", None, InputError, "did you mean 'Q4_K_M'"),
        ("onnx", None, NotYetError, "--to 'onnx' is not yet built"),
        ("safetensor", None, InputError, "did you mean 'safetensors'"),
        ("safetensors:f32", None, InputError, "write --to safetensors"),
        ("safetensors", "float8", InputError, "--dtype 'float8' is unknown"),
        ("compressed-tensors", "float32", InputError, "--dtype goes with --to safetensors"),
    ],
)
def test_targets_that_there_are_not(
    model: Path, tmp_path: Path, to: str, dtype: str | None, error: type[Exception], says: str
) -> None:
    """Refused before the model is opened."""
    with pytest.raises(error, match=says):
        convert(model, to=to, output=tmp_path / "out", dtype=dtype)


def test_problems_of_the_source_stop_the_conversion(model: Path, tmp_path: Path) -> None:
    """The first is told, and how many there are."""
    made = make_gptq(model, tmp_path / "made")
    made.edit_config(bits=8)
    with pytest.raises(ArtifactError, match=r"4 bits, but config.json says 8 \(and 6 more: see"):
        convert(made.folder, to="safetensors", output=tmp_path / "out")


def test_layers_that_contradict_the_model_are_refused(model: Path, tmp_path: Path) -> None:
    """A shape that the config does not describe, and a tensor that is missing."""
    made = make_gptq(model, tmp_path / "made")
    parts = pack_gptq(draw_codes(64, 64), 4)
    whole = stored_tensors(made.folder)
    made.edit_tensors({f"{DOWN}.{part}": tensor for part, tensor in parts.items()})
    for to in ("safetensors", "compressed-tensors"):
        with pytest.raises(
            ArtifactError, match=rf"{DOWN} has the weight \[64, 64\], but config.json .* \[64, 96\]"
        ):
            convert(made.folder, to=to, output=tmp_path / "out")
    made.edit_tensors({f"{DOWN}.{part}": whole[f"{DOWN}.{part}"] for part in parts})
    made.edit_tensors({"model.norm.weight": None})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor .*model\.norm\.weight"):
        convert(made.folder, to="safetensors", output=tmp_path / "out")


def test_layers_of_strange_names_are_dequantized_and_not_packed(
    model: Path, tmp_path: Path
) -> None:
    """As those of experts, which transformers joins: compressed-tensors' readers go by modules."""
    made = make_gptq(model, tmp_path / "made")
    expert = "model.layers.0.mlp.experts.0.up_proj"
    drawn = draw_codes(64, 96)
    made.edit_tensors({f"{expert}.{part}": each for part, each in pack_gptq(drawn, 4).items()})
    with pytest.raises(ArtifactError, match=rf"layer {expert} is no module of transformers'"):
        convert(made.folder, to="compressed-tensors", output=tmp_path / "out")
    convert(made.folder, to="safetensors", output=tmp_path / "out", dtype="float32")
    assert torch.equal(stored_tensors(tmp_path / "out")[f"{expert}.weight"], drawn.weight)


def test_biases_of_zeros_that_the_model_lacks_are_left_out(model: Path, tmp_path: Path) -> None:
    """AutoGPTQ wrote them for every layer; others are kept for the reader to complain about."""
    made = make_gptq(model, tmp_path / "made")
    made.edit_tensors({f"{UP}.bias": torch.zeros(96).half(), f"{DOWN}.bias": torch.ones(64).half()})
    done = convert(made.folder, to="safetensors", output=tmp_path / "out")
    assert done.notes == ("1 biases of zeros, which the model does not have, are left out",)
    written = stored_tensors(tmp_path / "out")
    assert f"{UP}.bias" not in written
    assert f"{DOWN}.bias" in written


def test_scales_of_another_dtype_than_the_model_are_noted(model: Path, tmp_path: Path) -> None:
    """They are kept; a server in bfloat16 rounds them."""
    made = make_gptq(model, tmp_path / "made")
    path = made.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    done = convert(made.folder, to="compressed-tensors", output=tmp_path / "out")
    assert len(done.notes) == 1
    assert "the scales of 7 layers are not bfloat16" in done.notes[0]


def test_weights_beyond_float16_are_not_written_as_infinity(model: Path, tmp_path: Path) -> None:
    """The message says which dtype holds them."""
    made = make_gptq(model, tmp_path / "made")
    made.edit_tensors({f"{DOWN}.scales": torch.full((3, 64), 60000.0).half()})
    with pytest.raises(ArtifactError, match=r"F16 cannot hold: convert with --dtype float32"):
        convert(made.folder, to="safetensors", output=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    convert(made.folder, to="safetensors", output=tmp_path / "out", dtype="float32")


def test_a_disk_that_is_too_small_is_told_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a conversion and for a folder to judge."""
    made = make_gptq(model, tmp_path / "made")
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="are to be written to"):
        convert(made.folder, to="safetensors", output=tmp_path / "a" / "out")
    with (
        pytest.raises(ResourceError, match="are to be written to"),
        dequantized_folder(made.folder, tmp_path),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]


@pytest.mark.parametrize(
    ("make", "words"),
    [(make_gptq, "GPTQ"), (make_awq, "AWQ"), (make_fp8, "FP8.*rounds their inputs")],
)
def test_a_foreign_checkpoint_gets_a_folder_to_be_judged_in(
    model: Path, tmp_path: Path, make: Make, words: str
) -> None:
    """Exact weights in float32, gone afterwards, and a note that says so."""
    made = make(model, tmp_path / "made")
    with dequantized_folder(made.folder, tmp_path) as folder:
        loaded = load(folder)
        for layer, weight in made.weights.items():
            assert torch.equal(loaded.get_submodule(layer).weight, weight)
    assert not folder.exists()
    (note,) = note_dequantized(made.folder, "the artifact")
    assert note.startswith("the artifact is ")
    assert re.search(words, note)
    assert "was judged on its dequantized weights: 7 layers, in float32" in note


def test_what_transformers_loads_itself_is_judged_as_it_is(model: Path, tmp_path: Path) -> None:
    """Plain checkpoints and compressed-tensors."""
    made = make_gptq(model, tmp_path / "made")
    convert(made.folder, to="compressed-tensors", output=tmp_path / "packed")
    for folder in (model, tmp_path / "packed"):
        with dequantized_folder(folder, tmp_path) as judged:
            assert judged == folder
        assert note_dequantized(folder, "the artifact") == ()
