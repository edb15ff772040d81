"""Who writes and who reads the values of an ONNX graph, and what its layers are called."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.formats.onnx.container import OnnxGraph
from quantkit.formats.onnx.names import SCOPES
from quantkit.formats.onnx.tensors import OnnxTensor

_ENDINGS = re.compile(
    r"(\.qweight|\.codes|\.stored|\.int[48]|_quantized|_Q\d+G?|_DQ|_quant|[./]MatMul|[./]Gather|[./]Gemm|_Transposed|\.weight)$"
)
_NAMES = (
    (re.compile(r"(?<=\.)attn\.(?=([qkvo]|qkv)_proj$)"), "self_attn."),
    (re.compile(r"layers\.\d+\.final_norm_layernorm$"), "norm"),
)
"""What onnxruntime-genai's builder calls otherwise than transformers does."""
_MADE_UP = re.compile(r"(onnx::.*|val_?\d+|\d+|_.*|.*const.*)")
"""Names that exporters give to transposed weights."""
_ON_THE_WAY = frozenset({"Cast", "Mul", "Reshape", "QuantizeLinear", "DequantizeLinear"})
_BIAS = re.compile(r"(.+)\.bias(_quantized|_DequantizeLinear_Output)?")
FEW = 6
"""Steps from an operator to the codes, the scale or the bias: reshaped, cast, multiplied."""
_MANY = 64
"""Readers of a value that are looked at."""


@dataclass(frozen=True)
class Wiring:
    """Who writes and who reads the values of one graph."""

    graph: OnnxGraph
    writers: Mapping[str, Any]
    readers: Mapping[str, tuple[Any, ...]]

    def follow(self, name: str) -> OnnxTensor | None:
        """The stored tensor that a value is, maybe reshaped."""
        for _ in range(FEW):
            if name in self.graph.tensors:
                return self.graph.tensors[name]
            node = self.writers.get(name)
            if node is None or node.op_type not in ("Reshape", "Identity") or not node.input:
                return None
            name = node.input[0]
        return None

    def read(self, node: Any, position: int | None) -> OnnxTensor | None:
        """The stored tensor at an input of a node."""
        if position is None or position >= len(node.input) or not node.input[position]:
            return None
        return self.follow(node.input[position])


def wire(graph: OnnxGraph) -> Wiring:
    """List who writes and who reads each value."""
    writers: dict[str, Any] = {}
    readers: dict[str, list[Any]] = {}
    for node in graph.nodes:
        for name in node.output:
            writers.setdefault(name, node)
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    return Wiring(graph, writers, {name: tuple(nodes) for name, nodes in readers.items()})


def list_readers(node: Any, wiring: Wiring, through: frozenset[str]) -> Iterator[Any]:
    """Yield the first nodes behind a node, the next ones first, and those behind some operators."""
    pending = list(node.output[:FEW])
    for _ in range(FEW):
        readers = [each for name in pending for each in wiring.readers.get(name, ())[:_MANY]]
        yield from readers
        pending = [name for each in readers if each.op_type in through for name in each.output[:1]]
        pending = pending[:FEW]


def name_layer(node: Any, weight: str, wiring: Wiring) -> str:
    """Return the name of a layer: that of its weight without what exporters add.

    `model.layers.0.attn.q_proj.MatMul.weight_Q4` is model.layers.0.attn.q_proj. Where the weight
    has none, because it was transposed, the module tells it, or the bias that is added, or the
    node.
    """
    name = strip_name(weight)
    if "." in name and not _MADE_UP.fullmatch(name):
        return show(name)
    scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), "")
    parts = re.findall(r"'([^']*)'", scopes[:4096])
    if len(parts) > 1 and "." in parts[-2]:
        return show(parts[-2])
    for reader in list_readers(node, wiring, _ON_THE_WAY):
        if reader.op_type == "Add":
            for factor in reader.input:
                bias = _BIAS.fullmatch(factor)
                if bias is not None:
                    return show(bias[1])
    called = strip_name(node.name.strip("/").replace("/", "."))
    return show(called if "." in called else name)


def strip_name(name: str) -> str:
    """Return the checkpoint's name of a module or a tensor without its `.weight`."""
    for _ in range(FEW):
        shorter = _ENDINGS.sub("", name)
        if shorter == name or not shorter:
            break
        name = shorter
    for pattern, words in _NAMES:
        name = pattern.sub(words, name)
    return name


def show(text: str) -> str:
    """Return the beginning of a text, without what could move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:200])
