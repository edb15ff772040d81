"""Runtimes' own environments: where they are, and how they are made."""
