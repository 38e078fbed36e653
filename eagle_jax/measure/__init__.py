"""Measuring of decoding: comparisons, near-ties, phases of a cycle, timing, tuning of trees, pictures.

It imports the decoder and all below it, and is imported by train, cli and bench, none of which it imports.
"""
