"""Linear layers of an encoder's float graph -> INT8.

Dynamic layers round their input as the graph runs: DynamicQuantizeLinear (behind a Clip where
calibration bounded the input) once for all layers that read it, then MatMulInteger, whose sums a
cast and a product with both scales bring back to float. ONNX Runtime joins these nodes into one
kernel (MatMulIntegerToFloat). Static layers have a
QuantizeLinear and DequantizeLinear around their input and a DequantizeLinear behind their codes,
which other runtimes and compilers look for as well.

Letters of shapes: O output features, I input features.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quantkit.errors import ArtifactError
from quantkit.formats.onnx.names import SCOPES
from quantkit.records.encoders import EncoderLayer

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class _Linear:
    """Where a linear layer is in the graph: its product, what it reads, and what it becomes."""

    node: ir.Node
    source: ir.Value
    output: ir.Value
    """With the bias."""
    bias: ir.Value | None


def quantize_layers(model: ir.Model, layers: tuple[EncoderLayer, ...]) -> None:
    """Put the codes of `layers` in the place of their weights, in place.

    Raises:
        ArtifactError: a layer is not in the graph, or not as one product.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    found = find_linears(model)
    missing = [layer.name for layer in layers if layer.name not in found]
    if missing:
        raise ArtifactError(
            f"the exported graph has no product for {len(missing)} of {len(layers)} layers, for "
            f"instance {missing[0]}"
        )
    rounded: dict[tuple[str, str], _Rounded] = {}
    for layer in layers:
        linear = found[layer.name]
        key = (layer.group, str(linear.source.name))
        if key not in rounded:
            rounded[key] = _round_input(model, linear.source, layer)
        _replace(model, linear, layer, rounded[key])
    RemoveUnusedNodesPass()(model)
    model.graph.sort()


def find_linears(model: ir.Model) -> dict[str, _Linear]:
    """Return name of a module -> its product with a constant weight; one that has two is left
    out."""
    found: dict[str, _Linear] = {}
    twice = set()
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm") or node.domain:
            continue
        weight = node.inputs[1]
        scopes = find_scopes(node)
        if weight is None or weight.const_value is None or len(scopes) < 2:
            continue
        name = scopes[-2]
        if name in found:
            twice.add(name)
        found[name] = _find_bias(node)
    return {name: linear for name, linear in found.items() if name not in twice}


def find_scopes(node: ir.Node) -> list[str]:
    """Return the names of the modules that a node comes from, then that of its operation."""
    text = node.metadata_props.get(SCOPES, "[]")
    return [str(each) for each in ast.literal_eval(text)]


def _find_bias(node: ir.Node) -> _Linear:
    source, output = node.inputs[0], node.outputs[0]
    if source is None:
        raise ValueError(f"{node.name} has no input")
    if node.op_type == "Gemm":
        return _Linear(node, source, output, node.inputs[2] if len(node.inputs) > 2 else None)
    uses = [use.node for use in output.uses()]
    if len(uses) == 1 and uses[0].op_type == "Add" and find_scopes(uses[0]) == find_scopes(node):
        others = [value for value in uses[0].inputs if value is not output]
        if len(others) == 1 and others[0] is not None and others[0].const_value is not None:
            return _Linear(node, source, uses[0].outputs[0], others[0])
    return _Linear(node, source, output, None)


@dataclass(frozen=True)
class _Rounded:
    """The rounded input of a group. Static: `values` are float; dynamic: uint8, with its scale."""

    values: ir.Value
    scale: ir.Value | None
    zero_point: ir.Value | None


def _round_input(model: ir.Model, source: ir.Value, layer: EncoderLayer) -> _Rounded:
    import onnx_ir as ir

    tape = ir.tape.Tape(model.graph)
    name = layer.group
    if layer.smoothing is not None:
        reciprocal = (1.0 / layer.smoothing.double()).float().numpy()
        source = tape.op("Mul", [source, add_constant(model, f"{name}.smoothing", reciprocal)])
    if layer.input_scale is None or layer.input_zero_point is None:
        if layer.clip is not None:
            ends = (np.array(end, np.float32) for end in layer.clip)
            low, high = (
                add_constant(model, f"{name}.{which}", end)
                for which, end in zip(("lowest", "highest"), ends, strict=True)
            )
            source = tape.op("Clip", [source, low, high])
        outputs = tape.op_multi_out("DynamicQuantizeLinear", [source], num_outputs=3)
        return _Rounded(*outputs)
    scale = add_constant(model, f"{name}.input_scale", np.array(layer.input_scale, np.float32))
    zero_point = add_constant(
        model, f"{name}.input_zero_point", np.array(layer.input_zero_point, np.uint8)
    )
    codes = tape.op("QuantizeLinear", [source, scale, zero_point])
    return _Rounded(tape.op("DequantizeLinear", [codes, scale, zero_point]), None, None)


def _replace(model: ir.Model, linear: _Linear, layer: EncoderLayer, rounded: _Rounded) -> None:
    """Compute a layer's output from its codes, and let nobody read the old one."""
    import onnx_ir as ir

    tape = ir.tape.Tape(model.graph)
    codes = np.ascontiguousarray(layer.codes.numpy().T)
    weight = add_constant(model, f"{layer.name}.weight_quantized", codes)
    scale = add_constant(model, f"{layer.name}.weight_scale", layer.scale.float().numpy())
    if rounded.scale is None:
        zero_point = add_constant(
            model, f"{layer.name}.weight_zero_point", np.zeros(codes.shape[1], np.int8)
        )
        dense = tape.op("DequantizeLinear", [weight, scale, zero_point], {"axis": 1})
        product = tape.op("MatMul", [rounded.values, dense])
    else:
        sums = tape.op("MatMulInteger", [rounded.values, weight, rounded.zero_point])
        both = tape.op("Mul", [rounded.scale, scale])
        product = tape.op("Mul", [tape.op("Cast", [sums], {"to": ir.DataType.FLOAT}), both])
    bias = linear.bias
    if layer.bias is not None:
        bias = add_constant(model, f"{layer.name}.bias_corrected", layer.bias.float().numpy())
    result = product if bias is None else tape.op("Add", [product, bias])
    result.shape, result.dtype = linear.output.shape, linear.output.dtype
    linear.output.replace_all_uses_with(result, replace_graph_outputs=True)


def add_constant(model: ir.Model, name: str, values: np.ndarray) -> ir.Value:
    """Add an initializer to the graph and return it."""
    import onnx_ir as ir

    value = ir.Value(
        name=name,
        shape=ir.Shape(values.shape),
        type=ir.TensorType(ir.DataType.from_numpy(values.dtype)),
        const_value=ir.tensor(values, name=name),
    )
    model.graph.register_initializer(value)
    return value
