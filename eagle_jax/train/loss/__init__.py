"""Losses: of each kind of head, over the vocabulary in chunks, and of the later steps of the training-time test.

May import train's settings and data, never its runs.
"""
