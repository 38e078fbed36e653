"""Reads EAGLE heads of every framework: their names, fused tensors, config fields, and the conventions of their fields.

May import the rest of convert's readers, drafts and everything below them; takes no package of its own.
"""
