"""Draft trees: the data, growth, and acceptance. Imports jax only; the draft comes in as a function."""

from eagle_jax.tree.grow import DraftFn, DraftStep, grow
from eagle_jax.tree.tree import NO_PARENT, Tree, TreeConfig
from eagle_jax.tree.verify import (
    Acceptance,
    AcceptFn,
    accept_coupled,
    accept_greedy,
    accept_sampled,
    accept_sampling,
    choice_noise,
    path_to,
)

__all__ = [
    "NO_PARENT",
    "AcceptFn",
    "Acceptance",
    "DraftFn",
    "DraftStep",
    "Tree",
    "TreeConfig",
    "accept_coupled",
    "accept_greedy",
    "accept_sampled",
    "accept_sampling",
    "choice_noise",
    "grow",
    "path_to",
]
