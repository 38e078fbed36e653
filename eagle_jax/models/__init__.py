"""Models: what a target is, Llama, its config, its cache and its parameters.

May import ops and files, never a draft.
"""
