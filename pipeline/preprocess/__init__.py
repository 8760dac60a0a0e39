"""The CPU stage: manifest rows in; fetch, decode, resize, patchify, tokenize; request rows out.

The only home of PIL and av. Knows no Ray, and not what the engine does with a request.
"""
