"""Models: the `Target` protocol, Llama, its config, KV cache and parameters.

May import ops, files and sharding, never a draft.
"""
