"""Decoders as ONNX graphs: the codes and the logits of the compressed-tensors artifact."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import ArtifactError, MissingPackageError, PlanError
from quantkit.formats.onnx import packages
from quantkit.formats.onnx.decoder import plan_decoder, write_float_decoder
from quantkit.recipe import ExportSpec
from tests.formats.onnx.decoder_cases import (
    BOTH,
    assert_same_codes,
    read_graph,
    run_graph,
    run_job,
    run_transformers,
    some_tokens,
)
from tests.helpers import make_pico_model

DEMO = Path(__file__).parents[3] / "models" / "demo-llama"
TOLERANCE = 1e-3

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


def assert_same_logits(output: Path, count: int = 40) -> None:
    tokens = some_tokens(count)
    expected = run_transformers(output / "compressed-tensors", tokens)
    difference = np.abs(run_graph(output / "onnx", tokens) - expected).max()
    assert difference <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_of_each_architecture_has_the_codes_and_logits_of_the_other_artifact(
    tmp_path: Path, family: str
) -> None:
    """Biases, norms of queries and keys, norms with an offset, fused layers, sliding windows."""
    model = make_pico_model(tmp_path / "model", family=family, tied=family != "qwen3")
    shorten_window(model)

    result = run_job(model, tmp_path / "out", *BOTH, method="rtn")

    assert result.plan.onnx[0].precision == "int4"
    assert_same_codes(tmp_path / "out")
    assert_same_logits(tmp_path / "out")


def shorten_window(model: Path) -> None:
    """Let a sliding window, where there is one, hide some of forty tokens."""
    config = json.loads((model / "config.json").read_text())
    if config.get("sliding_window") is not None:
        config["sliding_window"] = 16
        (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("scheme", "group_size"),
    [
        ("w4a16", 64),
        ("w4a16", 128),
        ("w4a16", "channel"),
        ("w4a16_asym", 32),
        ("w4a16_asym", "channel"),
        ("w8a16", 32),
        ("w8a16", "channel"),
    ],
)
def test_every_scheme_and_group_size_gets_its_own_codes(
    tmp_path: Path, scheme: str, group_size: int | str
) -> None:
    """A scale for a row is repeated for each block."""
    model = make_pico_model(tmp_path / "model", hidden=128, intermediate=384)

    run_job(model, tmp_path / "out", *BOTH, scheme=scheme, group_size=group_size)

    assert_same_codes(tmp_path / "out")
    # transformers does not load zero points with every compressed-tensors.
    if scheme != "w4a16_asym":
        assert_same_logits(tmp_path / "out")


def test_groups_of_sixteen_are_for_graphs_alone(tmp_path: Path) -> None:
    """They are better than those of 64, and compressed-tensors does not have them."""
    model = make_pico_model(tmp_path / "model")
    tokens = some_tokens(40)
    expected = run_transformers(model, tokens)

    def distance(group_size: int) -> float:
        output = tmp_path / f"out{group_size}"
        run_job(model, output, BOTH[1], group_size=group_size)
        return float(np.square(run_graph(output / "onnx", tokens) - expected).sum())

    assert distance(16) < distance(64)
    with pytest.raises(PlanError, match="group_size 16 is for ONNX graphs alone"):
        run_job(model, tmp_path / "both", *BOTH, group_size=16)


def test_layers_with_other_schemes_keep_them(tmp_path: Path) -> None:
    """Eight bits and none beside four."""
    model = make_pico_model(tmp_path / "model")
    overrides = [
        {"match": "*.down_proj", "scheme": "w8a16"},
        {"match": "*.o_proj", "scheme": "none"},
    ]

    result = run_job(
        model,
        tmp_path / "out",
        BOTH[0],
        {"format": "onnx", "precision": "int4"},
        overrides=overrides,
    )

    assert_same_codes(tmp_path / "out")
    assert_same_logits(tmp_path / "out")
    graph, _ = read_graph(tmp_path / "out" / "onnx")
    bits = {
        node.name.split("/")[-3]: each.i
        for node in graph.node
        for each in node.attribute
        if each.name == "bits"
    }
    assert (bits["down_proj"], bits["up_proj"]) == (8, 4)
    assert "o_proj" not in bits
    assert any("layers in none, w8a16 by overrides" in note for note in result.plan.notes)


def test_the_plan_foretells_the_bytes(tmp_path: Path) -> None:
    """Of codes, scales, floats and tables, shared ones counted once."""
    model = make_pico_model(tmp_path / "model")
    exports = (
        {"format": "onnx", "precision": "int4", "embeddings": "int8", "lm_head": "int8"},
        {"format": "onnx", "precision": "fp32"},
        {"format": "onnx", "precision": "fp16", "activations": "fp16"},
    )

    result = run_job(model, tmp_path / "out", *exports, scheme="w4a16_asym", group_size=16)

    planned = [graph.tensor_bytes for graph in result.plan.onnx]
    assert [artifact.tensor_bytes for artifact in result.artifacts] == planned
    assert result.plan.artifact_bytes == planned[0]
    assert [artifact.folder.name for artifact in result.artifacts] == ["int4", "fp32", "fp16"]
    for artifact in result.artifacts:
        file = artifact.folder / "model.onnx.data"
        assert 0 <= file.stat().st_size - artifact.tensor_bytes < 300_000
        for name, digest in artifact.files.items():
            assert hashlib.sha256((artifact.folder / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_can_be_rounded_too(tmp_path: Path, tied: bool, precision: str) -> None:
    """Tied ones are stored once; the notes say that they were rounded without data."""
    model = make_pico_model(tmp_path / "model", tied=tied)
    export = {"format": "onnx", "embeddings": precision, "lm_head": precision}

    result = run_job(model, tmp_path / "out", export, scheme="w8a16")

    tokens = some_tokens(40)
    expected = run_transformers(model, tokens)
    found = run_graph(tmp_path / "out" / "onnx", tokens)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < (0.3 if precision == "int4" else 0.03)
    _, tensors = read_graph(tmp_path / "out" / "onnx")
    assert sum(name.endswith(f".int{precision[-1]}.codes") for name in tensors) == 2 - tied
    assert sum("rounded without data" in note for note in result.plan.notes) == 2


def test_a_tied_embedding_is_stored_once_in_its_own_dtype(tmp_path: Path) -> None:
    """The output layer is the embedding, transposed in the graph."""
    model = make_pico_model(tmp_path / "model", tied=True)
    run_job(model, tmp_path / "out", BOTH[1])

    graph, tensors = read_graph(tmp_path / "out" / "onnx")

    large = {name: value for name, value in tensors.items() if value.shape == (300, 64)}
    assert list(large) == ["model.embed_tokens.weight.stored"]
    assert large["model.embed_tokens.weight.stored"].dtype.itemsize == 2
    assert any(node.op_type == "Transpose" for node in graph.node)


def test_float16_activations_run(tmp_path: Path) -> None:
    """Scales are in float16 then."""
    model = make_pico_model(tmp_path / "model")
    run_job(model, tmp_path / "out", BOTH[0], {"format": "onnx", "activations": "fp16"})

    tokens = some_tokens(40)
    expected = run_transformers(tmp_path / "out" / "compressed-tensors", tokens)
    difference = np.abs(run_graph(tmp_path / "out" / "onnx", tokens) - expected).max()

    assert difference <= 2e-2 * np.abs(expected).max()


@pytest.mark.parametrize("accuracy_level", [0, 4])
def test_the_accuracy_level_is_an_attribute_of_every_layer(
    tmp_path: Path, accuracy_level: int
) -> None:
    """Four lets CPUs round the inputs."""
    model = make_pico_model(tmp_path / "model")
    run_job(model, tmp_path / "out", {"format": "onnx", "accuracy_level": accuracy_level})

    graph, _ = read_graph(tmp_path / "out" / "onnx")

    levels = {
        each.i
        for node in graph.node
        if node.op_type == "MatMulNBits"
        for each in node.attribute
        if each.name == "accuracy_level"
    }
    assert levels == {accuracy_level}


def test_the_demo_model_writes_on_as_in_transformers(tmp_path: Path) -> None:
    """64 tokens, the most probable each, in onnxruntime_genai."""
    import onnxruntime_genai
    import torch
    from transformers import AutoModelForCausalLM

    run_job(DEMO, tmp_path / "out", *BOTH, group_size=64)
    prompt = some_tokens(32, 4096)[0].tolist()
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "compressed-tensors", dtype=torch.float32
    )
    expected = reference.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None
    )[0, 32:].tolist()

    model = onnxruntime_genai.Model(str(tmp_path / "out" / "onnx"))
    settings = onnxruntime_genai.GeneratorParams(model)
    settings.set_search_options(do_sample=False, max_length=96)
    generator = onnxruntime_genai.Generator(model, settings)
    generator.append_tokens(prompt)
    found = []
    while len(found) < 64 and not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))

    assert len(found) == 64
    assert found == expected
    text = "Once upon a time"
    words = onnxruntime_genai.Tokenizer(model).encode(text).tolist()
    assert onnxruntime_genai.Tokenizer(model).decode(words).strip().endswith(text)


def test_a_process_with_onnxruntime_alone_runs_the_graph(tmp_path: Path) -> None:
    """Nothing of quantkit or torch is needed; the folder can be moved."""
    model = make_pico_model(tmp_path / "model")
    run_job(model, tmp_path / "out", BOTH[1])
    moved = (tmp_path / "out" / "onnx").rename(tmp_path / "elsewhere")
    script = (
        "import sys, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1])\n"
        "ids = numpy.array([[5, 6, 7]])\n"
        "feed = {'input_ids': ids, 'attention_mask': numpy.ones_like(ids)}\n"
        "for each in session.get_inputs():\n"
        "    if each.name.startswith('past'):\n"
        "        feed[each.name] = numpy.zeros((1, 2, 0, 16), 'float32')\n"
        "print(session.run(['logits'], feed)[0].shape, 'torch' in sys.modules)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, str(moved / "model.onnx")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )

    assert done.stdout.strip() == "(1, 3, 300) False"
    assert {path.name for path in moved.iterdir()} == {
        *("model.onnx", "model.onnx.data", "genai_config.json", "config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("generation_config.json", "README.md"),
    }


def test_equal_jobs_write_equal_bytes(tmp_path: Path) -> None:
    """Graph and tensors."""
    model = make_pico_model(tmp_path / "model")
    for name in ("one", "two"):
        run_job(model, tmp_path / name, BOTH[1])

    for file in ("model.onnx", "model.onnx.data", "genai_config.json"):
        first, second = (tmp_path / name / "onnx" / file for name in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()


def test_the_float_graph_is_the_checkpoint(tmp_path: Path) -> None:
    """For timing: weights in their own dtype, nothing rounded."""
    model = make_pico_model(tmp_path / "model", dtype="float16")

    folder = write_float_decoder(open_checkpoint(resolve_source(str(model))), tmp_path / "float")

    tokens = some_tokens(40)
    expected = run_transformers(model, tokens)
    difference = np.abs(run_graph(folder, tokens) - expected).max()
    assert difference <= TOLERANCE * np.abs(expected).max()
    _, tensors = read_graph(folder)
    assert tensors["model.embed_tokens.weight.stored"].dtype == np.float16


def test_values_that_float16_does_not_hold_are_refused(tmp_path: Path) -> None:
    """The tensor is named; nothing is rounded to infinity."""
    import torch
    from safetensors.torch import load_file, save_file

    model = make_pico_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.tensor(1e6)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.up_proj.* float16 does not hold"):
        run_job(model, tmp_path / "out", {"format": "onnx", "precision": "fp16"})


def test_other_architectures_are_refused_before_any_work(tmp_path: Path) -> None:
    """With the names of those that there are."""
    model = make_pico_model(tmp_path / "model", family="olmo2")

    with pytest.raises(PlanError, match=r"no graph for Olmo2ForCausalLM \(known decoders: Llama"):
        run_job(model, tmp_path / "out", BOTH[1])
    assert not (tmp_path / "out").exists()


def test_an_absent_package_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the line that installs it."""
    checkpoint = open_checkpoint(resolve_source(str(make_pico_model(tmp_path / "model"))))
    there = packages.READING
    monkeypatch.setattr(packages, "find_spec", lambda name: name if name in there else None)

    with pytest.raises(MissingPackageError, match=r'onnx-ir.*pip install "quantkit\[onnx\]"'):
        plan_decoder(checkpoint, ExportSpec(format="onnx"))


def test_a_model_without_an_end_is_refused(tmp_path: Path) -> None:
    """onnxruntime-genai would not know where to stop."""
    model = make_pico_model(tmp_path / "model", tokenizer=False)
    checkpoint = open_checkpoint(resolve_source(str(model)))
    config = {key: value for key, value in checkpoint.config.items() if key != "eos_token_id"}
    endless = type(checkpoint)(checkpoint.source, MappingProxyType(config), checkpoint.tensors, ())

    with pytest.raises(PlanError, match="add eos_token_id"):
        plan_decoder(endless, ExportSpec(format="onnx"))


def test_a_head_that_differs_from_the_embedding_is_kept(tmp_path: Path) -> None:
    """Though the config ties them: transformers leaves them apart."""
    from safetensors.torch import load_file, save_file

    model = make_pico_model(tmp_path / "model", tied=False)
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))

    run_job(model, tmp_path / "out", *BOTH)

    assert_same_logits(tmp_path / "out")
    _, found = read_graph(tmp_path / "out" / "onnx")
    assert sum(300 in value.shape for value in found.values()) == 2
