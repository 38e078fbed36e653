"""Training runs: the loop, the optimizer step, checkpoints, evaluation and resuming.

May import train's data and losses.
"""
