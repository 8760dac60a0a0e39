"""Everything to measure on a GPU machine, prepared for one that has no network and is lent for minutes: docs/gpu.md"""

VLLM_LIBRARY = "VLLM_FA3"
"""Environment variable with the path of the FlashAttention 3 in vLLM's wheel, where it was prepared."""
