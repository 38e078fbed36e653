"""What training costs: memory and time of a step.

May import bench, bench.aot and eagle_jax.
"""
