"""Blocks of ggml types: their bytes, and llama.cpp's own ways to choose codes and scales."""
