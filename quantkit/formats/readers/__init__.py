"""Checkpoints that other tools have quantized: GPTQ, AWQ and FP8, read as codes or as weights."""
