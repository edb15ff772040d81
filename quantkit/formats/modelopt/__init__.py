"""NVIDIA ModelOpt's unified Hugging Face layout, which TensorRT-LLM serves."""
