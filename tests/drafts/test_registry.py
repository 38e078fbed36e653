"""The registry of draft kinds, and the tables that have an entry, or an explicit None, for every kind with weights."""

from __future__ import annotations

import functools
import typing

import jax
import pytest

import eagle_jax
from eagle_jax import BestExpansions, BestPrefixes, Draft, Eagle1Draft, PromptLookup, StaticTree, TreeConfig
from eagle_jax.cli.options import draft_options
from eagle_jax.convert.dialects import DIALECTS
from eagle_jax.convert.engines import EXPORTED
from eagle_jax.drafts.lookup_first import without_lookup
from eagle_jax.drafts.registry import CLASSES, KINDS, WEIGHTLESS, kind_of
from eagle_jax.train.config import TrainSettings
from eagle_jax.train.run.assemble import TRAINED
from tests.drafts import kinds
from tests.drafts.test_lossless import CONFIG

TABLES = {
    "checkpoints": DIALECTS,
    "export": EXPORTED,
    "heads of the embedded pair": draft_options.EMBEDDED,
    "training": {kind: entry for kind, entry in TRAINED.items() if kind != "target"},
}


@pytest.mark.parametrize("table", TABLES)
def test_every_kind_with_weights_has_its_entry_or_none(table):
    """A draft without weights has nothing to be converted or trained: its line in the registry is all."""
    assert set(TABLES[table]) == set(CLASSES)


def test_settings_name_the_kinds_that_can_be_trained():
    kinds = typing.get_args(TrainSettings.model_fields["kind"].annotation)
    assert set(kinds) == {kind for kind, entry in TRAINED.items() if entry is not None}


def test_every_public_draft_is_of_a_kind():
    public = {value for value in vars(eagle_jax).values() if isinstance(value, type) and issubclass(value, Draft)}
    wraps = {eagle_jax.LookupFirst}  # another draft, whose name it extends: eagle3+lookup
    assert public - {Draft} - wraps <= {kind.draft for kind in KINDS.values()}


def test_properties_are_tested_of_every_kind():
    """Of drafts that score all depths in one pass: with every tree that was made for them, and with a chain."""
    tested = {}
    for kind in kinds.KINDS.values():
        draft = jax.eval_shape(functools.partial(kind.build, CONFIG, 0, 1.0))
        tested.setdefault(type(without_lookup(draft)), set()).add(type(kind.tree))
    for name, kind in KINDS.items():
        assert kind.draft in tested, name
        if isinstance(kind.tree, BestPrefixes):
            assert tested[kind.draft] >= {BestPrefixes, BestExpansions, StaticTree}, name


def test_a_kind_says_the_same_in_all_its_fields():
    for name, kind in KINDS.items():
        assert (kind.weights is None) == (kind.config is None), name
        assert kind.weights is None or not kind.settings, name
        assert kind.description, name
    for name, kind in WEIGHTLESS.items():
        draft = kind.draft(**kind.settings)
        assert draft.depth(TreeConfig(2, 2, 3)) == draft.depth(TreeConfig(9, 2, 3)) or kind.tree is not None, name


def test_the_kind_of_a_draft():
    class Own(Draft):
        pass

    assert kind_of(None) is None and kind_of(Own()) is None
    assert kind_of(PromptLookup(branches=2)).tree is None
    eagle1 = object.__new__(Eagle1Draft)  # without a name it grows a dynamic tree
    assert kind_of(eagle1) is KINDS["eagle2"]
