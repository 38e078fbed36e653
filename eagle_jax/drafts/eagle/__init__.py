"""EAGLE heads: their configs, their networks, and how they draft.

May import models, tree and the rest of drafts.
"""
