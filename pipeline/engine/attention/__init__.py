"""Attention for the three kinds of pass, behind one interface; a backend per file.

Knows packed sequences and the paged cache; not models or requests.
"""
