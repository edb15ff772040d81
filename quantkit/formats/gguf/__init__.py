"""GGUF files: the container, what a model becomes in it, and importance matrices."""
