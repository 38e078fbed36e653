"""Losslessness checks for your own acceptance rules and drafts: is the text still the target's?

from eagle_jax.testing import assert_lossless

assert_lossless(my_rule)                      # accept_fn(tree, logits, keys) -> Acceptance
assert_lossless(MyDraft())                    # a Draft
assert_lossless(my_greedy_rule, sampling=None)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from eagle_jax import sampling as processing
from eagle_jax.api import forward, generate
from eagle_jax.drafts.eagle.config import DraftConfig
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.drafts.protocol import Draft
from eagle_jax.models.config import LlamaConfig
from eagle_jax.models.llama import Llama
from eagle_jax.models.target import Target
from eagle_jax.sampling import SamplingConfig
from eagle_jax.tree import AcceptFn, TreeConfig, TreePolicy

# Prompts of different lengths, right-padded with a valid token other than 0: reading the padding would change the text.
PROMPTS = np.array([[3, 1, 4, 1, 5], [2, 6, 6, 6, 6], [0, 1, 5, 6, 6], [1, 4, 6, 6, 6]], np.int32)
LENGTHS = np.array([5, 1, 3, 2], np.int32)
NEW_TOKENS = 16  # of each greedy text
ENUMERATED = 3  # new tokens of each sampled text; the prefill chooses the first, cycles the others
MOST_TEXTS = 20_000  # upper limit of vocab_size ** ENUMERATED
FEWEST_EXPECTED = 5  # texts with fewer expected draws are pooled in Pearson's chi-square
SIZES: dict[str, Any] = {
    "intermediate_size": 24,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


class Report(NamedTuple):
    """The measurements of `assert_lossless`.

    accepted: accepted draft tokens per cycle of the greedy texts. At 0 nothing was tested.
    p_value: of the chi-square test of the sampled texts; None if `sampling` is None.
    """

    accepted: float
    p_value: float | None


def toy_target(seed: int = 0, vocab_size: int = 7) -> Llama:
    """Returns a float32 Llama of 2 layers and width 16 with random weights.

    The weights are scaled so that distributions are neither flat nor sharp, and the largest logits rarely tie.
    """
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=16, num_layers=2, **SIZES)
    return _scaled(Llama(config, jax.random.key(seed)))


def toy_draft(target: Target, seed: int = 1) -> Eagle3Draft:
    """Returns an EAGLE-3 head with random weights for a target; a few of its draft tokens are accepted."""
    vocab, width = target.config.vocab_size, target.config.hidden_size
    config = DraftConfig(
        vocab_size=vocab, draft_vocab_size=vocab, hidden_size=width, target_hidden_size=width, num_layers=1, **SIZES
    )
    return _scaled(Eagle3Draft(config, 3, jax.random.key(seed)))


def _scaled(model: Any) -> Any:
    return jax.tree.map(lambda x: x * 12.0 if x.ndim > 1 else x, model)


def assert_lossless(
    candidate: Draft | AcceptFn,
    *,
    target: Target | None = None,
    draft: Draft | None = None,
    tree: TreePolicy = TreeConfig(depth=3, top_k=2, num_nodes=6),
    sampling: SamplingConfig | None = SamplingConfig(temperature=1.0),
    draws: int = 3000,
    seed: int = 0,
    false_alarm: float = 1e-4,
) -> Report:
    """Checks that decoding with a draft or an acceptance rule gives the target's own text.

    Greedy: four prompts of different lengths give the tokens of plain decoding.
    Sampled: the first three new tokens have the distribution of plain sampling, enumerated exactly. A prompt and key
    give the same text at any index of a batch.

    Args:
      candidate: a draft, tested with the default rule; or an acceptance rule.
      target: with a small vocabulary, as all texts of three tokens are enumerated; default `toy_target()`. A draft must
        fit it.
      draft: for testing a rule; default `toy_draft`. A rule that takes draft_probs needs a draft that samples.
      tree: ignored by drafts with a fixed tree.
      sampling: of the sampled texts; None for a rule that is greedy only.
      draws: number of sampled texts.
      seed: of their keys.
      false_alarm: the p-value of Pearson's chi-square below which the check fails.
    Returns:
      Report. Check `accepted` as well: a draft that never gets a token accepted is lossless, and useless.
    Raises:
      AssertionError: naming the text that differs and its position, or the p-value of the sampled texts.
      ValueError: for a target with too large a vocabulary.
    """
    target = toy_target() if target is None else target
    texts = target.config.vocab_size**ENUMERATED
    if texts > MOST_TEXTS:
        raise ValueError(
            f"the target has {target.config.vocab_size} tokens, so {texts} texts of {ENUMERATED} tokens; "
            f"at most {MOST_TEXTS} are enumerated: use a smaller one, such as toy_target()"
        )
    accept_fn = None if isinstance(candidate, Draft) else candidate
    if isinstance(candidate, Draft):
        draft = candidate
    elif draft is None:
        draft = toy_draft(target)
    run = functools.partial(generate, tree=tree, accept_fn=accept_fn)
    # The greedy program has no keys, which a sampling rule may need. Temperature 0 in an array is greedy and has keys.
    cold = None
    if accept_fn is not None and sampling is not None:
        cold = dataclasses.replace(sampling, temperature=0.0).rows(len(PROMPTS))
    accepted = _check_greedy(run, target, draft, cold, seed)
    if sampling is None:
        return Report(accepted, None)
    _check_independence(run, target, draft, sampling, seed)
    drawn = _draw(run, target, draft, sampling, draws, seed)
    p_value = _check_distribution(drawn, text_probabilities(target, sampling), false_alarm)
    return Report(accepted, p_value)


def _check_greedy(run: Callable, target: Target, draft: Draft, sampling: SamplingConfig | None, seed: int) -> float:
    """Raises AssertionError if greedy texts differ from plain decoding; returns accepted draft tokens per cycle."""
    sampled = {} if sampling is None else {"key": jax.random.key(seed), "sampling": sampling}
    out = run(target, draft, PROMPTS, LENGTHS, max_new_tokens=NEW_TOKENS, **sampled)
    plain = generate(target, None, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), max_new_tokens=NEW_TOKENS)
    _check_same(out, plain, "the greedy text", "plain decoding")
    counts = np.asarray(out.accepted).sum(axis=0)
    return float((counts * np.arange(len(counts))).sum() / counts.sum())


def _check_independence(run: Callable, target: Target, draft: Draft, sampling: SamplingConfig, seed: int) -> None:
    """Raises AssertionError if a sampled text depends on its index in the batch or on other sequences."""
    keys = jax.random.split(jax.random.key(seed), len(PROMPTS))
    rows = sampling.rows(len(PROMPTS))
    out = run(target, draft, PROMPTS, LENGTHS, keys, sampling=rows, max_new_tokens=NEW_TOKENS)
    turned = run(target, draft, PROMPTS[::-1], LENGTHS[::-1], keys[::-1], sampling=rows, max_new_tokens=NEW_TOKENS)
    turned = jax.tree.map(lambda x: x[::-1], turned)
    _check_same(out, turned, "the sampled text", "that of the same prompt and key elsewhere in the batch")


def _check_same(out: Any, reference: Any, what: str, other: str) -> None:
    """Raises AssertionError, naming sequence, position and tokens, if two outputs differ."""
    for i, (ours, theirs) in enumerate(zip(_texts(out), _texts(reference), strict=True)):
        if ours == theirs:
            continue
        pairs = enumerate(itertools.zip_longest(ours, theirs))
        position, (got, expected) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
        raise AssertionError(
            f"{what} of sequence {i} parts from {other} at position {position}: token {got} in place of {expected}"
        )


def _texts(out: Any) -> list[list[int]]:
    tokens, lengths = jax.device_get((out.tokens, out.lengths))
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def _draw(
    run: Callable, target: Target, draft: Draft, sampling: SamplingConfig, draws: int, seed: int
) -> Int[np.ndarray, "{draws} enumerated"]:
    """Samples the first new tokens after the first prompt, each text with its own key."""
    prompt, length = PROMPTS[:1], LENGTHS[:1]

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None))
    def draw(key, target, draft):
        out = run(target, draft, prompt, length, key, sampling=sampling, max_new_tokens=ENUMERATED)
        return out.tokens[0, prompt.shape[1] :], out.failed[0]

    tokens, failed = draw(jax.random.split(jax.random.key(seed), draws), target, draft)
    assert not failed.any(), "the target's logits became NaN or infinite"
    return np.asarray(tokens)


def text_probabilities(target: Target, sampling: SamplingConfig) -> Float[np.ndarray, "vocab vocab vocab"]:
    """Returns the probability of every text of three tokens after the first prompt, by plain sampling."""
    vocab, prompt = target.config.vocab_size, PROMPTS[0].tolist()
    tails = itertools.product(range(vocab), repeat=ENUMERATED - 1)
    texts = jnp.array([[*prompt, *tail] for tail in tails], jnp.int32)
    logits, _ = forward(target, texts, jnp.full(len(texts), texts.shape[1], jnp.int32))
    seen = jnp.cumsum(jax.nn.one_hot(texts, vocab), axis=1) > 0
    last = slice(len(prompt) - 1, None)
    probs = np.asarray(processing.probabilities(logits[:, last], sampling, seen[:, last]), np.float64)
    first, second, third = np.moveaxis(probs.reshape(vocab, vocab, ENUMERATED, vocab), 2, 0)
    return first[0, 0][:, None, None] * second[:, 0][:, :, None] * third


def _check_distribution(
    drawn: Int[np.ndarray, "draws enumerated"], joint: Float[np.ndarray, "vocab vocab vocab"], false_alarm: float
) -> float:
    """Raises AssertionError if the texts are not drawn from the joint distribution; returns Pearson's p-value."""
    from scipy.special import chdtrc  # SciPy is a dependency of JAX

    observed = np.zeros_like(joint)
    np.add.at(observed, tuple(drawn.T), 1)
    impossible = np.argwhere((joint == 0) & (observed > 0))
    if len(impossible):
        raise AssertionError(f"the text {impossible[0].tolist()} was drawn, which has probability 0")
    expected = len(drawn) * joint
    common = expected >= FEWEST_EXPECTED
    rest = expected[~common].sum(), observed[~common].sum()
    pooled = [(e, o) for e, o in [*zip(expected[common], observed[common], strict=True), rest] if e > 0]
    statistic = sum((o - e) ** 2 / e for e, o in pooled)
    p_value = float(chdtrc(max(len(pooled) - 1, 1), statistic))
    if p_value < false_alarm:
        deviation = np.where(common, (observed - expected) ** 2 / expected.clip(FEWEST_EXPECTED), 0)
        worst = np.unravel_index(deviation.argmax(), joint.shape)
        raise AssertionError(
            f"the sampled texts do not have the target's distribution: p = {p_value:.1e} by chi-square over "
            f"{len(pooled)} kinds of text, {len(drawn)} draws. The text {[int(token) for token in worst]} was drawn "
            f"{int(observed[worst])} times, {expected[worst]:.1f} expected"
        )
    return p_value
