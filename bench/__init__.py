"""Measuring from a checkout: aot/ compiles for devices that are not there, decode/ and train/ say what both cost.

May import everything of eagle_jax, and users' names through the facade; nothing imports it.
"""
