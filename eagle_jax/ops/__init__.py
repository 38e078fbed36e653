"""Functions of arrays alone, and what depends on the platform. Imports no other room of the package."""
