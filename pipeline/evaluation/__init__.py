"""Scores of answers against references: metrics, intervals, comparisons, and the columns of published data sets.

Knows result rows and run folders; not how an answer came about, nor how scores are shown.
"""
