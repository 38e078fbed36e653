"""Functions of arrays alone, and what depends on the platform.

May import no other room of the package.
"""
