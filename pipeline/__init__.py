"""Offline batch inference for Qwen-VL models: manifests of images and videos in, captions out as Parquet.

Importing this package loads none of torch, transformers, ray, PIL or av; each module loads what it needs.
"""
