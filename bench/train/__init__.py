"""The cost of training: memory and time of a step.

May import bench, bench.aot and eagle_jax.
"""
