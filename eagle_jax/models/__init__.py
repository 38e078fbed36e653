"""Models: what a target is, Llama, its config, its cache and its parameters.

May import ops, files and sharding, never a draft.
"""
