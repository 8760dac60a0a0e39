"""What a person runs: `python -m jobs.NAME --config configs/NAME.yaml [--section.key value ...]`."""
