"""Measurements from a checkout: aot/ compiles for absent devices, decode/ and train/ measure the cost of both.

May import everything of eagle_jax, and users' names through the facade; nothing imports it.
"""
