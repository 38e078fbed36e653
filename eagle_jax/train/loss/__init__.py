"""Losses: of each kind of head, over the vocabulary in chunks, with attention that has a gradient.

May import train's settings and data, never its runs.
"""
