"""Bytes to RGB uint8 frames. Errors of PIL, av and the network become our own errors here, and nowhere else."""
