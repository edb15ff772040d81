"""`verify_artifact` on graphs: nothing to say about what is sound, one line for what is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.headers import read_json
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, read_tensor
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import ArtifactError
from quantkit.formats.onnx import comparison
from quantkit.formats.onnx.blocks import OnnxLayer
from quantkit.formats.onnx.container import open_graph
from quantkit.formats.onnx.decoding import decode_layer
from quantkit.formats.onnx.genai import check_genai, read_genai_config
from quantkit.formats.onnx.loading import try_loading
from quantkit.formats.onnx.operators import find_layers
from quantkit.formats.onnx.ordering import check_order
from quantkit.formats.onnx.stored_numbers import check_numbers
from quantkit.formats.onnx.tensors import read_values
from quantkit.formats.onnx.verification import check_onnx
from quantkit.formats.verify import verify_artifact
from tests.formats.onnx.decoder_cases import run_job
from tests.formats.onnx.graphs import (
    LAYER,
    TABLE,
    finish,
    make_model,
    make_weights,
    quantize_blocks,
    quantize_dynamically,
    quantize_statically,
    save,
)
from tests.helpers import make_pico_model

DECODER = "decoder"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the output of a job that writes its graph."""
    root = tmp_path_factory.mktemp("verify")
    model = make_pico_model(root / "model")
    run_job(model, root / "out", {"format": "onnx"})
    return model, root / "out"


@pytest.fixture
def output(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(made[1], tmp_path / "out")


def test_a_decoder_of_our_own_has_no_problem(made: tuple[Path, Path]) -> None:
    """Both runtimes load it, and every weight is a rounding of the original's."""
    model, folder = made

    found = quantkit.verify(folder, against=model)

    assert found.problems == ()
    assert found.notes == ()
    assert found.format == "onnx"
    # One for queries, keys and values, which are three of the original's.
    assert found.layers == 10
    assert {each.runtime: each.serves for each in found.runtimes} == {
        "onnxruntime": "yes",
        "onnxruntime-genai": "yes",
    }
    assert found.comparison is not None
    assert found.comparison.changed == ()
    assert found.comparison.equal == 6
    assert len(found.comparison.layers) == 14
    assert 0.005 < found.comparison.largest_error < 0.2


MAKERS: dict[str, Callable[[Path, Path], Path]] = {
    "float": lambda source, path: shutil.copy(source, path),
    "blocks": lambda source, path: quantize_blocks(make_model(), path),
    "dynamic": quantize_dynamically,
    "QDQ": lambda source, path: quantize_statically(source, path, "QDQ"),
    "QOperator": lambda source, path: quantize_statically(source, path, "QOperator"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_what_other_tools_make_has_no_problem(tmp_path: Path, kind: str) -> None:
    """And each layer is found in the checkpoint that it was made from."""
    base = make_pico_model(tmp_path / "base", layers=1)
    tensors = {
        name: torch.from_numpy(array if name.startswith(TABLE) else array.T.copy())
        for name, array in make_weights().items()
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    source = save(make_model(), tmp_path / "source.onnx")
    path = MAKERS[kind](source, tmp_path / "graph.onnx")

    found = verify_artifact(path, str(base))

    assert found.problems == ()
    assert [support.serves for support in found.runtimes] == ["yes"]
    assert found.comparison is not None
    assert found.comparison.largest_error < 0.2
    quantized = {"float": 0, "blocks": 2}.get(kind, 3)
    assert len(found.comparison.layers) == quantized


def test_a_weight_without_a_name_is_found_by_what_it_holds(tmp_path: Path) -> None:
    """No name, no bias: only the numbers tell."""
    base = make_pico_model(tmp_path / "base", layers=1)
    weights = make_weights()
    tensors = {"x.weight": torch.from_numpy(weights[f"{LAYER}.weight"].T.copy())}
    tensors["y.weight"] = torch.randn(96, 64)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    graph = finish(
        [helper.make_node("MatMul", ["x", "val_1"], ["y"])],
        [numpy_helper.from_array(weights[f"{LAYER}.weight"], "val_1")],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 96])],
    )

    found = verify_artifact(quantize_blocks(graph, tmp_path / "graph.onnx"), str(base))

    assert found.problems == ()
    assert found.comparison is not None
    assert [layer.name for layer in found.comparison.layers] == ["x"]


def test_nameless_weights_are_decoded_once_and_compared_with_one_sample_of_each_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight, each finds its own."""
    base = make_pico_model(tmp_path / "base", layers=1)
    tensors = {f"m{number}.weight": torch.randn(96, 64) for number in range(8)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    numbers = (5, 2, 7, 0)
    names = [f"val_{number}" for number in numbers]
    graph = finish(
        [helper.make_node("MatMul", ["x", name], [f"y{name}"]) for name in names],
        [
            numpy_helper.from_array(tensors[f"m{number}.weight"].numpy().T.copy(), name)
            for number, name in zip(numbers, names, strict=True)
        ],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info(f"y{n}", TensorProto.FLOAT, [1, 96]) for n in names],
    )
    file = open_graph(quantize_blocks(graph, tmp_path / "graph.onnx"))
    read: list[str] = []
    decoded: list[str] = []

    def count_reading(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        read.append(name)
        return read_tensor(checkpoint, name)

    def count_decoding(layer: OnnxLayer) -> np.ndarray:
        decoded.append(layer.name)
        return decode_layer(layer)

    monkeypatch.setattr(comparison, "read_tensor", count_reading)
    monkeypatch.setattr(comparison, "decode_layer", count_decoding)
    found = comparison.compare_onnx(file, open_checkpoint(resolve_source(str(base))))

    assert [layer.name for layer in found.layers] == [f"m{number}" for number in numbers]
    assert len(decoded) == len(set(decoded)) == 4
    sampled, compared_and_looked_at = 8, 2 * 4
    assert len(read) <= sampled + compared_and_looked_at


def test_weights_of_another_model_are_told(made: tuple[Path, Path], tmp_path: Path) -> None:
    """The same shapes, other numbers."""
    other = make_pico_model(tmp_path / "other", seed=1)

    problems = verify_artifact(made[1], str(other)).problems

    assert len(problems) == 14
    assert all("points elsewhere" in problem for problem in problems)


def test_a_graph_of_something_else_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Nothing in it has a name of the base."""
    path = save(make_model(), tmp_path / "graph.onnx")
    with pytest.raises(ArtifactError, match="it was made of another model"):
        verify_artifact(path, str(made[0]))


def edit(path: Path, change: Callable[[Any], None]) -> list[str]:
    """Change a graph and return what is wrong with it."""
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return list(check_onnx(open_graph(path)).problems)


def set_tensor(name: str, array: np.ndarray) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == name:
                tensor.CopyFrom(numpy_helper.from_array(array.astype(read(tensor).dtype), name))

    return change


def read(tensor: Any) -> np.ndarray:
    array: np.ndarray = numpy_helper.to_array(tensor)
    return array


def reverse(model: Any) -> None:
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def close_circle(model: Any) -> None:
    model.graph.node[1].input[0] = "out"


def write_twice(model: Any) -> None:
    model.graph.node[2].output[0] = "rows"
    model.graph.node[3].input[0] = "rows"


NAN, INF = np.float32("nan"), np.float32("inf")
FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "nan": (set_tensor(f"{LAYER}.bias", np.full(96, NAN)), "holds 96 NaN and 0 infinite values"),
    "infinity": (set_tensor(f"{LAYER}.bias", np.full(96, INF)), "holds 0 NaN and 96 infinite"),
    "unsorted": (reverse, "before it is written: a circle, or no order"),
    "circle": (close_circle, "node m0 (MatMul) reads out before it is written"),
    "twice": (write_twice, "writes rows, which is there already"),
    "output": (lambda m: setattr(m.graph.output[0], "name", "o"), "nothing writes the output o"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_of_the_graph_is_a_line(tmp_path: Path, case: str) -> None:
    """Each says what, and where."""
    change, words = FAULTS[case]
    model = make_model()
    change(model)
    file = open_graph(save(model, tmp_path / "graph.onnx"))

    problems = [*check_order(file), *check_numbers(file, find_layers(file).layers)]

    assert [problem for problem in problems if words in problem], problems


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "unknown": (lambda m: setattr(m.graph.node[-1], "op_type", "Relo"), "no kernel on the CPU for"),
    "domain": (lambda m: setattr(m.graph.node[-1], "domain", "x.y"), "ONNX Runtime does not load"),
    "future": (lambda m: setattr(m, "ir_version", 99), "ONNX Runtime does not load it"),
    "shape": (set_tensor(f"{LAYER}.weight", np.ones((7, 5))), "ONNX Runtime does not load it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_runtime_refuses_is_a_line(tmp_path: Path, case: str) -> None:
    """In the runtime's words, without the rest of them."""
    change, words = REFUSED[case]
    problems = edit(save(make_model(), tmp_path / "graph.onnx"), change)

    assert [problem for problem in problems if words in problem], problems
    assert not [problem for problem in problems if "\n" in problem]


def test_a_file_that_calls_itself_quantized_is(tmp_path: Path) -> None:
    """A float graph under the name of an INT8 one."""
    path = save(make_model(), tmp_path / "model_int8.onnx")

    (problem,) = verify_artifact(path).problems

    assert problem == "the file calls itself quantized ('int8'), but no operator reads codes"


def test_a_mask_of_minus_infinity_is_no_fault(tmp_path: Path) -> None:
    """Zeros and -infinity are what attention masks are made of."""
    mask = np.where(np.eye(8) > 0, np.float32(0), -INF).astype(np.float32)

    def change(model: Any) -> None:
        model.graph.initializer.append(numpy_helper.from_array(mask, "mask"))

    assert edit(save(make_model(), tmp_path / "graph.onnx"), change) == []


def drop_scales(model: Any) -> None:
    tensor = next(each for each in model.graph.initializer if each.name.endswith("_scales"))
    tensor.CopyFrom(numpy_helper.from_array(read(tensor)[:-1], tensor.name))


def set_first(ending: str, value: float) -> Callable[[Any], None]:
    """Fill the first tensor whose name ends so."""

    def change(model: Any) -> None:
        tensor = next(each for each in model.graph.initializer if each.name.endswith(ending))
        array = np.full(read(tensor).shape, value).astype(read(tensor).dtype)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return change


def set_attribute(name: str, value: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        node = next(each for each in model.graph.node if each.op_type == "MatMulNBits")
        next(each for each in node.attribute if each.name == name).i = value

    return change


CODES: dict[str, tuple[Callable[[Any], None], str]] = {
    "count": (drop_scales, "190 scales, but a weight of [96, 64] with 4 bits in blocks of 32"),
    "not finite": (set_first("_scales", np.nan), "192 of 192 scales are not finite"),
    "no scale": (set_first("_scales", 0), "all scales are zero"),
    "equal": (set_first("_Q4", 0x88), "all codes are equal, nothing of the weight is left"),
    "rows": (set_attribute("N", 95), "but a weight of [95, 64]"),
    "columns": (set_attribute("K", 128), "but a weight of [96, 128]"),
    "bits": (set_attribute("bits", 8), "3072 bytes of codes, but a weight of [96, 64] with 8 bits"),
    "no bits": (set_attribute("bits", 0), "0 bits in blocks of 32 are no layout"),
    "block": (set_attribute("block_size", 0), "4 bits in blocks of 0 are no layout"),
    "negative": (set_attribute("K", -64), "the shape [96, -64] is no matrix"),
}


@pytest.mark.parametrize("case", CODES)
def test_codes_and_scales_that_cannot_be_are_named(tmp_path: Path, case: str) -> None:
    """Each says which node or layer, and what it needs."""
    change, words = CODES[case]
    path = quantize_blocks(make_model(), tmp_path / "graph.onnx")
    model = onnx.load(path)
    change(model)
    save(model, path)

    assert [problem for problem in find_faults(path) if words in problem]


def find_faults(path: Path) -> list[str]:
    """What the layout and the numbers say; no runtime is asked."""
    file = open_graph(path)
    found = find_layers(file)
    return [*found.problems, *check_numbers(file, found.layers)]


@pytest.mark.parametrize(
    ("ending", "value", "words"),
    [
        ("dense.weight_scale", -1, "scales are not finite and positive"),
        ("dense.weight_scale", 0, "scales are not finite and positive"),
        ("dense.weight_scale", np.inf, "scales are not finite and positive"),
        ("dense.weight_quantized", 3, "all codes are equal"),
    ],
)
def test_dynamic_int8_is_looked_at_as_closely(
    tmp_path: Path, ending: str, value: float, words: str
) -> None:
    """A scale of a whole column cannot be negative."""
    source = save(make_model(), tmp_path / "source.onnx")
    path = quantize_dynamically(source, tmp_path / "graph.onnx", per_channel=True)

    model = onnx.load(path)
    set_first(ending, value)(model)

    assert [problem for problem in find_faults(save(model, path)) if words in problem]


def change_config(folder: Path, *keys: str, value: Any) -> None:
    path = folder / "onnx" / "genai_config.json"
    config = json.loads(path.read_text())
    place = config
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = value
    path.write_text(json.dumps(config))


CONFIGS: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "layers": (("model", DECODER, "num_hidden_layers"), 3, "names 2 inputs that the graph lacks"),
    "fewer": (("model", DECODER, "num_hidden_layers"), 1, "the graph has 2 inputs that"),
    "heads": (("model", DECODER, "num_key_value_heads"), 4, "says 4 heads of 16, past_key_values"),
    "head size": (("model", DECODER, "head_size"), 8, "says head_size 8, config.json head_dim 16"),
    "hidden": (("model", DECODER, "hidden_size"), 65, "says hidden_size 65, config.json"),
    "vocabulary": (("model", "vocab_size"), 299, "says vocab_size 299, the logits have 300"),
    "no size": (("model", "vocab_size"), "many", "vocab_size is 'many', not a size"),
    "endless": (("model", DECODER, "num_hidden_layers"), 10**7, "more than any decoder has"),
    "graph": (("model", DECODER, "filename"), "other.onnx", "names the graph 'other.onnx'"),
    "output": (
        ("model", DECODER, "outputs", "logits"),
        "x",
        "names 1 outputs that the",
    ),
    "length": (("search", "max_length"), 10**6, "is beyond the context of"),
    "end": (("model", "eos_token_id"), 300, "outside of the vocabulary of 300"),
    "no decoder": (("model", DECODER), 7, "describes no decoder"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_does_not_fit_is_named(output: Path, case: str) -> None:
    """What onnxruntime-genai would go wrong with, or load from elsewhere."""
    keys, value, words = CONFIGS[case]
    change_config(output, *keys, value=value)
    file = open_graph(output / "onnx")
    config = read_genai_config(output / "onnx")
    assert config is not None

    problems = check_genai(file, config, read_json(output / "onnx" / "config.json"))

    assert [problem for problem in problems if words in problem], problems


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("session_options", "custom_ops_library"), "x.so", "names compiled code to be loaded"),
        (("run_options", "ep_plugin"), {"a": 1}, "names compiled code to be loaded"),
        (("pipeline", "filename"), "../x.onnx", "it climbs out of the folder"),
        (("deep",), json.loads("[" * 30 + "]" * 30), "is nested deeper than any configuration"),
    ],
    ids=range(4),
)
def test_a_config_that_names_code_is_refused_before_any_runtime_sees_it(
    output: Path, keys: tuple[str, ...], value: Any, words: str
) -> None:
    """By `inspect`, through which `verify`, `gate` and `compare` go first."""
    change_config(output, "model", DECODER, *keys, value=value)

    with pytest.raises(ArtifactError, match=words):
        quantkit.inspect(output)


def test_a_folder_is_tried_on_the_cpu_whatever_provider_it_asks_for(output: Path) -> None:
    """No other one is loaded for it."""
    providers = [{"cuda": {"device_id": "0"}}]
    change_config(output, "model", DECODER, "session_options", "provider_options", value=providers)

    trial = try_loading(open_graph(output / "onnx"), output / "onnx")

    assert (trial.died, trial.errors["genai"]) == (None, [])


def test_the_hashes_of_the_evidence_are_computed_again(output: Path) -> None:
    """One byte of the weights changed: the layer still decodes, and the hash tells."""
    data = output / "onnx" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)

    problems = quantkit.verify(output).problems

    assert any("'model.onnx.data' is not the one that was written" in each for each in problems)


def test_a_missing_tokenizer_is_a_note(output: Path) -> None:
    """Whoever runs a decoder needs one; a hash of it is missing as well."""
    for file in (output / "onnx").glob("tokenizer*"):
        file.unlink()

    found = verify_artifact(output)

    assert found.notes == ("there is no tokenizer: whoever runs the model needs one",)


def test_a_graph_that_never_ends_loading_is_ended(tmp_path: Path) -> None:
    """After the time that it was given."""
    file = open_graph(save(make_model(), tmp_path / "graph.onnx"))

    trial = try_loading(file, None, seconds=0.05)

    assert trial.died is not None
    assert trial.died[1] == "was not done after 0.05 seconds"
    assert not trial.loads


def test_a_graph_that_asks_for_all_memory_is_a_problem(tmp_path: Path) -> None:
    """A constant of a terabyte is folded in a process of its own."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["big"]),
        helper.make_node("Add", ["big", "one"], ["y"]),
    ]
    tensors = [
        numpy_helper.from_array(np.array([1 << 38], np.int64), "shape"),
        numpy_helper.from_array(np.ones(1, np.float32), "one"),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    path = save(finish(nodes, tensors, [], outputs), tmp_path / "graph.onnx")

    found = check_onnx(open_graph(path))

    assert len(found.problems) <= 1
    assert all("\n" not in problem for problem in found.problems)


def test_the_weights_that_are_compared_are_the_files(made: tuple[Path, Path]) -> None:
    """Kept tensors are the checkpoint's own, decoded ones near."""
    model, output = made
    base = load_file(model / "model.safetensors")
    found = open_graph(output / "onnx").tensors
    stored = next(found[name] for name in found if "embed_tokens" in name)
    expected = base["model.embed_tokens.weight"].float().numpy()
    np.testing.assert_array_equal(read_values(stored), expected)
