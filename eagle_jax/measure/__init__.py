"""Measuring of decoding: comparisons, near-ties, phases of a cycle, timing, tuning of trees, pictures.

It imports the decoder and what lies below it; train, cli and bench import it, and it imports none of them.
"""
