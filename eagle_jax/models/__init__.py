"""Models: what a target is, Llama, its config, its cache and its parameters. Imports ops and nothing else of ours."""
