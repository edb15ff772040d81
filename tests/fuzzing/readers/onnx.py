"""ONNX graphs: protobuf, external data, operators that read codes, genai_config.json.

All that `inspect`, `verify`, `convert` and the gate do with a graph in this process; what ONNX
Runtime makes of it is tried in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import quantkit
from quantkit.errors import ArtifactError
from quantkit.formats.onnx.container import open_graph
from quantkit.formats.onnx.decoding import decode_layer
from quantkit.formats.onnx.genai import check_genai, read_genai_config
from quantkit.formats.onnx.inspection import find_config
from quantkit.formats.onnx.operators import find_layers
from quantkit.formats.onnx.ordering import check_order
from quantkit.formats.onnx.stored_numbers import check_numbers
from quantkit.formats.onnx.tensors import read_values
from tests.fuzzing.damage import BYTES, set_number
from tests.fuzzing.reader import Reader
from tests.fuzzing.trees import damage_json

_NUMBERS = (0, 1, -1, 2, 3, 7, 8, 9, 16, 31, 128, 2**20, 2**31, 2**31 - 1, 2**40, 2**62, -(2**63))
_OPERATORS = (
    *("MatMulNBits", "GatherBlockQuantized", "QMoE", "DequantizeLinear", "Gather", "MatMulInteger"),
    *("ConvInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QAttention", "QGemm"),
    *("QLinearMatMul", "QLinearConv", "Constant", "Mul", "Cast", "Reshape", "If", "Identity", ""),
)
_LOCATIONS = ("../data", "/etc/passwd", "", "data", "absent", ".", "model.onnx", "x" * 5000)
_LENGTHS = ("0", "-1", "4096", str(2**63), "9" * 18, "9" * 5000, "1e3", "", " 7", "٣")


def _build(folder: Path) -> None:
    from tests.formats.onnx.graphs import make_model, quantize_blocks, quantize_dynamically, save

    def place(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name / "model.onnx"

    save(make_model(), place("inside"))
    save(make_model(), place("outside"), external="data")
    quantize_blocks(make_model(), place("blocks"))
    quantize_dynamically(folder / "inside" / "model.onnx", place("dynamic"))
    save(_make_decoder(), place("decoder"))
    (folder / "decoder" / "genai_config.json").write_text(json.dumps(_GENAI))


_GENAI = {
    "model": {
        "context_length": 64,
        "vocab_size": 50,
        "eos_token_id": [1, 2],
        "decoder": {
            "filename": "model.onnx",
            "hidden_size": 8,
            "head_size": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 1,
            "inputs": {
                "input_ids": "input_ids",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {"logits": "logits"},
        },
    },
    "search": {"max_length": 64},
}


def _make_decoder() -> Any:
    """A graph with the inputs of a decoder, a subgraph, a function and a sparse tensor."""
    from onnx import TensorProto, helper

    kinds: list[tuple[str, int, list[str | int]]] = [("input_ids", TensorProto.INT64, ["b", "t"])]
    kinds += [(f"past_key_values.0.{part}", 1, ["b", 1, "p", 4]) for part in ("key", "value")]
    inputs = [helper.make_tensor_value_info(*kind) for kind in kinds]
    weight = helper.make_tensor("table", TensorProto.FLOAT, [50, 4], [0.5] * 200)
    body = helper.make_graph(
        [helper.make_node("Identity", ["rows"], ["same"])],
        "body",
        [],
        [helper.make_tensor_value_info("same", 1, None)],
        [helper.make_tensor("inner", TensorProto.INT8, [4], [1, 2, 3, 4])],
    )
    test = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("If", ["yes"], ["logits"], then_branch=body, else_branch=body),
        helper.make_node("Constant", [], ["unused"], value=weight),
    ]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("logits", 1, None)], [weight, test]
    )
    sparse = graph.sparse_initializer.add()
    sparse.values.CopyFrom(helper.make_tensor("sparse", TensorProto.FLOAT, [2], [1.0, 2.0]))
    sparse.indices.CopyFrom(helper.make_tensor("", TensorProto.INT64, [2], [0, 3]))
    sparse.dims[:] = [8]
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _read(folder: Path) -> object:
    found = quantkit.inspect(folder)
    file = open_graph(folder)
    layers = find_layers(file).layers
    problems = [*check_order(file), *check_numbers(file, layers)]
    config, beside = read_genai_config(folder), find_config(file.path, problems)
    if config is not None:
        problems += check_genai(file, config, beside)
    for layer in layers:
        with contextlib.suppress(ArtifactError):
            decode_layer(layer)
    for tensor in file.tensors.values():
        if tensor.kind.name != "STRING":
            read_values(tensor)
    return found, problems


def _damage_graph(draw: random.Random, content: bytes) -> bytes:
    """Do one thing to a tensor, a node, or the graph, which is written again."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx import ModelProto

    model = ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        return content
    tensors = list(_list_tensors(model.graph))
    nodes = list(model.graph.node)
    kind = draw.randrange(4)
    if kind < 2 and tensors:
        _damage_tensor(draw, draw.choice(tensors))
    elif kind == 2 and nodes:
        _damage_node(draw, draw.choice(nodes), nodes)
    else:
        _damage_whole(draw, model)
    return bytes(model.SerializeToString())


def _list_tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            for body in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _list_tensors(body)


def _damage_tensor(draw: random.Random, tensor: Any) -> None:
    kind = draw.randrange(7)
    if kind == 0 and tensor.dims:
        tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice(_NUMBERS)
    elif kind == 1:
        tensor.dims[:] = draw.choice(([], [0], [0, 2**62], [1] * 40, [-1, 4], [2**31, 2**31]))
    elif kind == 2:
        tensor.data_type = draw.choice((*range(-1, 28), 2**31 - 1))
    elif kind == 3:
        tensor.raw_data = draw.choice((b"", b"\0", tensor.raw_data[:-1], tensor.raw_data * 2))
    elif kind == 4:
        _fill(draw, tensor)
    elif kind == 5:
        tensor.name = draw.choice(("", "x" * 2000, "\0", "a/../b", "\x1b[2J", "table"))
    else:
        _put_outside(draw, tensor)


def _fill(draw: random.Random, tensor: Any) -> None:
    """Give the values in a field that is made for another type, as many as there should be."""
    count = 1
    for size in tensor.dims:
        count = min(5000, count * max(0, size))
    tensor.ClearField("raw_data")
    for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        tensor.ClearField(field)
    field = draw.choice(("float_data", "int32_data", "int64_data", "double_data", "uint64_data"))
    value = draw.choice((0, 1, 255, 2**31 - 1)) if draw.random() < 0.7 else draw.choice((-1, 300))
    with contextlib.suppress(ValueError):
        getattr(tensor, field).extend([value] * count)
    if draw.random() < 0.5:
        tensor.data_type = draw.choice(range(1, 27))


def _put_outside(draw: random.Random, tensor: Any) -> None:
    tensor.data_location = 1
    del tensor.external_data[:]
    for key, values in (("location", _LOCATIONS), ("offset", _LENGTHS), ("length", _LENGTHS)):
        if draw.random() < 0.8:
            entry = tensor.external_data.add()
            entry.key, entry.value = key, draw.choice(values)


def _damage_node(draw: random.Random, node: Any, nodes: list[Any]) -> None:
    kind = draw.randrange(5)
    if kind == 0:
        node.op_type = draw.choice(_OPERATORS)
    elif kind == 1 and node.attribute:
        draw.choice(node.attribute).i = draw.choice(_NUMBERS)
    elif kind == 2:
        attribute = node.attribute.add()
        attribute.name = draw.choice(("bits", "block_size", "N", "K", "quantize_axis", "transB"))
        attribute.type, attribute.i = 2, draw.choice(_NUMBERS)
    elif kind == 3:
        # A circle, or an input that is read in another place.
        names = [name for each in nodes for name in (*each.input, *each.output)]
        (node.input if draw.random() < 0.7 else node.output).append(draw.choice(names))
    elif node.input:
        node.input[:] = node.input[: draw.randrange(len(node.input))]


def _damage_whole(draw: random.Random, model: Any) -> None:
    graph, kind = model.graph, draw.randrange(6)
    if kind == 0:
        for _ in range(draw.choice((1, 17, 30, 98, 200))):
            outer = type(graph)()
            outer.node.add(op_type="If").attribute.add(name="then_branch", type=5).g.CopyFrom(graph)
            graph.CopyFrom(outer)
    elif kind == 1 and graph.node:
        del graph.node[draw.randrange(len(graph.node))]
    elif kind == 2 and graph.initializer:
        graph.initializer.add().CopyFrom(draw.choice(graph.initializer))
    elif kind == 3:
        function = model.functions.add(name="f" * draw.choice((0, 1, 5000)), domain="d")
        function.node.extend(graph.node)
    elif kind == 4:
        model.metadata_props.add(key="k" * 3000, value="\x1b" * draw.choice((0, 10_000)))
        model.producer_name = "\u202e" * 500
    else:
        model.training_info.add() if draw.random() < 0.3 else model.ClearField("graph")


def _edit(draw: random.Random, folder: Path) -> None:
    """Lose the data file, cut it, or put something else in its place."""
    data = folder / "data"
    if not data.is_file():
        (folder / "model.onnx").rename(folder / draw.choice(("other.onnx", "model.onnx_data")))
        return
    kind = draw.randrange(4)
    if kind == 0:
        os.truncate(data, draw.randrange(data.stat().st_size))
    else:
        os.remove(data)
    if kind == 1:
        data.symlink_to(draw.choice(("/etc/passwd", "/dev/zero", data, "model.onnx")))
    elif kind == 2:
        draw.choice((data.mkdir, lambda: os.mkfifo(data)))()


READERS = (
    Reader(
        name="onnx",
        build=_build,
        damages={
            "model.onnx": (*[_damage_graph] * 6, set_number(within=4000, widths=(1, 2)), *BYTES),
            "data": (set_number(within=4096, widths=(1, 4)), *BYTES),
            "genai_config.json": (damage_json, damage_json, *BYTES),
        },
        read=_read,
        edit=_edit,
    ),
)
