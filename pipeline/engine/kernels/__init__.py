"""Triton kernels. Each is chosen on CUDA only, and compared with torch under Triton's interpreter."""
