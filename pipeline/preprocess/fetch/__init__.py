"""A medium's bytes, from wherever its row says they are: paths, buckets, URLs, data: URIs.

Knows addresses, limits and retries; not what the bytes mean. Bytes are decoded in the sandbox, never here.
"""
