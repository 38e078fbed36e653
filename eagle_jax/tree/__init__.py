"""Draft trees: the data, growth, and acceptance. Imports jax only; the draft comes in as a function."""
