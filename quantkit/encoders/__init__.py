"""Encoders: what a checkpoint holds, which texts it sees, and how its layers get codes."""
