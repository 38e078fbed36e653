"""The cost of decoding: bytes and FLOPs from shapes, times on the device at hand, and other implementations.

May import bench and eagle_jax, never bench.train.
"""
