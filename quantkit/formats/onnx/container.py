"""Opening an ONNX file without its weights, and without trusting it.

Protobuf parses what `wire.py` has measured; data files are looked at through their sizes alone.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantkit.errors import ArtifactError, unreadable
from quantkit.formats.onnx.names import GRAPH
from quantkit.formats.onnx.packages import READING, require_onnx
from quantkit.formats.onnx.tensors import OnnxTensor, check_tensor
from quantkit.formats.onnx.wire import check_structure
from quantkit.schemes import ONNX

_MAX_DEPTH = 16
"""Of graphs within graphs."""
_MAX_NAME = 1024


@dataclass(frozen=True)
class OnnxGraph:
    """One graph: the main one, the body of an If or a Loop, or that of a function."""

    place: str
    """Empty for the main one."""
    nodes: Sequence[Any] = field(repr=False)
    """onnx.NodeProto, in their order."""
    tensors: Mapping[str, OnnxTensor] = field(repr=False)
    """What its nodes can read by name: initializers and constants, its own and those of the graphs
    around it."""


@dataclass(frozen=True)
class OnnxFile:
    """An opened file whose tensors are known to be where it says."""

    path: Path
    model: Any = field(repr=False)
    """onnx.ModelProto, without external data."""
    graphs: tuple[OnnxGraph, ...]
    """The main one first."""
    tensors: Mapping[str, OnnxTensor] = field(repr=False)
    """Every tensor that is stored; those of inner graphs by their place and name."""

    @property
    def main(self) -> OnnxGraph:
        """The graph that a runtime calls."""
        return self.graphs[0]

    @property
    def data_files(self) -> tuple[Path, ...]:
        """Files beside that hold tensors."""
        found = {tensor.file for tensor in self.tensors.values() if tensor.file is not None}
        return tuple(sorted(found))


def open_graph(path: Path) -> OnnxFile:
    """Open a graph; its weights are not read.

    Args:
        path: an ONNX file, or a folder with model.onnx, one .onnx, or one in onnx/.

    Raises:
        ArtifactError: there is none, it is damaged, or names data outside of its folder.
        MissingPackageError: a package that reads graphs is not there.
    """
    file = find_graph(path)
    require_onnx(READING)
    model = _parse(file)
    if not model.HasField("graph"):
        raise ArtifactError(f"{file} has no graph: it is no ONNX file")
    if model.training_info:
        raise ArtifactError(f"{file} holds graphs for training, which are not read")
    graphs: list[OnnxGraph] = []
    tensors: dict[str, OnnxTensor] = {}
    _collect(model.graph, "", ChainMap(), file, graphs, tensors)
    for function in model.functions:
        place = f"function {_shorten(function.domain)}.{_shorten(function.name)}"
        _collect(function, place, ChainMap(), file, graphs, tensors)
    return OnnxFile(file, model, tuple(graphs), MappingProxyType(tensors))


def find_graph(path: Path) -> Path:
    """Return the ONNX file that is meant by a file or a folder.

    Raises:
        ArtifactError: there is none, or there are several.
    """
    if not path.exists():
        raise ArtifactError(f"there is no artifact at {path}")
    if not path.is_dir():
        if not path.is_file():
            raise ArtifactError(f"{path} is not a file")
        return path
    files = list_graphs(path)
    if len(files) > 1:
        names = ", ".join(file.relative_to(path).as_posix() for file in files[:8])
        raise ArtifactError(f"{path} holds {len(files)} ONNX files: name one of {names}")
    if not files:
        raise ArtifactError(f"{path} holds no ONNX file")
    return files[0]


def list_graphs(folder: Path) -> list[Path]:
    """Return the ONNX files that a folder may mean: model.onnx alone, where it is there.

    They lie in the folder, or in its `onnx`, where an output of several graphs has a folder each.
    """
    for place in (folder, folder / ONNX):
        if (place / GRAPH).is_file():
            return [place / GRAPH]
        files = [file for file in sorted(place.glob("*.onnx")) if file.is_file()]
        if place.name == ONNX:
            files = files or sorted(place.glob(f"*/{GRAPH}"))
        if files:
            return files
    return []


def _parse(file: Path) -> Any:
    """Parse a file that is small enough.

    Raises:
        ArtifactError: it is damaged.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx import ModelProto

    try:
        check_structure(file)
        model = ModelProto()
        model.ParseFromString(file.read_bytes())
    except OSError as error:
        raise unreadable(file, error, ArtifactError) from error
    except (DecodeError, RecursionError):
        raise ArtifactError(f"{file} is no ONNX file: protobuf cannot read it") from None
    return model


def _collect(
    graph: Any,
    place: str,
    outer: ChainMap[str, OnnxTensor],
    file: Path,
    graphs: list[OnnxGraph],
    tensors: dict[str, OnnxTensor],
    depth: int = 0,
) -> None:
    """Add a graph, the graphs within it, and all their tensors.

    Raises:
        ArtifactError: a tensor that cannot be, a name that is given twice, too many levels.
    """
    if depth > _MAX_DEPTH:
        raise ArtifactError(f"{file} has graphs within graphs beyond {_MAX_DEPTH} levels")
    own: dict[str, OnnxTensor] = {}
    prefix = f"{place}/" if place else ""
    for name, proto in _list_tensors(graph):
        shown = _check_name(name, file)
        if name in own:
            raise ArtifactError(f"{file}: tensor {shown} is given twice")
        own[name] = check_tensor(proto, f"{prefix}{shown}", file)
    visible = outer.new_child(own)
    graphs.append(OnnxGraph(place, graph.node, visible))
    tensors.update({f"{prefix}{name}": tensor for name, tensor in own.items()})
    for number, node in enumerate(graph.node):
        called = _shorten(node.name) or f"{_shorten(node.op_type)}_{number}"
        for attribute in node.attribute:
            inner = f"{prefix}{called}.{_shorten(attribute.name)}"
            for index, body in enumerate((*_one(attribute, "g"), *attribute.graphs)):
                where = f"{inner}.{index}" if index else inner
                _collect(body, where, visible, file, graphs, tensors, depth + 1)
            for index, proto in enumerate(_other_tensors(node, attribute)):
                name = f"{inner}.{index}"
                tensors[name] = check_tensor(proto, name, file)


def _list_tensors(graph: Any) -> Iterator[tuple[str, Any]]:
    """Yield what nodes can read by name: initializers and constants."""
    # A function has neither initializers nor sparse ones.
    for proto in getattr(graph, "initializer", ()):
        yield proto.name, proto
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield sparse.values.name, sparse.values
        yield f"{sparse.values.name}.indices", sparse.indices
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and node.output:
            for attribute in node.attribute:
                if attribute.name == "value" and attribute.HasField("t"):
                    yield node.output[0], attribute.t


def _other_tensors(node: Any, attribute: Any) -> Iterator[Any]:
    """Yield the tensors of an attribute that no name leads to."""
    constant = node.op_type == "Constant" and attribute.name == "value" and node.output
    if attribute.HasField("t") and not (constant and node.domain in ("", "ai.onnx")):
        yield attribute.t
    yield from attribute.tensors
    for sparse in (*_one(attribute, "sparse_tensor"), *attribute.sparse_tensors):
        yield sparse.values
        yield sparse.indices


def _one(attribute: Any, name: str) -> tuple[Any, ...]:
    return (getattr(attribute, name),) if attribute.HasField(name) else ()


def _check_name(name: str, file: Path) -> str:
    """Return a name that can be shown.

    Raises:
        ArtifactError: it is empty or longer than any.
    """
    if not name or len(name) > _MAX_NAME:
        raise ArtifactError(
            f"{file} has a tensor whose name is {'empty' if not name else 'endless'}"
        )
    return _shorten(name, _MAX_NAME)


def _shorten(text: str, length: int = 200) -> str:
    """Return the beginning of a text without what could move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:length])
