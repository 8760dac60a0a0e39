"""The operations between matrix products and attention, in plain torch and as fused Triton kernels, and paged decode.

Knows tensors and the paged cache; not models or requests.
"""
