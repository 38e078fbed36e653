"""The public functions: generate, stream, advance, propose, forward, draft_forward."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Int, Int32, Key

from eagle_jax.decode.cycle import propose as propose_tree
from eagle_jax.decode.cycle import step
from eagle_jax.decode.insert import run_pending
from eagle_jax.decode.plan import plan
from eagle_jax.decode.prefill import prefill
from eagle_jax.decode.state import DecodeState, check_capacity, context_of
from eagle_jax.drafts.eagle.config import tap_layers
from eagle_jax.drafts.eagle.drafting import EagleDraft
from eagle_jax.drafts.none import as_draft
from eagle_jax.drafts.protocol import Draft, check_models, shown
from eagle_jax.models.target import Target
from eagle_jax.ops.attention import attention
from eagle_jax.ops.spec import PLAIN
from eagle_jax.sampling import SamplingConfig
from eagle_jax.sharding import constrain
from eagle_jax.tree import AcceptFn, Tree, TreeConfig, TreePolicy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """The result of `generate`.

    tokens: each prompt, directly followed by its new tokens, zero-padded. The buffer has the prompts' width +
      max_new_tokens columns, or the prompts' width + capacity if that is less.
    lengths: prompt and new tokens; a stop token counts.
    cycles: target passes after the prefill.
    accepted: number of cycles that accepted 0, 1, ..., depth draft tokens, before truncation; sums to `cycles`.
    failed: whether NaN or infinite logits ended the sequence.
    drafted: which new tokens are accepted draft tokens. The others are the target's, one a cycle, so that in any part
      of a text, accepted tokens per cycle = drafted tokens / other tokens.
    log_probs: of the new tokens under the target's unprocessed distribution (before temperature and the like); None if
      not asked for.
    """

    tokens: Int32[Array, "batch buffer"]
    lengths: Int32[Array, " batch"]
    cycles: Int32[Array, " batch"]
    accepted: Int32[Array, "batch path"]
    failed: Bool[Array, " batch"]
    drafted: Bool[Array, "batch buffer"]
    log_probs: Float32[Array, "batch buffer"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """New tokens of a stream: sequence b gets tokens[b, :counts[b]]."""

    tokens: Int32[Array, "batch new"]
    counts: Int32[Array, " batch"]
    done: Bool[Array, " batch"]
    failed: Bool[Array, " batch"]
    log_probs: Float32[Array, "batch new"] | None = None


def generate(
    target: Target,
    draft: Draft | None,
    tokens: Int[ArrayLike, "batch prompt"],
    lengths: Int[ArrayLike, " batch"],
    key: Key[Array, ""] | Key[Array, " batch"] | None = None,
    *,
    tree: TreePolicy = TreeConfig(),
    sampling: SamplingConfig = SamplingConfig(),
    max_new_tokens: int = 256,
    stop_tokens: tuple[int, ...] = (),
    capacity: int | None = None,
    num_samples: int = 1,
    log_probs: bool = False,
    accept_fn: AcceptFn | None = None,
) -> Output:
    """Generates a continuation of every prompt, as one program without host round trips.

    Args:
      target: the model whose text is generated.
      draft: an EAGLE head or another Draft; None for plain decoding, where `tree` is ignored. Every draft gives the
        same tokens, or samples of the same distribution.
      tokens: prompts, right-padded.
      lengths: of the prompts, at least 1.
      key: one typed key (sequence i uses fold_in(key, i)), or a key a sequence; None for greedy decoding. A result
        depends on the prompt and its key only, not on the rest of the batch.
      tree: how the draft's tree grows: a TreeConfig, a StaticTree or another TreePolicy; static. Ignored by drafts with
        a fixed tree.
      sampling: numbers for the whole batch, or [batch], one a sequence. They are data: changing them never recompiles.
      max_new_tokens: most new tokens of a sequence, limited by `capacity`.
      stop_tokens: token ids that end a sequence; the stop token is its last token. The model's end of sequence is not
        added.
      capacity: most tokens (prompt + new) of a sequence; default the prompts' width + max_new_tokens.
      num_samples: sequences per prompt, adjacent in a batch of batch * num_samples; the prompt runs once. Sample j of
        prompt i has the key fold_in(key i, j).
      log_probs: whether to return the log-probabilities of the new tokens.
      accept_fn: your own acceptance rule (tree/accept.py has the contract); static.
    Returns:
      Output.
    Raises:
      ValueError: for invalid arguments. Under a caller's `jit` values cannot be checked; there a sequence of impossible
        length is returned as `failed`.
    """
    tokens, lengths = check_arguments(
        target, draft, tokens, lengths, sampling, max_new_tokens, stop_tokens, capacity, tree, num_samples
    )
    return _generate(
        target,
        as_draft(target, draft),
        tokens,
        lengths,
        **_program(sampling, key),
        tree=None if draft is None else tree,  # plain decoding compiles one program for any tree
        max_new_tokens=max_new_tokens,
        stop_tokens=jnp.array(stop_tokens, jnp.int32),
        capacity=capacity,
        num_samples=num_samples,
        log_probs=log_probs,
        accept_fn=accept_fn,
    )


STATIC = ("tree", "max_new_tokens", "capacity", "num_samples", "log_probs", "accept_fn")


def _program(sampling: SamplingConfig, key: Array | None) -> dict[str, Any]:
    """Returns the arguments that select the greedy program, or the sampled one with its numbers as data."""
    return {} if sampling.greedy else {"sampling": sampling, "key": key}


@functools.partial(jax.jit, static_argnames=STATIC)
def _generate(target, draft, tokens, lengths, *, tree, accept_fn, **options) -> Output:
    state = prefill(target, draft, tokens, lengths, tree=tree, **options)
    state = jax.lax.while_loop(
        lambda state: ~state.done.all(),
        lambda state: step(target, draft, state, tree=tree, accept_fn=accept_fn).state,
        state,
    )
    depth = draft.depth(tree)
    out = Output(
        tokens=state.tokens,
        lengths=state.lengths,
        cycles=state.cycles,
        accepted=state.accepted[:, : depth + 1],
        failed=state.failed,
        drafted=state.drafted,
        log_probs=state.log_probs,
    )
    return constrain(out, target)


def stream(
    target: Target,
    draft: Draft | None,
    tokens: Int[ArrayLike, "batch prompt"],
    lengths: Int[ArrayLike, " batch"],
    key: Key[Array, ""] | Key[Array, " batch"] | None = None,
    *,
    tree: TreePolicy = TreeConfig(),
    sampling: SamplingConfig = SamplingConfig(),
    max_new_tokens: int = 256,
    stop_tokens: tuple[int, ...] = (),
    capacity: int | None = None,
    num_samples: int = 1,
    log_probs: bool = False,
    accept_fn: AcceptFn | None = None,
    cycles_per_chunk: int = 4,
) -> Iterator[Chunk]:
    """Yields the tokens of `generate` while they are generated. The first chunk holds the first new token of each.

    Args:
      cycles_per_chunk: cycles run on the device per chunk; more save host round trips.
      Other arguments: as in `generate`.
    """
    tokens, lengths = check_arguments(
        target, draft, tokens, lengths, sampling, max_new_tokens, stop_tokens, capacity, tree, num_samples
    )
    config = None if draft is None else tree
    state, chunk = _start(
        target,
        draft,
        tokens,
        lengths,
        **_program(sampling, key),
        tree=config,
        max_new_tokens=max_new_tokens,
        stop_tokens=jnp.array(stop_tokens, jnp.int32),
        capacity=capacity,
        num_samples=num_samples,
        log_probs=log_probs,
    )
    yield chunk
    while not jax.device_get(chunk.done).all():
        state, chunk = _continue(target, draft, state, tree=config, cycles=cycles_per_chunk, accept_fn=accept_fn)
        yield chunk


@functools.partial(jax.jit, static_argnames=STATIC)
def _start(target, draft, tokens, lengths, *, num_samples, **options) -> tuple[DecodeState, Chunk]:
    state = prefill(target, draft, tokens, lengths, num_samples=num_samples, **options)
    return state, constrain(_chunk(state, jnp.repeat(lengths, num_samples), 1), target)


_advancing = functools.partial(jax.jit, static_argnames=("tree", "cycles", "accept_fn"), donate_argnames="state")


@_advancing
def advance(
    target: Target,
    draft: Draft | None,
    state: DecodeState,
    *,
    tree: TreePolicy = TreeConfig(),
    cycles: int = 4,
    accept_fn: AcceptFn | None = None,
) -> tuple[DecodeState, Chunk]:
    """Runs up to `cycles` cycles, until every sequence is done. Donates the state.

    Pending prompts from `insert` run first. With draft=None these are plain decoding steps, and `tree` is ignored.

    Returns:
      The state, and the new tokens.
    """
    draft = as_draft(target, draft)
    running = run_pending(target, draft, state)
    return _run_cycles(target, draft, running, state.lengths, 1, tree, cycles, accept_fn)


@_advancing
def _continue(target, draft, state, *, tree, cycles, accept_fn) -> tuple[DecodeState, Chunk]:
    """As `advance`, for a state without pending prompts: the compiled program contains no prefill."""
    return _run_cycles(target, as_draft(target, draft), state, state.lengths, 0, tree, cycles, accept_fn)


def _run_cycles(target, draft, state, before, first, tree, cycles, accept_fn) -> tuple[DecodeState, Chunk]:
    """Runs up to `cycles` cycles. The chunk holds the tokens after the first `before`.

    first: the most tokens that the state holds beyond `before` already, from a prefill.
    """
    _, state = jax.lax.while_loop(
        lambda carry: (carry[0] < cycles) & ~carry[1].done.all(),
        lambda carry: (carry[0] + 1, step(target, draft, carry[1], tree=tree, accept_fn=accept_fn).state),
        (jnp.int32(0), state),
    )
    width = cycles * (draft.depth(tree) + 1) + first
    return constrain(state, target), constrain(_chunk(state, before, width), target)


def _chunk(state: DecodeState, before: Int[Array, " batch"], width: int) -> Chunk:
    """Returns the tokens of each sequence after its first `before`, at most `width` of them."""
    counts = state.lengths - before
    index = jnp.arange(width, dtype=jnp.int32)[None]
    places = jnp.minimum(before[:, None] + index, state.tokens.shape[1] - 1)

    def new(values):
        return jnp.where(index < counts[:, None], jnp.take_along_axis(values, places, axis=1), 0)

    log_probs = None if state.log_probs is None else new(state.log_probs)
    return Chunk(new(state.tokens), counts, state.done, state.failed, log_probs)


@functools.partial(jax.jit, static_argnames="tree")
def propose(
    target: Target,
    draft: Draft,
    tokens: Int[Array, "batch prompt"],
    lengths: Int[Array, " batch"],
    *,
    tree: TreePolicy = TreeConfig(),
) -> Tree:
    """Returns the first draft tree after each prompt; its root is the target's next token.

    Args:
      tokens, lengths: as in `generate`.
    Returns:
      Tree of tree.num_nodes nodes, unless the draft has a fixed tree.
    """
    draft = as_draft(target, draft)
    state = prefill(target, draft, tokens, lengths, max_new_tokens=1, tree=tree)
    return propose_tree(target, draft, context_of(state, target.config.vocab_size), tree).tree


@jax.jit
def forward(
    target: Target,
    tokens: Int[Array, "batch prompt"],
    lengths: Int[Array, " batch"],
    draft: EagleDraft | None = None,
) -> tuple[Float32[Array, "batch prompt vocab"], Float[Array, "batch prompt features"]]:
    """Runs the target over whole prompts in one causal pass.

    Args:
      tokens, lengths: as in `generate`. Results past a sequence's length are undefined.
      draft: selects the features to return; None for those of an EAGLE-3 head with the official taps.
    Returns:
      logits, and features: the taps, concatenated (EAGLE-3), or the hidden states after the final norm (EAGLE-1).
    """
    check_head(draft)
    positions, mask = _causal(tokens)
    taps = tap_layers(None, target.config.num_layers) if draft is None else draft.taps(target)
    out = target(tokens, positions, mask, prompt_lengths=lengths, taps=taps)
    features = out.taps if draft is None else draft.features(out)
    assert features is not None
    return target.logits(out.hidden), features


@jax.jit
def draft_forward(
    draft: EagleDraft,
    target: Target,
    features: Float[Array, "batch prompt features"],
    tokens: Int[Array, "batch prompt"],
    lengths: Int[Array, " batch"],
) -> tuple[Float[Array, "batch prompt hidden"], Float32[Array, "batch prompt draft_vocab"]]:
    """Runs a head over whole prompts in one causal pass.

    Args:
      features: from `forward`.
      tokens: the token that follows each feature.
    Returns:
      hidden states, before the head's final norm (after it in heads with `norm_output`), and draft logits.
    """
    check_head(draft)
    positions, mask = _causal(tokens)

    def attend(index, q, k, v, spec=PLAIN):
        del index
        return attention(q, k, v, mask, spec=spec, positions=positions), None

    hidden, _ = draft(target, draft.fuse(features), tokens, positions, attend, prompt_lengths=lengths)
    return hidden, draft.logits(target, hidden)


def check_head(draft: Any) -> None:
    """Raises ValueError for a draft that reads no features."""
    if draft is not None and not isinstance(draft, EagleDraft):
        raise ValueError(f"draft must be an EAGLE head (Eagle1Draft, Eagle3Draft), got {shown(draft)}")


def _causal(
    tokens: Int[Array, "batch prompt"],
) -> tuple[Int[Array, "batch prompt"], Bool[Array, "batch prompt prompt"]]:
    batch, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
    return positions, jnp.broadcast_to(jnp.tri(width, dtype=bool), (batch, width, width))


def check_arguments(
    target: Target,
    draft: Draft | None,
    tokens: Any,
    lengths: Any,
    sampling: SamplingConfig,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    capacity: int | None,
    tree: TreePolicy,
    num_samples: int = 1,
) -> tuple[Int32[Array, "batch prompt"], Int32[Array, " batch"]]:
    """Returns tokens and lengths as int32. Raises ValueError naming the argument, its value and the allowed range."""
    check_models(target, draft)
    vocab = target.config.vocab_size
    if not isinstance(sampling, SamplingConfig):
        raise ValueError(f"sampling must be a SamplingConfig, got {shown(sampling)}")
    for name, value in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {shown(value)}")
    if capacity is not None and (type(capacity) is not int or capacity < 2):
        raise ValueError(
            f"capacity must be an integer of at least 2 (a prompt token and a new one), got {shown(capacity)}"
        )
    _check_stop_tokens(stop_tokens, vocab)
    if draft is not None:
        draft.check_fits(target)
        if not callable(getattr(tree, "grow", None)):
            raise ValueError(f"tree must be a TreeConfig, a StaticTree or another TreePolicy, got {shown(tree)}")
    tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
    for name, array in (("tokens", tokens), ("lengths", lengths)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got {array.dtype}")
    if tokens.ndim != 2 or 0 in tokens.shape or lengths.shape != tokens.shape[:1]:
        raise ValueError(f"tokens must be [B, P] and lengths [B], got {tokens.shape} and {lengths.shape}")
    sampling.check(tokens.shape[0], vocab)
    sizes = plan(tokens.shape[1], max_new_tokens, capacity=capacity)
    check_capacity(target, tokens.shape[0] * num_samples, sizes.capacity)
    longest = tokens.shape[1] if isinstance(lengths, jax.core.Tracer) else int(jax.device_get(lengths).max())
    reached = min(longest + max_new_tokens, sizes.capacity)
    trained = target.config.max_position_embeddings
    if reached > trained:
        warnings.warn(
            f"a text may reach {reached} tokens, beyond the {trained} that the target was made for "
            "(max_position_embeddings); set capacity or max_new_tokens to stop there",
            stacklevel=3,
        )
    if not isinstance(lengths, jax.core.Tracer):
        for row, length in enumerate(jax.device_get(lengths)):
            if not 1 <= length <= sizes.longest_prompt:
                limits = f"tokens have {tokens.shape[1]} columns, capacity is {capacity}"
                raise ValueError(f"lengths[{row}] = {length} is outside 1 to {sizes.longest_prompt} ({limits})")
        if not isinstance(tokens, jax.core.Tracer):
            values, counts = jax.device_get((tokens, lengths))
            used = np.arange(tokens.shape[1]) < counts[:, None]
            bad = np.argwhere(used & ((values < 0) | (values >= vocab)))
            if len(bad):
                row, column = bad[0]
                raise ValueError(f"tokens[{row}, {column}] = {values[row, column]} is outside 0 to {vocab - 1}")
    return tokens.astype(jnp.int32), lengths.astype(jnp.int32)


def _check_stop_tokens(stop_tokens: Any, vocab: int) -> None:
    if not isinstance(stop_tokens, tuple | list):
        raise ValueError(f"stop_tokens must be a tuple of token ids, such as (2,); got {shown(stop_tokens)}")
    for stop in stop_tokens:
        if isinstance(stop, bool) or not isinstance(stop, int | np.integer):
            raise ValueError(f"stop_tokens must be token ids, got {shown(stop)} among them")
        if not 0 <= stop < vocab:
            raise ValueError(f"stop token {stop} is outside the vocabulary, 0 to {vocab - 1}")
