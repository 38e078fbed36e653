"""Programs compiled for absent accelerators, by their real compilers: kernels, copies, memory.

May import bench and eagle_jax, never bench.decode or bench.train.
"""
