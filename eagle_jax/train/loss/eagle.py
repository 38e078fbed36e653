"""Losses of draft heads: EAGLE-3's training-time test (arXiv 2503.01840, section 3.2), EAGLE-1's regression.

Letters: B batch, S positions, k step, D width of the head, F width of its features, H width of the target,
V target vocabulary, Vd draft vocabulary.

Step 0 of the training-time test reads the target's features; step k reads the head's own output after k steps, as the
decoder's k-th drafting step does. Row j of step k has the RoPE position j + k and predicts the token at j + 2 + k.

Each loss has three parts, for micro-batch accumulation: `examples` (the target's forward pass), the weights of all
positions, and weighted sums over positions. The loss is the quotient of the sums.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from eagle_jax.drafts.eagle.eagle1 import Eagle1Draft
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.drafts.protocol import Draft
from eagle_jax.models import params
from eagle_jax.models.target import Target, TargetOutput, logit_softcap
from eagle_jax.ops.attention import causal
from eagle_jax.ops.causal import OwnKV
from eagle_jax.ops.layout import Layout, layout
from eagle_jax.ops.spec import PLAIN
from eagle_jax.train.loss.later_steps import later_steps, with_step
from eagle_jax.train.loss.vocabulary import (
    CHUNK,
    LossSums,
    Soft,
    TokenLoss,
    likeliest_tokens,
    vocabulary_loss,
    vocabulary_losses,
)

Alignment = Literal["corrected", "official"]


class Examples(NamedTuple):
    """A batch and the target's outputs for it, without gradient.

    tokens, loss_mask: [B, S]. text: the layout of the documents. features: [B, S, F], the head's input.
    answers: [B, S, H], the target's hidden states after its final norm.
    known: [B, S + 1], 1 where the target's argmax is in the draft vocabulary. The last entry is that of a padded answer
      of zeros, whose argmax is id 0.
    """

    tokens: jax.Array
    loss_mask: jax.Array
    text: Layout
    features: jax.Array
    answers: jax.Array
    known: jax.Array


class Eagle3Outputs(NamedTuple):
    """The head's outputs at all steps, and its teacher.

    x: [steps, B, S, D], the normalised hidden states. weight: [Vd, D], of their logits; softcap: the cap of these.
    teacher: hidden states from position 1 on, padded by the number of steps.
    """

    x: jax.Array
    weight: jax.Array
    teacher: Soft
    softcap: float | None

    @property
    def logits_from(self) -> tuple[jax.Array, jax.Array, Soft]:
        """Returns x in the weight's dtype, the weight and the teacher: the operands of the vocabulary losses."""
        return self.x.astype(self.weight.dtype), self.weight, self.teacher


def examples(
    draft: Eagle3Draft | Eagle1Draft,
    target: Target,
    tokens: jax.Array,
    lengths: jax.Array,
    loss_mask: jax.Array,
    documents: jax.Array | None = None,
    chunk: int = CHUNK,
) -> Examples:
    """Runs the target over a batch, with the features that `draft` reads; see `eagle3_loss`."""
    text, out = target_outputs(draft, target, tokens, lengths, documents)
    return with_features(draft, target, tokens, loss_mask, text, draft.features(out), out.hidden, chunk)


def target_outputs(
    draft: Draft, target: Target, tokens: jax.Array, lengths: jax.Array, documents: jax.Array | None
) -> tuple[Layout, TargetOutput]:
    """Runs the target over a batch, with the taps of `draft`."""
    text = layout(lengths, tokens.shape[1], documents)
    taps = draft.taps(target)

    def attend(index, q, k, v, spec=PLAIN):
        del index
        return causal(q, k, v, text, spec), None

    with jax.named_scope("target"):
        out, _ = target.run(tokens, text.positions, attend, prompt_lengths=text.end - text.first, taps=taps)
    return text, out


def with_features(
    draft: Eagle3Draft | Eagle1Draft,
    target: Target,
    tokens: jax.Array,
    loss_mask: jax.Array,
    text: Layout,
    features: jax.Array,
    answers: jax.Array,
    chunk: int = CHUNK,
) -> Examples:
    """Builds examples from precomputed features and answers."""
    ids = draft.target_ids
    if ids is None:
        known = jnp.ones((tokens.shape[0], tokens.shape[1] + 1), jnp.float32)
    else:
        table = jnp.zeros(target.config.vocab_size, jnp.float32).at[ids[...]].set(1)
        likeliest = likeliest_tokens(answers, target.output_weight(), chunk, logit_softcap(target))
        known = table[jnp.pad(likeliest, [(0, 0), (0, 1)])]
    made = Examples(tokens, loss_mask.astype(jnp.float32), text, features, answers, known)
    return jax.lax.stop_gradient(made)


def eagle3_loss(
    draft: Eagle3Draft,
    target: Target,
    tokens: jax.Array,
    lengths: jax.Array,
    loss_mask: jax.Array,
    steps: int = 7,
    alignment: Alignment = "corrected",
    *,
    documents: jax.Array | None = None,
    divergence: Literal["cross_entropy", "kl"] = "cross_entropy",
    chunk: int = CHUNK,
    token_loss: TokenLoss = "cross_entropy",
) -> tuple[jax.Array, jax.Array]:
    """Returns the loss of each step of the training-time test against the target's distribution. Runs the target.

    Memory grows with the steps only by their hidden states, keys and values: the backward pass recomputes steps, and
    logits exist for one chunk of positions only.

    Args:
      draft: the gradient is with respect to it; the target is constant.
      tokens: [B, S] right-padded. lengths: [B].
      loss_mask: [B, S], 1 for the tokens to learn (an assistant's), 0 for the others.
      alignment: "corrected": row j of step k counts if token j + 2 + k, which it predicts, is to be learned, lies
        inside the document, and the target's argmax there is in the draft vocabulary. The loss is the mean over those.
        "official": as the official trainer, for parity: weighted by loss_mask[j + k], mean over all B * S positions.
      documents: [B, S], see `layout`, for several documents in a sequence; None: one.
      divergence: "kl" subtracts the target's entropy from the cross-entropy, which leaves the gradient unchanged.
      chunk: positions whose logits exist at a time.
      token_loss: of a position, over the draft vocabulary. "lk": minus the logarithm of the acceptance probability
        sum_x min(p(x), q(x)). "lk_adaptive": KL, then total variation, as the acceptance rises.
    Returns:
      losses and accuracies [steps] float32, not weighted by step. Accuracy is the share of positions to learn where
      draft and target have the same argmax.
    """
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    if divergence not in ("cross_entropy", "kl"):
        raise ValueError(f'divergence must be "cross_entropy" or "kl", got {divergence!r}')
    check_token_loss(token_loss, divergence)
    if alignment == "official" and documents is not None:
        raise ValueError('alignment "official" knows one document a row; pack documents with "corrected"')
    made = examples(draft, target, tokens, lengths, loss_mask, documents, chunk)
    learned, weights = eagle3_weights(made, steps, alignment)
    outputs = eagle3_outputs(draft, target, made, steps)
    with jax.named_scope("eagle3_loss"):
        sums = vocabulary_losses(*outputs.logits_from, weights, chunk, token_loss, outputs.softcap)
    total = tokens.size if alignment == "official" else jnp.maximum(weights.sum(axis=(1, 2)), 1)
    loss = sums.loss - sums.entropy if divergence == "kl" else sums.loss
    return loss / total, sums.match / (learned.sum(axis=(1, 2)) + 1e-6)


def check_token_loss(token_loss: str, divergence: str = "cross_entropy") -> None:
    """Refuses an unknown token loss, and a divergence that only cross-entropy has.

    Raises:
      ValueError: naming both.
    """
    if token_loss not in get_args(TokenLoss):
        raise ValueError(f"token_loss must be one of {', '.join(get_args(TokenLoss))}, got {token_loss!r}")
    if divergence == "kl" and token_loss != "cross_entropy":
        raise ValueError(f'divergence "kl" is of cross-entropy; the token loss is {token_loss!r}')


def eagle3_weights(made: Examples, steps: int, alignment: Alignment = "corrected") -> tuple[jax.Array, jax.Array]:
    """Returns masks of the rows to learn at every step, and of those whose answer the draft can express.

    Both are [steps, B, S] float32. The second weighs the loss.
    """
    if alignment not in ("corrected", "official"):
        raise ValueError(f'alignment must be "corrected" or "official", got {alignment!r}')
    width = made.tokens.shape[1]
    row = jnp.arange(width, dtype=jnp.int32)[None]
    # Zero padding past the end, as in the reference.
    mask = jnp.pad(made.loss_mask, [(0, 0), (0, steps + 1)])
    known = jnp.pad(made.known, [(0, 0), (0, steps)], mode="edge")
    learned, weights = [], []
    for step in range(steps):
        if alignment == "official":
            learned.append(mask[:, step : step + width])
            inside = row + step < width
            weights.append(learned[-1] * known[:, step + 1 : step + 1 + width] * inside)
        else:
            inside = row + step + 2 < made.text.end
            learned.append(mask[:, step + 2 : step + 2 + width] * inside)
            weights.append(learned[-1] * known[:, step + 1 : step + 1 + width])
    return jnp.stack(learned), jnp.stack(weights)


@jax.named_scope("eagle3_loss")
def eagle3_outputs(draft: Eagle3Draft, target: Target, made: Examples, steps: int, dtype: Any = None) -> Eagle3Outputs:
    """Runs the steps of the training-time test.

    Args:
      dtype: of the head's computation; None: the head's.
    """
    width = made.tokens.shape[1]
    weight = target.output_weight()
    rows = jax.lax.stop_gradient(weight if draft.target_ids is None else weight[draft.target_ids[...]])  # [Vd, H]
    # Step k reads k positions on. Zero padding past the end, as in the reference.
    following = jnp.pad(made.tokens, [(0, 0), (0, steps)])
    answers = jnp.pad(made.answers[:, 1:], [(0, 0), (0, steps), (0, 0)])
    hidden = _Steps(draft, dtype, width).run(target, made, following, steps)
    head = in_dtype(draft, dtype)
    x = jax.checkpoint(head.before_logits)(hidden)
    output = head.output_weight(target)  # the target's, in its own dtype, where the head has no lm_head
    softcap = logit_softcap(target)
    return Eagle3Outputs(x, output, Soft(answers, rows, softcap), softcap if head.lm_head is None else None)


@jax.named_scope("feature_loss")
def feature_distances(outputs: Eagle3Outputs, weights: jax.Array) -> jax.Array:
    """Returns sums of the SmoothL1 distances to the target's hidden states, weighted by [steps, B, S]: [steps]."""
    width = weights.shape[2]

    @jax.checkpoint
    def distance(of_step):
        step, x, importance = of_step
        return (importance * smooth_l1(x, _shifted(outputs.teacher.hidden, step, width))).sum()

    return jax.lax.map(distance, (jnp.arange(len(weights), dtype=jnp.int32), outputs.x, weights))


@dataclasses.dataclass(frozen=True, eq=False)
class _Steps:
    """The steps of the training-time test, as functions of the head's arrays and of constants, for `later_steps`."""

    draft: Eagle3Draft
    dtype: Any
    width: int

    def run(self, target: Target, made: Examples, following: jax.Array, steps: int) -> jax.Array:
        """Returns the head's output at every step, [steps, B, S, D]."""
        floats, constants = _floats(self.draft)
        constants |= {"target": target, "text": made.text, "tokens": following}
        hidden, kept = jax.checkpoint(self.first)(floats, constants | {"features": made.features})
        return hidden[None] if steps == 1 else later_steps(self.later, steps, floats, constants, hidden, kept)

    @jax.named_scope("first_step")
    def first(self, floats, constants):
        def attend(index, q, k, v, spec=PLAIN):
            del index
            return causal(q, k, v, constants["text"], spec), (k, v)

        return self.one(floats, constants, None, 0, attend)

    @jax.named_scope("later_step")
    def later(self, floats, constants, hidden, first_kv, own, step):
        def attend(index, q, k, v, spec=PLAIN):
            own_k, own_v = (with_step(old, new, step) for old, new in zip(own[index], (k, v), strict=True))
            later = OwnKV(own_k, own_v, step, self.draft.config.window_of(index))
            first_k, first_v = first_kv[index]
            return causal(q, first_k, first_v, constants["text"], spec, later), (own_k, own_v)

        return self.one(floats, constants, hidden, step, attend)

    def one(self, floats, constants, hidden, step, attend):
        """Runs a step on hidden [B, S, D], or on the features (None); returns its output and that of `attend`."""
        head = in_dtype(params.load(self.draft, floats | constants["integers"]), self.dtype)
        if hidden is None:
            hidden = head.fuse(constants["features"])
        target, text = constants["target"], constants["text"]
        tokens, positions = _shifted(constants["tokens"], step + 1, self.width), text.positions + step
        return head(target, hidden, tokens, positions, attend, prompt_lengths=text.end - text.first)


def _shifted(values: jax.Array, step: int | jax.Array, width: int) -> jax.Array:
    """Slices `width` positions of values [B, S', ...] from `step` on."""
    return jax.lax.dynamic_slice_in_dim(values, step, width, axis=1)


def _floats(model: Any) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Splits a model's arrays: those with a gradient, and {"integers": the others}."""
    arrays = params.flatten(model)
    integers = {path: array for path, array in arrays.items() if not jnp.issubdtype(array.dtype, jnp.floating)}
    return {path: array for path, array in arrays.items() if path not in integers}, {"integers": integers}


def eagle1_loss(
    draft: Eagle1Draft,
    target: Target,
    tokens: jax.Array,
    lengths: jax.Array,
    loss_mask: jax.Array,
    key: jax.Array | None = None,
    *,
    documents: jax.Array | None = None,
    chunk: int = CHUNK,
    token_loss: TokenLoss = "cross_entropy",
) -> tuple[jax.Array, jax.Array]:
    """Returns EAGLE-1's feature regression and soft cross-entropy (arXiv 2401.15077, section 4.2). Runs the target.

    Args:
      As `eagle3_loss`. The loss_mask of a document's last token is ignored: no feature follows it.
      key: adds the official uniform noise (u - 0.5) * 0.2 * 512 / length to the features; None: no noise.
    Returns:
      The mean SmoothL1 between predicted and true features, and the mean token loss (cross-entropy) of their
      distributions over the target's vocabulary. The official loss is the first + 0.1 times the second.
    """
    check_token_loss(token_loss)
    made = examples(draft, target, tokens, lengths, loss_mask, documents, chunk)
    weights = eagle1_weights(made)
    feature, sums = eagle1_sums(draft, target, made, weights, key, chunk=chunk, token_loss=token_loss)
    total = weights.sum() + 1e-5
    return feature / total, sums.loss / total


def eagle1_weights(made: Examples) -> jax.Array:
    """Returns the weights of positions, [B, S] float32: the loss mask where a feature follows."""
    return made.loss_mask * (jnp.arange(made.tokens.shape[1], dtype=jnp.int32)[None] < made.text.end - 1)


@jax.named_scope("eagle1_loss")
def eagle1_sums(
    draft: Eagle1Draft,
    target: Target,
    made: Examples,
    weights: jax.Array,
    key: jax.Array | None = None,
    *,
    dtype: Any = None,
    chunk: int = CHUNK,
    token_loss: TokenLoss = "cross_entropy",
) -> tuple[jax.Array, LossSums]:
    """Returns sums, weighted by `weights` [B, S], of the features' SmoothL1 and of the tokens' losses."""
    text, features = made.text, made.features
    draft = in_dtype(draft, dtype)
    following = jnp.pad(made.tokens, [(0, 0), (0, 1)])[:, 1:]
    answers = jnp.pad(features, [(0, 0), (0, 1), (0, 0)])[:, 1:]
    if key is not None:
        noise = jax.random.uniform(key, features.shape, jnp.float32, -0.5, 0.5) * 0.2 * 512
        features = features + (noise / (text.end - text.first)[:, :, None]).astype(features.dtype)

    def attend(index, q, k, v, spec=PLAIN):
        del index
        return causal(q, k, v, text, spec), None

    hidden, _ = draft(
        target, draft.fuse(features), following, text.positions, attend, prompt_lengths=text.end - text.first
    )
    weight = jax.lax.stop_gradient(target.output_weight())
    softcap = logit_softcap(target)
    teacher = Soft(answers, weight, softcap)
    sums = vocabulary_loss(hidden.astype(weight.dtype), weight, teacher, weights, chunk, token_loss, softcap)
    return (weights * smooth_l1(hidden, answers)).sum(), sums


@jax.named_scope("feature_loss")
def smooth_l1(hidden: jax.Array, answers: jax.Array) -> jax.Array:
    """Returns the SmoothL1 distance of hidden states [..., D], averaged over D, float32."""
    difference = jnp.abs(hidden.astype(jnp.float32) - answers.astype(jnp.float32))
    return jnp.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean(axis=-1)


def in_dtype(model: Any, dtype: Any) -> Any:
    """Casts a model's floating-point arrays to `dtype`; None: no cast."""
    if dtype is None:
        return model
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, model)
