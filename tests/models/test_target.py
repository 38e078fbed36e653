"""A target written from scratch: decoding, drafting and training ask for the members of `Target` and no more."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

import eagle_jax
from eagle_jax import DraftConfig, DraftModel, Eagle1Draft, Eagle3Draft, TargetOutput
from eagle_jax.models.config import RopeConfig
from eagle_jax.models.target import cached_pass
from eagle_jax.train import eagle1_loss, eagle3_loss
from tests.toy import NEW, TREE, near_ties, random_prompts, rows_of, scaled


@dataclasses.dataclass(frozen=True)
class Shape:
    """Vocabulary and widths of `OneLayer`."""

    vocab_size: int = 11
    hidden_size: int = 16
    num_layers: int = 1
    num_kv_heads: int = 2
    head_dim: int = 8
    max_position_embeddings: int = 256
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OneLayer:
    """A layer of attention without an MLP, norms or RoPE; positions are added as sines. embed [V, D]; qkv [3, D, D]."""

    embed: jax.Array
    qkv: jax.Array
    config: Shape = dataclasses.field(default=Shape(), metadata={"static": True})

    @property
    def dtype(self):
        return self.embed.dtype

    __call__ = cached_pass

    def run(self, tokens, positions, attend, *, prompt_lengths, taps=()):
        waves = 10.0 ** -jnp.linspace(0, 2, self.config.hidden_size)
        x = self.embed[tokens] + jnp.sin(positions[:, :, None] * waves[None, None])
        q, k, v = (
            jnp.einsum("btd,ed->bte", x, weight).reshape(*tokens.shape, self.config.num_kv_heads, -1)
            for weight in self.qkv
        )
        mixed, kept = attend(0, q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
        stream = [x, x + mixed.reshape(x.shape)]
        tapped = jnp.concatenate([stream[tap] for tap in taps], axis=-1) if taps else None
        return TargetOutput(stream[-1], tapped), [kept]

    def logits(self, hidden):
        return jnp.einsum("...d,vd->...v", hidden, self.embed)

    def output_weight(self):
        return self.embed


def one_layer(seed: int) -> OneLayer:
    keys, d = jax.random.split(jax.random.key(seed)), Shape().hidden_size
    return OneLayer(jax.random.normal(keys[0], (Shape().vocab_size, d)), jax.random.normal(keys[1], (3, d, d)))


def head(kind: type):
    """A head that borrows the target's embedding and output weight."""
    config = DraftConfig(
        **dataclasses.asdict(Shape()) | dict(rope=RopeConfig()),
        num_heads=2,
        intermediate_size=16,
        draft_vocab_size=Shape().vocab_size,
        target_hidden_size=Shape().hidden_size,
        own_lm_head=False,
    )
    return scaled(kind(config, *([3] if kind is Eagle3Draft else []), jax.random.key(1)), 8.0)


def draft_model():
    """A target near to that of seed 0, as a draft."""
    return DraftModel(jax.tree.map(lambda a, b: a + 0.1 * b, one_layer(0), one_layer(1)))


@pytest.mark.parametrize("build", [lambda: head(Eagle3Draft), draft_model], ids=["eagle3", "draft model"])
def test_greedy_text_is_that_of_plain_decoding(build):
    target = one_layer(0)
    tokens, lengths = random_prompts(3, 3, 10, target.config.vocab_size)
    ours = eagle_jax.generate(target, build(), tokens, lengths, tree=TREE, max_new_tokens=NEW)
    plain = eagle_jax.generate(target, None, tokens, lengths, max_new_tokens=NEW)
    assert near_ties(target, rows_of(ours), rows_of(plain)) == 0
    assert ours.cycles.sum() < plain.cycles.sum()


def test_training_a_head_asks_for_no_more():
    target = one_layer(0)
    tokens, lengths = random_prompts(3, 2, 8, target.config.vocab_size)
    for loss, kind, shapes in (
        (functools.partial(eagle3_loss, steps=2), Eagle3Draft, [(2,), (2,)]),
        (eagle1_loss, Eagle1Draft, [(), ()]),
    ):
        traced = jax.eval_shape(loss, head(kind), target, tokens, lengths, jnp.ones_like(tokens))
        assert [value.shape for value in traced] == shapes


def test_what_lacks_a_member_is_refused_by_its_name():
    class Incomplete:
        config = Shape()
        embed = dtype = run = None

    tokens, lengths = random_prompts(3, 1, 4)
    with pytest.raises(
        ValueError, match="another Target; got a Incomplete, which lacks logits, output_weight, __call__"
    ):
        eagle_jax.generate(Incomplete(), None, tokens, lengths)
    wrap = r"draft is a OneLayer; .*wrap it: eagle_jax.DraftModel\(draft\)"
    with pytest.raises(ValueError, match=wrap):
        eagle_jax.generate(one_layer(0), one_layer(1), tokens, lengths)
