"""Functions of arrays alone, and what depends on the platform.

May import sharding: a compiler cannot divide a kernel over a mesh by itself.
"""
