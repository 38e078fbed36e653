"""A DFlash head equals a transcription of its published description in NumPy, position by position."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax import BestPrefixes, Committed, ConfigError, StaticTree, TargetOutput, TreeConfig, generate, propose
from eagle_jax.drafts.dflash import DFlash, DFlashConfig, spaced_taps
from eagle_jax.models import params
from eagle_jax.models.rope import RopeConfig
from tests.drafts.kinds import KINDS
from tests.drafts.test_head_parts import norm, rotate
from tests.drafts.test_lossless import CONFIG, target_of


def logits_by_hand(draft, target, features, block, first):
    """features [context, taps * hidden] of the positions before `first`, the block's. -> logits [depth, vocab]."""
    hidden = hidden_by_hand(draft, target, features, block, first)[0 if draft.config.from_root else 1 :]
    return hidden @ np.asarray(target.output_weight(), np.float64).T


def hidden_by_hand(draft, target, features, block, first):
    """-> normalised outputs [block, hidden]."""
    config, eps = draft.config, draft.config.rms_norm_eps
    w = {path: np.asarray(array, np.float64) for path, array in params.flatten(draft).items()}
    context = norm(features @ w["fc"].T, w["hidden_norm"], eps)
    x = np.asarray((target if draft.embed is None else draft).embed[...], np.float64)[block]
    groups = config.num_heads // config.num_kv_heads
    keys_at = np.arange(first + len(block))
    queries_at = keys_at[first:]

    def heads(x, path, one, positions=None):
        y = np.einsum("td,nhd->tnh", x, w[f"{path}.attention.{one}"])
        if positions is None:
            return y
        y = norm(y, w[f"{path}.attention.{one}_norm"], eps)
        whole = np.zeros((positions[-1] + 1, *y.shape[1:]))  # `rotate` counts from 0
        whole[positions] = y
        return rotate(whole, config.rope.theta)[positions]

    for index, window in enumerate(config.windows or (None,) * config.num_layers):
        path = f"layers.{index}"
        h = norm(x, w[f"{path}.input_norm"], eps)
        both = np.concatenate([context, h])
        q = heads(h, path, "q", queries_at)
        k, v = heads(both, path, "k", keys_at), heads(both, path, "v")
        k, v = (np.repeat(y, groups, axis=1) for y in (k, v))
        scores = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(config.head_dim)
        seen = np.ones((len(block), len(keys_at)), bool)
        if window is not None:
            seen &= (keys_at > queries_at[:, None] - window) | (keys_at >= first)
        if config.causal or (config.causal_windows and window is not None):
            seen &= keys_at <= queries_at[:, None]
        weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
        mixed = np.einsum("nqk,knh->qnh", weights / weights.sum(axis=-1, keepdims=True), v)
        x = x + mixed.reshape(len(block), -1) @ w[f"{path}.attention.o"].T
        h = norm(x, w[f"{path}.post_attention_norm"], eps)
        gate, up = (h @ w[f"{path}.mlp.{one}"].T for one in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{path}.mlp.down"].T
    return norm(x, w["norm"], eps)


def remember(target, draft, tokens, lengths):
    """Commits 7 and 4 positions; the first sequence gets its last 3 in a second commit. -> taps, roots, memory."""
    positions = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 8))
    mask = jnp.broadcast_to(jnp.tri(8, dtype=bool), (2, 8, 8))
    output = target(tokens, positions, mask, prompt_lengths=lengths, taps=draft.taps(target))
    memory = draft.start(target, 2, 128)
    for start, count in ((0, (4, 4)), (4, (3, 0))):
        new = slice(start, start + 4)
        taken = TargetOutput(output.hidden[:, new], output.taps[:, new])
        counts = jnp.full(2, start, jnp.int32), jnp.array(count, jnp.int32)
        memory = draft.update(target, memory, Committed(tokens[:, new], tokens[:, new], *counts, taken, lengths))
    return output.taps, tokens[jnp.arange(2), lengths - 1], memory


@jax.jit
def run(target, draft, tokens, lengths):
    """Runs a block of 4 after contexts of 7 and 4 positions."""
    taps, root, memory = remember(target, draft, tokens, lengths)
    return taps, root, draft.block_logits(target, memory, root, 4, lengths)


@pytest.mark.parametrize("part", ["", "causal", "causal_windows", "from_root"])
def test_equals_numpy(part):
    target, draft = target_of(0), KINDS["dflash"].build(CONFIG, 1, 6.0)
    draft.config = dataclasses.replace(draft.config, **({part: True} if part else {}))
    tokens = np.random.default_rng(0).integers(2, CONFIG.vocab_size, (2, 8)).astype(np.int32)
    features, root, ours = run(target, draft, tokens, np.array([8, 5], np.int32))
    for row, length in enumerate((8, 5)):
        block = np.array([int(root[row]), 1, 1, 1])
        before = np.asarray(features, np.float64)[row, : length - 1]
        theirs = logits_by_hand(draft, target, before, block, length - 1)
        assert len(theirs) == (4 if part == "from_root" else 3) <= draft.config.deepest
        np.testing.assert_allclose(ours[row], theirs, rtol=1e-4, atol=1e-4)
    assert np.abs(ours).max() > 1


def test_a_draft_vocabulary():
    """The drafted tokens are the best of its own, which have the rows of its lm_head."""
    parts = {"own_lm_head": True, "draft_vocab_size": 5}
    target, plain = target_of(0), KINDS["dflash"].build(CONFIG, 1, 6.0)
    ids = np.sort(np.random.default_rng(0).permutation(CONFIG.vocab_size)[:5]).astype(np.int32)
    draft = DFlash(dataclasses.replace(plain.config, **parts), jax.random.key(0))
    rows = {"target_ids": jnp.asarray(ids), "lm_head": target.output_weight()[ids]}
    draft = params.load(draft, params.flatten(plain) | rows)
    assert draft.config.is_causal(0) is False and draft.config.deepest == 4
    prompt = jnp.array([[3, 4, 5]], jnp.int32), jnp.array([3], jnp.int32)
    trees = [
        jax.jit(functools.partial(propose, tree=BestPrefixes(2, 5)))(target, one, *prompt) for one in (draft, plain)
    ]
    assert np.isin(trees[0].tokens[0, 1:], ids).all() and not np.isin(trees[1].tokens[0, 1:], ids).all()


def products(jaxpr) -> int:
    """Counts the products that a program runs; those of a scan once for each of its turns."""
    found = 0
    for equation in jaxpr.eqns:
        within = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda part: hasattr(part, "eqns"))
        inner = sum(products(part) for part in within if hasattr(part, "eqns"))
        found += equation.params.get("length", 1) * inner + (equation.primitive.name == "dot_general")
    return found


def test_a_tree_takes_one_draft_pass_whatever_its_depth():
    """Blocks of more rows than a CPU multiplies one at a time. A tree of an EAGLE-3 head takes a pass a level."""

    def of(kind, tree):
        draft = KINDS[kind].build(CONFIG, 1, 6.0)
        if kind == "dflash":
            draft.config = dataclasses.replace(draft.config, block_size=16)
        prompt = jnp.ones((1, 4), jnp.int32), jnp.array([4], jnp.int32)
        return products(jax.make_jaxpr(lambda *models: propose(*models, *prompt, tree=tree))(target_of(0), draft))

    assert of("dflash", BestPrefixes(9, 9)) == of("dflash", BestPrefixes(15, 9)) > 0
    assert of("eagle3", TreeConfig(3, 2, 6)) < of("eagle3", TreeConfig(5, 2, 6))


def test_what_does_not_fit_is_refused():
    target, draft = target_of(0), KINDS["dflash"].build(CONFIG, 1, 6.0)
    prompt = jnp.array([[3, 4, 5]], jnp.int32), jnp.array([3], jnp.int32)
    with pytest.raises(ValueError, match=r"depth 5 needs a block of 6.*trained on blocks of 5.*depth 4 or less"):
        generate(target, draft, *prompt, tree=StaticTree.chain(5), max_new_tokens=2)
    draft.config = dataclasses.replace(draft.config, num_target_layers=9)
    with pytest.raises(ConfigError, match=rf"num_target_layers is 9 in the draft, {CONFIG.num_layers} in the target"):
        draft.check_fits(target)
    draft.config = dataclasses.replace(draft.config, num_target_layers=0, taps=(0, CONFIG.num_layers + 1))
    with pytest.raises(ConfigError, match=rf"taps layer {CONFIG.num_layers + 1}, the target has {CONFIG.num_layers}"):
        generate(target, draft, *prompt, tree=StaticTree.chain(2), max_new_tokens=2)


PUBLISHED = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 5,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "block_size": 16,
    "num_target_layers": 36,
    "use_sliding_window": False,
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
}


def changed(own, **fields):
    return PUBLISHED | fields | {"dflash_config": PUBLISHED["dflash_config"] | own}


def test_a_published_config():
    config = DFlashConfig.from_hf(PUBLISHED)
    assert (config.block_size, config.mask_token_id, config.num_target_layers) == (16, 151669, 36)
    assert config.taps == (2, 10, 18, 26, 34)  # ids name outputs of layers
    assert config.qk_norm and not config.causal and config.windows == () and config.num_layers == 5
    nested = changed({"block_size": 10, "causal_head": True, "use_swa": True, "swa_window_size": 2048}, block_size=None)
    config = DFlashConfig.from_hf(nested)
    assert (config.block_size, config.causal, config.windows) == (10, True, (2048,) * 5)


def test_a_config_is_written_as_it_is_read():
    windows = {"num_hidden_layers": 2, "sliding_window": 8, "use_sliding_window": True}
    windows |= {"layer_types": ["full_attention", "sliding_attention"]}
    for hf in (
        PUBLISHED,
        changed({"causal_head": True}, block_size=10, num_target_layers=None),
        changed({}, **windows),
    ):
        config = DFlashConfig.from_hf(hf)
        assert DFlashConfig.from_hf(config.to_hf()) == config
    for part, message in (
        ({"windows": (8, 4, None, None, None)}, r"cannot state windows = \(8, 4, None"),
        ({"rope": RopeConfig(1e6, "linear", 2.0)}, "cannot state rope = "),
        ({"qk_norm": False}, "cannot state qk_norm = False"),
        ({"mlp_bias": True}, "cannot state mlp_bias = True"),
        ({"taps": (0, 2)}, r"names outputs of layers; it taps \[0, 2\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(DFlashConfig.from_hf(PUBLISHED), **part).to_hf()


def test_the_taps_of_a_new_head_are_evenly_spaced():
    """As published for Qwen3-8B and Llama-3.1-8B, of 36 and 32 layers."""
    assert spaced_taps(36, 5) == (2, 10, 18, 26, 34) and spaced_taps(32, 5) == (2, 9, 16, 23, 30)
    assert spaced_taps(12, 1) == (7,) and spaced_taps(3, 2) == (2,)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (PUBLISHED | {"dflash_config": 3}, "dflash_config must be an object, got 3"),
        (PUBLISHED | {"dflash_config": None}, "target_layer_ids is missing"),
        (changed({}, aux_hidden_state_layer_ids=[1, 9, 17, 25, 33]), "name different layers: inputs of"),
        (changed({}, target_hidden_size=4), "hidden_size = 4096 and target_hidden_size = 4 contradict"),
        (
            changed({"causal": False, "use_swa": True, "swa_window_size": 8}, sliding_window_non_causal=False),
            "sliding_window_non_causal = False and causal = False contradict each other",
        ),
        (changed({"block_size": 8}), "block_size = 16 and dflash_config.block_size = 8 contradict each other"),
        (PUBLISHED | {"block_size": None}, "block_size is missing"),
        (changed({"target_layer_ids": None}), "target_layer_ids is missing, so which layers are read cannot be known"),
        (changed({"mask_token_id": 151936}), "mask_token_id must be a token id, got 151936"),
        (changed({"causal": True, "causal_head": False}), "contradict each other"),
        (changed({"projector_type": "domino"}), "dflash_config.projector_type = 'domino' is not implemented"),
        (changed({"use_swa": True}), "dflash_config.swa_window_size is missing"),
        (changed({"novelty": 3}), "dflash_config.novelty is not known"),
        (PUBLISHED | {"model_type": "mamba"}, "model_type = 'mamba' is not implemented"),
    ],
)
def test_configs_that_cannot_be_read(hf, message):
    with pytest.raises(ConfigError, match=message):
        DFlashConfig.from_hf(hf)
