"""Measurements: each file measures one thing, prints a table for people, and JSON as its last line."""
