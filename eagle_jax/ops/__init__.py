"""Functions of arrays, and whatever depends on the platform: products, attention, flash kernels.

May import sharding, because a compiler cannot shard a kernel by itself.
"""
