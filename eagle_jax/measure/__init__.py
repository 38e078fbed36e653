"""Measuring of decoding: comparisons, near-ties, phases of a cycle, timing, tuning of trees, pictures.

May import the decoder and everything below it; train, cli and bench import it, and it imports none of them.
"""
