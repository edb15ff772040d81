"""ONNX graphs: what decoders and encoders become in them, and files that others wrote."""
