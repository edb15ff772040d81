"""Names that files of ONNX artifacts have, and keys within them. Nothing is imported here."""

GRAPH = "model.onnx"
DATA = "model.onnx.data"
"""Its tensors, where they do not lie in the graph's own file."""
GENAI_CONFIG = "genai_config.json"
SCOPES = "pkg.torch.onnx.name_scopes"
"""Key of a node's metadata where torch's exporter says which module it comes from: the modules'
names, outermost first, then that of the operation."""
