"""The policy of continuous batching in plain Python: which sequences run in the next pass, and which blocks they own.

No tensors: scheduling is decided from counts, and tested without a model.
"""
