"""Damaged and hostile ONNX files: one line each, at once, and no byte from elsewhere."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantkit.errors import ArtifactError
from quantkit.formats.onnx.container import open_graph
from quantkit.formats.onnx.decoding import decode_layer
from quantkit.formats.onnx.element_types import DATA_TYPES
from quantkit.formats.onnx.inspection import inspect_onnx
from quantkit.formats.onnx.operators import find_layers
from quantkit.formats.onnx.ordering import check_order
from quantkit.formats.onnx.stored_numbers import check_numbers
from quantkit.formats.onnx.tensors import (
    check_tensor,
    iterate_values,
    read_flat,
    read_values,
    unpack_bits,
)
from quantkit.formats.onnx.wire import MAX_STRUCTURE
from tests.formats.gguf.damage import try_all
from tests.formats.onnx.graphs import (
    LAYER,
    finish,
    make_model,
    make_weights,
    quantize_blocks,
    quantize_dynamically,
    quantize_statically,
    save,
)

WEIGHT = f"{LAYER}.weight"


def tensor_of(model: Any, name: str = WEIGHT) -> Any:
    return next(each for each in model.graph.initializer if each.name == name)


def set_external(model: Any, key: str, value: str) -> None:
    """Change an entry of where WEIGHT lies, or take it away."""
    tensor = tensor_of(model)
    kept = [(e.key, e.value) for e in tensor.external_data if e.key != key]
    del tensor.external_data[:]
    for name, content in [*kept, *([(key, value)] if value else [])]:
        tensor.external_data.add(key=name, value=content)


def set_dims(*dims: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        del tensor_of(model).dims[:]
        tensor_of(model).dims.extend(dims)

    return change


def nest(model: Any) -> None:
    """Bodies within bodies."""
    graph = helper.make_graph([helper.make_node("Identity", ["out"], ["x"])], "g", [], [])
    for _ in range(20):
        inner = helper.make_node("If", ["c"], ["x"], then_branch=graph, else_branch=graph)
        del inner.attribute[1]
        graph = helper.make_graph([inner], "g", [], [])
    model.graph.node.append(graph.node[0])


def escape_within(model: Any) -> None:
    """A tensor of a constant of a body lies outside."""
    tensor = TensorProto(name="t", data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="/etc/passwd")
    body = helper.make_graph([helper.make_node("Constant", [], ["y"], value=tensor)], "g", [], [])
    node = helper.make_node("If", ["c"], ["x"], "choice", then_branch=body, else_branch=body)
    model.graph.node.append(node)


INSIDE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "negative": (set_dims(-1, 96), "[-1, 96]: no dimension can be negative"),
    "huge": (set_dims(1 << 60, 1 << 60), "which no file can hold"),
    "zero times huge": (set_dims(0, 1 << 62), "which no file can hold"),
    "too large": (set_dims(64, 97), "has 24576 bytes, its type and shape take 24832"),
    "too small": (set_dims(64), "has 24576 bytes, its type and shape take 256"),
    "many": (set_dims(*[1] * 33), "has 33 dimensions"),
    "type": (lambda m: setattr(tensor_of(m), "data_type", 99), "has the type 99"),
    "no type": (lambda m: setattr(tensor_of(m), "data_type", 0), "has the type 0"),
    "twice": (lambda m: m.graph.initializer.append(tensor_of(m)), f"{WEIGHT} is given twice"),
    "no name": (lambda m: setattr(tensor_of(m), "name", ""), "whose name is empty"),
    "long name": (lambda m: setattr(tensor_of(m), "name", "n" * 2000), "whose name is endless"),
    "no values": (lambda m: tensor_of(m).ClearField("raw_data"), "has 0 values"),
    "segment": (lambda m: tensor_of(m).segment.SetInParent(), "is cut into segments"),
    "no graph": (lambda m: m.ClearField("graph"), "has no graph: it is no ONNX file"),
    "training": (lambda m: m.training_info.add(), "graphs for training"),
    "nested": (nest, "graphs within graphs beyond 16 levels"),
    "in a body": (escape_within, "'/etc/passwd', which is refused: it is absolute"),
}


@pytest.mark.parametrize("case", INSIDE)
def test_what_cannot_be_is_named_in_one_line(tmp_path: Path, case: str) -> None:
    """The line names the file, the tensor and what is wrong with it."""
    change, words = INSIDE[case]
    model = make_model()
    change(model)

    check_refused(save(model, tmp_path / "model.onnx"), words)


def check_refused(path: Path, words: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        open_graph(path)

    assert words in str(caught.value)
    assert str(path.parent) in str(caught.value)
    assert "\n" not in str(caught.value)


OUTSIDE: dict[str, tuple[str, str, str]] = {
    "absolute": ("location", "/etc/passwd", "it is absolute"),
    "climbing": ("location", "../secret", "it climbs out of the folder"),
    "climbing within": ("location", "a/../../secret", "it climbs out of the folder"),
    "backslash": ("location", "..\\secret", "holds a NUL or a backslash"),
    "drive": ("location", "C:secret", "it is absolute"),
    "device": ("location", "con", "a reserved device name"),
    "link": ("location", "link", "outside of the checkpoint"),
    "folder": ("location", "folder", "lies in folder, which is missing"),
    "pipe": ("location", "pipe", "is a pipe, a socket or a device"),
    "missing": ("location", "absent", "lies in absent, which is missing"),
    "memory": ("location", "*/_ORT_MEM_ADDR_/*", "which is missing"),
    "nowhere": ("location", "", "in a data file that is not named"),
    "offset beyond": ("offset", "999999", "ends at byte 1024575 of data, which has"),
    "offset huge": ("offset", "9" * 400, "is no number of bytes"),
    "offset negative": ("offset", "-1", "the offset '-1' is no number of bytes"),
    "offset text": ("offset", "0x10", "the offset '0x10' is no number of bytes"),
    "length short": ("length", "4", "has 4 bytes in data, its type and shape take 24576"),
    "length long": ("length", "24580", "has 24580 bytes in data"),
    "length of all": ("length", str(1 << 62), "its type and shape take 24576"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_data_files_are_inside_of_the_folder_and_long_enough(tmp_path: Path, case: str) -> None:
    """Wherever a name leads, nothing outside is opened, and no length is believed."""
    key, value, words = OUTSIDE[case]
    (tmp_path / "secret").write_bytes(bytes(1 << 17))
    folder = tmp_path / "folder"
    (folder / "folder").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "pipe")
    path = save(make_model(), folder / "model.onnx", external="data")
    model = onnx.load(path, load_external_data=False)
    set_external(model, key, value)
    path.write_bytes(model.SerializeToString())

    check_refused(path, words)


def test_an_entry_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    """Readers would differ in which one they take."""
    path = save(make_model(), tmp_path / "model.onnx", external="data")
    model = onnx.load(path, load_external_data=False)
    tensor_of(model).external_data.add(key="offset", value="0")
    path.write_bytes(model.SerializeToString())

    check_refused(path, "'offset' of its data file is given twice")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"hello, world", "is cut short, or no ONNX file"),
        (b"\x08\x0a" + b"\x3a\xff\xff\xff\xff\x0f", "is cut short, or no ONNX file"),
        (b"\x3a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", "is cut short, or no ONNX file"),
        (b"\x0b" * 100, "is cut short, or no ONNX file"),
        (b"\x3a\x02\x0a\x05", "is cut short, or no ONNX file"),
        (b"\x08\x0a", "has no graph"),
    ],
    ids=range(7),
)
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    """Text, lengths beyond the file, endless numbers, groups, and a model of nothing."""
    path = tmp_path / "model.onnx"
    path.write_bytes(content)

    check_refused(path, words)


def test_every_truncation_is_refused_or_a_smaller_model(tmp_path: Path) -> None:
    """Cutting never ends in anything but the one line."""
    sound = save(make_model(), tmp_path / "sound.onnx").read_bytes()
    path = tmp_path / "model.onnx"
    for length in (*range(1, 300), *range(300, len(sound), 997)):
        path.write_bytes(sound[:length])
        with pytest.raises(ArtifactError):
            open_graph(path)


def test_a_small_file_cannot_ask_for_all_memory(tmp_path: Path) -> None:
    """Empty nodes of two bytes each would become objects of a hundred."""
    path = tmp_path / "model.onnx"
    nodes = b"\x0a\x00" * (1 << 21)
    path.write_bytes(b"\x3a" + varint(len(nodes)) + nodes)
    check_refused(path, "has more than 1048576 nodes and tensors")

    text = b"\x32" + varint(MAX_STRUCTURE) + bytes(MAX_STRUCTURE)
    path.write_bytes(text + b"\x3a\x00")
    check_refused(path, "besides its tensors")


def varint(value: int) -> bytes:
    digits = []
    while value >= 128:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def test_a_file_beyond_what_protobuf_reads_is_refused(tmp_path: Path) -> None:
    """By its size alone: a sparse file of a terabyte is not read."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x0a")
    os.truncate(path, 1 << 40)

    check_refused(path, "protobuf reads 2147483647 at the most")


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    """A missing file, an empty folder, several files, and a pipe."""
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "empty").mkdir()
    for path, words in (
        (tmp_path / "absent.onnx", "there is no artifact at"),
        (tmp_path / "empty", "holds no ONNX file"),
        (tmp_path / "pipe.onnx", "is not a file"),
    ):
        with pytest.raises(ArtifactError, match=words):
            open_graph(path)
    for name in ("a", "b"):
        save(make_model(), tmp_path / "empty" / f"{name}.onnx")
    with pytest.raises(ArtifactError, match=r"holds 2 ONNX files: name one of a\.onnx, b\.onnx"):
        open_graph(tmp_path / "empty")


@pytest.mark.parametrize("place", ["model.onnx", "encoder.onnx", "onnx/model.onnx"])
def test_a_folder_is_opened_by_what_is_in_it(tmp_path: Path, place: str) -> None:
    """model.onnx, the only one there is, or one in onnx/."""
    (tmp_path / "onnx").mkdir()
    path = save(make_model(), tmp_path / place)

    assert open_graph(tmp_path).path == path


@pytest.mark.parametrize("external", [None, "data"])
def test_values_are_those_that_were_written(tmp_path: Path, external: str | None) -> None:
    """In the graph or beside it, as a whole and in pieces."""
    path = save(make_model(), tmp_path / "model.onnx", external=external)

    found = open_graph(path)

    assert [file.name for file in found.data_files] == ([external] if external else [])
    for name, array in make_weights().items():
        np.testing.assert_array_equal(read_values(found.tensors[name]), array)
    pieces = list(iterate_values(found.tensors[WEIGHT], step=1000))
    np.testing.assert_array_equal(np.concatenate(pieces), make_weights()[WEIGHT].ravel())


@pytest.mark.parametrize("name", [kind.name for kind in DATA_TYPES.values()])
@pytest.mark.parametrize("raw", [True, False])
def test_every_type_reads_as_onnx_reads_it(name: str, raw: bool) -> None:
    """Packed or not, raw or in numbers; an odd count leaves half a byte."""
    number = TensorProto.DataType.Value(name)
    values = [0, 1, 1, 0, 1]
    if name == "STRING":
        tensor = helper.make_tensor("t", number, [5], [b"a"] * 5)
        assert check_tensor(tensor, "t", Path("x")).size == 5
        return
    tensor = helper.make_tensor("t", number, [5], values)
    if raw:
        tensor = numpy_helper.from_array(numpy_helper.to_array(tensor), "t")
    checked = check_tensor(tensor, "t", Path("x"))

    found = read_values(checked)

    expected = numpy_helper.to_array(tensor)
    np.testing.assert_array_equal(found.astype(complex), expected.astype(complex))
    assert found.dtype.kind in "iufbc"
    np.testing.assert_array_equal(read_flat(checked, 0, 2), found[:2])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_codes_of_any_width_unpack_from_the_low_bits(bits: int, signed: bool) -> None:
    """As a number that is shifted out bit by bit."""
    data = np.random.default_rng(bits).integers(0, 256, (3, bits * 2), np.uint8)

    found = unpack_bits(data, bits, signed=signed)

    half = 1 << (bits - 1)
    for row, codes in zip(data, found, strict=True):
        number = int.from_bytes(row.tobytes(), "little")
        expected = [number >> (bits * index) & ((1 << bits) - 1) for index in range(16)]
        if signed:
            expected = [(code ^ half) - half for code in expected]
        assert codes.tolist() == expected


def test_random_damage_is_refused_or_read_within_seconds(tmp_path: Path) -> None:
    """Whatever is accepted can be inspected and read to the last value."""

    def read(path: Path) -> None:
        started = time.monotonic()
        file = open_graph(path)
        for tensor in file.tensors.values():
            if tensor.kind.name != "STRING":
                read_values(tensor)
        layers = find_layers(file).layers
        for layer in layers:
            with contextlib.suppress(ArtifactError):
                decode_layer(layer)
        assert all(isinstance(line, str) for line in check_numbers(file, layers))
        assert all(isinstance(line, str) for line in check_order(file))
        inspect_onnx(path)
        assert time.monotonic() - started < 5

    source = save(make_model(), tmp_path / "source.onnx")
    makers = (
        quantize_blocks(make_model(), tmp_path / "sound.onnx"),
        quantize_dynamically(source, tmp_path / "dynamic.onnx", per_channel=True),
        quantize_statically(source, tmp_path / "static.onnx", "QDQ"),
        quantize_statically(source, tmp_path / "operators.onnx", "QOperator"),
    )
    for path in makers:
        try_all(tmp_path / "model.onnx", path.read_bytes(), path.stat().st_size, read, 150)
    model = onnx.load(tmp_path / "sound.onnx")
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = 1
        tensor.external_data.add(key="location", value="sound.onnx")
    header = model.SerializeToString()
    try_all(tmp_path / "model.onnx", header, len(header), read, 600)


def test_a_body_sees_the_tensors_around_it(tmp_path: Path) -> None:
    """And its own tensors have its place in their names."""
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "body",
        [],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(np.ones(3, np.float32), "own")],
    )
    node = helper.make_node("If", ["c"], ["z"], "choice", then_branch=body, else_branch=body)
    tensors = [numpy_helper.from_array(np.ones((2, 2), np.float32), "w")]

    found = open_graph(save(finish([node], tensors, [], []), tmp_path / "model.onnx"))

    assert [graph.place for graph in found.graphs] == [
        "",
        "choice.else_branch",
        "choice.then_branch",
    ]
    assert found.tensors.keys() == {"w", "choice.then_branch/own", "choice.else_branch/own"}
    assert found.graphs[1].tensors["w"] is found.tensors["w"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x0a" + varint(800) + b"\x2a\x00" * 400, "nodes and tensors"),
        (b"\x2a" + varint(65540) + b"\x3a" + varint(1 << 16) + b"\x01" * (1 << 16), "256 MB"),
    ],
    ids=["empty attributes", "numbers of a byte"],
)
def test_small_parts_cannot_ask_for_all_memory(tmp_path: Path, content: bytes, words: str) -> None:
    """What is below a kilobyte in the file may be a hundred of them as objects."""
    path = tmp_path / "model.onnx"
    graph = content * (1 + (40 << 20) // len(content))
    path.write_bytes(b"\x3a" + varint(len(graph)) + graph)

    check_refused(path, words)


def test_a_block_beyond_its_row_is_no_larger_than_it(tmp_path: Path) -> None:
    """A scale is repeated for the columns that there are, not for a million of each block."""
    codes = helper.make_tensor("table.weight", TensorProto.UINT8, [64, 2], bytes(128), raw=True)
    scales = helper.make_tensor("scales", TensorProto.FLOAT, [64, 1], [0.5] * 64)
    node = helper.make_node(
        "GatherBlockQuantized",
        ["table.weight", "ids", "scales"],
        ["rows"],
        domain="com.microsoft",
        block_size=1 << 20,
    )
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", 4])
    save(finish([node], [codes, scales], [ids], [rows]), tmp_path / "model.onnx")

    (layer,) = find_layers(open_graph(tmp_path)).layers

    assert decode_layer(layer).shape == (64, 4)
