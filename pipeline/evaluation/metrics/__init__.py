"""The metrics: pure functions of (prediction, references), and their registry.

Knows texts; not rows or files.
"""
