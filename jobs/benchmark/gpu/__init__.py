"""Everything to measure on a GPU machine, prepared for one that has no network and is lent for minutes: docs/gpu.md"""
