"""Runs: the loop, its optimiser step, checkpoints, evaluation and what goes on after an interruption.

May import train's data and losses.
"""
