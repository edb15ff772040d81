"""Embeddings of an encoder's float graph -> INT8 rows with a scale each.

The rows of the texts' tokens are looked up as codes and multiplied with their scales, which are
looked up too: what is read is a quarter of the bytes, and the float table exists nowhere.

Letters of shapes: V rows of a table, H hidden features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.errors import ArtifactError
from quantkit.formats.onnx.encoder_quantization import add_constant, find_scopes
from quantkit.records.encoders import EncoderTable

if TYPE_CHECKING:
    import onnx_ir as ir


def quantize_tables(model: ir.Model, tables: tuple[EncoderTable, ...]) -> None:
    """Put the codes of `tables` in the place of their rows, in place.

    Raises:
        ArtifactError: a table is not in the graph, or read otherwise than by its rows.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for table in tables:
        value = _find(model, table.name)
        codes = add_constant(model, f"{table.name}.weight_quantized", table.codes.numpy())
        scale = add_constant(
            model, f"{table.name}.weight_scale", table.scale.float().reshape(-1, 1).numpy()
        )
        for node in [use.node for use in value.uses()]:
            tape = ir.tape.Tape(model.graph)
            rows = tape.op("Gather", [codes, node.inputs[1]])
            scales = tape.op("Gather", [scale, node.inputs[1]])
            wide = tape.op("Cast", [rows], {"to": ir.DataType.FLOAT})
            result = tape.op("Mul", [wide, scales])
            result.shape, result.dtype = node.outputs[0].shape, node.outputs[0].dtype
            node.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
    RemoveUnusedNodesPass()(model)
    model.graph.sort()


def _find(model: ir.Model, name: str) -> ir.Value:
    """Return the float rows of a table: an initializer that Gather alone reads, along its rows."""
    for node in model.graph:
        value = node.inputs[0] if node.inputs else None
        scopes = find_scopes(node)
        if node.op_type != "Gather" or value is None or value.const_value is None:
            continue
        if len(scopes) > 1 and scopes[-2] == name:
            readers = [use.node for use in value.uses()]
            if all(each.op_type == "Gather" and _axis(each) == 0 for each in readers):
                return value
    raise ArtifactError(
        f"the exported graph does not look up rows of {name}: leave it in float with embeddings: "
        f"float"
    )


def _axis(node: ir.Node) -> int:
    found = node.attributes.get("axis")
    return 0 if found is None else int(found.as_int())
