"""Everything to measure on a GPU machine that has no network and is available only for minutes: docs/gpu.md"""
