"""The steps of the training-time test by plain attention under explicit masks: what the losses are compared with."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

import eagle_jax
from eagle_jax.ops.attention import attention
from eagle_jax.ops.spec import PLAIN


@functools.partial(jax.jit, static_argnames="steps")
def every_step(draft, target, tokens, lengths, steps):
    """Logits and hidden states [B, S, ...] of every step."""
    batch, width = tokens.shape
    _, features = eagle_jax.forward(target, tokens, lengths, draft)
    hidden, logits, states = draft.fuse(features), [], []
    kept: list[list] = [[] for _ in range(draft.config.num_layers)]  # of each layer: keys and values of each step
    ahead = jnp.arange(width)[None, :, None] - jnp.arange(width)[None, None]  # positions from a key's row to a query's
    inside = jnp.arange(width)[None, None] < lengths[:, None, None]
    for step in range(steps):
        ids = jnp.pad(tokens, [(0, 0), (0, step + 1)])[:, step + 1 :]
        positions = jnp.broadcast_to(jnp.arange(width) + step, (batch, width))

        def attend(index, q, k, v, spec=PLAIN, step=step):
            kept[index].append((k, v))
            causal = ahead >= 0
            if spec.window is not None:
                causal &= (ahead + step < spec.window) | (jnp.arange(width)[None, None] < spec.first)
            own_window = draft.config.windows[index] if draft.config.windows else None
            masks = [causal & (inside | (ahead == 0))]  # padding sees itself: a softmax over no key is NaN
            for earlier in range(1, step + 1):  # keys at the same row, step - earlier positions before the query
                seen = own_window is None or step - earlier < own_window
                masks.append(jnp.broadcast_to((ahead == 0) & seen, (batch, width, width)))
            keys, values = (jnp.concatenate(parts, axis=2) for parts in zip(*kept[index], strict=True))
            return attention(q, keys, values, jnp.concatenate(masks, axis=2)), None

        hidden, _ = draft(target, hidden, ids, positions, attend, prompt_lengths=lengths)
        states.append(hidden)
        logits.append(draft.logits(target, hidden))
    return logits, states
