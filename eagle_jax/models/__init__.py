"""Models: Llama, the EAGLE heads, their configs, caches and parameters. Imports jax and flax only."""
