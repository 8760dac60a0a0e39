"""Checkpoints: where one lies, its copy on this machine, whether it changed, and what its small files say.

Knows folders, buckets and hub names; not tensors, tokenizers or rows.
"""
