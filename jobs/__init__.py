"""What a person runs, one file a command: `qwen2-vl-batch NAME` or `python -m jobs.NAME`."""
