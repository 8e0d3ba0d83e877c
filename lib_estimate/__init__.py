"""Embedding Estimate: a prompt, estimated as one textual-inversion embedding."""
