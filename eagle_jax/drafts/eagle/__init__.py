"""EAGLE heads: configs, networks and drafting.

May import models, tree and the rest of drafts.
"""
