"""The model's forward pass over packed tokens: vision tower, text model, positions.

Knows tensors and transformers' weights; not requests, scheduling or files.
"""
