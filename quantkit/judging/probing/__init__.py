"""How an artifact behaves beside its baseline, with prompts and special tokens."""
