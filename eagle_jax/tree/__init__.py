"""Draft trees: the data, growth, and acceptance.

May import jax only; the draft comes in as a function.
"""

from eagle_jax.tree.accept import (
    Acceptance,
    AcceptFn,
    accept_coupled,
    accept_drawn,
    accept_greedy,
    accept_sampled,
    accept_sampling,
    choice_noise,
    path_to,
)
from eagle_jax.tree.best_expansions import BestExpansions
from eagle_jax.tree.best_prefixes import BestPrefixes
from eagle_jax.tree.dynamic import TreeConfig
from eagle_jax.tree.merge import merge_chains
from eagle_jax.tree.policy import NEVER, DraftFn, DraftStep, FixedTreePolicy, TreePolicy
from eagle_jax.tree.published import PUBLISHED_TREES
from eagle_jax.tree.static import StaticTree
from eagle_jax.tree.tree import NO_PARENT, Tree

__all__ = [
    "NEVER",
    "NO_PARENT",
    "PUBLISHED_TREES",
    "AcceptFn",
    "Acceptance",
    "BestExpansions",
    "BestPrefixes",
    "DraftFn",
    "DraftStep",
    "FixedTreePolicy",
    "StaticTree",
    "Tree",
    "TreeConfig",
    "TreePolicy",
    "accept_coupled",
    "accept_drawn",
    "accept_greedy",
    "accept_sampled",
    "accept_sampling",
    "choice_noise",
    "merge_chains",
    "path_to",
]
