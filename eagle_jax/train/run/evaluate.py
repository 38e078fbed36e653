"""Evaluation during training: the held-out loss, and speculative decoding of held-out prompts.

Letters: B prompts, P padded prompt.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eagle_jax.api import forward, generate
from eagle_jax.convert.eos import eos_tokens
from eagle_jax.decode.prefill import pad
from eagle_jax.drafts.registry import kind_of
from eagle_jax.measure.near_tie import first_difference, near_tie_relative, relative_gap
from eagle_jax.measure.statistics import accepted_shares, distinct_ngrams, tokens_a_cycle
from eagle_jax.models import params
from eagle_jax.models.target import Target
from eagle_jax.sharding import constrain
from eagle_jax.train.config import TrainSettings
from eagle_jax.train.data import loader
from eagle_jax.train.data.dataset import Dataset
from eagle_jax.train.data.features import Rows
from eagle_jax.train.loss.eagle import in_dtype
from eagle_jax.train.loss.objective import Objective, drawn
from eagle_jax.train.run import assemble
from eagle_jax.train.run.step import Arrays
from eagle_jax.tree import TreePolicy
from eagle_jax.tree.named import tree_named


class NotLossless(RuntimeError):
    """Raised if speculative greedy text differs from the plain greedy text."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts tokens [B, P] of lengths [B], and the target's greedy texts plain [B, P + new] of lengths ends [B]."""

    tokens: np.ndarray
    lengths: np.ndarray
    plain: np.ndarray
    ends: np.ndarray

    @property
    def new_tokens(self) -> list[list[int]]:
        """Returns the target's continuation of each prompt."""
        rows = zip(self.lengths, self.ends, self.plain, strict=True)
        return [row[start:end].tolist() for start, end, row in rows]


def prompts_of(held_out: Dataset, count: int, prompt_tokens: int) -> list[np.ndarray]:
    """Returns prompts from evenly spaced documents: a chat up to its first answer, else the first prompt_tokens tokens.

    Raises:
      ValueError: if no document is long enough.
    """
    found = []
    for index in range(len(held_out)):
        tokens, mask = held_out.document(index)
        first = int(np.argmax(mask > 0))
        end = first or prompt_tokens
        if end < len(tokens):
            found.append(np.asarray(tokens[:end]))
    if not found:
        raise ValueError(f"no held-out document is longer than a prompt of {prompt_tokens} tokens")
    return [found[i] for i in np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)]


def plain_text(target: Target, prompts: list[np.ndarray], new_tokens: int, stop_tokens: tuple[int, ...]) -> Prompts:
    """Decodes the prompts greedily without a draft."""
    tokens, lengths = pad([prompt.tolist() for prompt in prompts])
    out = generate(target, None, tokens, lengths, max_new_tokens=new_tokens, stop_tokens=stop_tokens)
    return Prompts(*map(np.asarray, (tokens, lengths, out.tokens, out.lengths)))


def accepted_length(
    target: Target,
    draft: Any,
    prompts: Prompts,
    tree: TreePolicy,
    new_tokens: int,
    stop_tokens: tuple[int, ...],
) -> dict[str, Any]:
    """Decodes greedily with a head; returns tokens a cycle (with the bonus) and the share of cycles that reach a depth.

    Raises:
      NotLossless: if a text differs from the plain one other than at a near-tie of the logits.
    """
    tokens, lengths = jnp.asarray(prompts.tokens), jnp.asarray(prompts.lengths)
    out = generate(target, draft, tokens, lengths, tree=tree, max_new_tokens=new_tokens, stop_tokens=stop_tokens)
    parted = check_equal(target, prompts, np.asarray(out.tokens), np.asarray(out.lengths))
    accepted = np.asarray(out.accepted).sum(axis=0).tolist()
    written = int((np.asarray(out.lengths) - prompts.lengths).sum())
    length = tokens_a_cycle(written, len(prompts.lengths), sum(accepted))
    return {"tokens_a_cycle": length, "reached": accepted_shares(accepted), "near_ties": parted}


def check_equal(target: Target, prompts: Prompts, tokens: np.ndarray, ends: np.ndarray) -> int:
    """Returns the number of sequences that leave the plain text at a near-tie.

    Raises:
      NotLossless: at any other difference.
    """
    parted, dtype = 0, jnp.dtype(target.dtype).name
    for row, (ours, theirs) in enumerate(zip(tokens, prompts.plain, strict=True)):
        place = first_difference(ours[: ends[row]], theirs[: prompts.ends[row]])
        if place is None:
            continue
        gap = relative_gap(_logits_at(target, theirs, place), [ours[place], theirs[place]])
        ended = place == min(ends[row], prompts.ends[row])
        if ended or not near_tie_relative(gap, dtype):
            raise NotLossless(
                f"held-out prompt {row + 1}, position {place}: speculative decoding wrote token {ours[place]}, the "
                f"target alone {theirs[place]}; the lesser logit is {gap:.2g} of the largest below the best"
            )
        parted += 1
    return parted


@jax.jit
def _row_logits(target, tokens, lengths):
    return constrain(forward(target, tokens, lengths)[0], target)


def _logits_at(target: Target, tokens: np.ndarray, place: int) -> np.ndarray:
    """Returns the target's logits for the token at position `place`."""
    logits = _row_logits(target, tokens[None], np.array([place]))
    return np.asarray(logits[0, place - 1])


def check_depth(model: Any, tree: TreePolicy, name: str) -> None:
    """Refuses a tree that is deeper than a trained head can draft.

    Raises:
      ValueError: naming both.
    """
    kind = kind_of(model)
    if kind is not None and kind.deepest and tree.depth > (deepest := getattr(model.config, kind.deepest)):
        raise ValueError(f"evaluation.tree {name} is {tree.depth} deep, and this head drafts {deepest} tokens at most")


class Evaluator:
    """Maps masters to metrics of held-out data and a score; higher is better.

    The score is a head's tokens a cycle; the negative loss of a target, or of a head if no prompt is decoded.
    """

    def __init__(
        self,
        settings: TrainSettings,
        mesh: Mesh,
        objective: Objective,
        model: Any,
        frozen: Arrays,
        target: Target | None,
        held_out: Dataset,
        rows: Rows,
        origin: assemble.DataSource,
        features: Any = None,
    ):
        """Builds batches and prompts.

        Args:
          model: abstract. frozen: its arrays that are not trained.
          held_out, rows: see `assemble.splits`. features: see `loader.batches`.
        """
        self.settings, self.mesh, self.model, self.frozen, self.target = settings, mesh, model, frozen, target
        new, most = settings.evaluation.new_tokens, origin.config.max_position_embeddings
        if settings.evaluation.prompts and new >= most:
            raise ValueError(
                f"evaluation.new_tokens {new}: the target's texts have at most {most} tokens, the prompt's too"
            )
        counts = assemble.rows_of_a_batch(rows, settings)
        blocks, of = loader.own_blocks(mesh)
        self.batches = loader.batches(held_out, rows, counts, 0, features=features, blocks=blocks, of=of)
        self.count = min(settings.evaluation.loss_batches, loader.steps_of(rows, counts, 1))
        self.tree = tree_named(settings.evaluation.tree)
        check_depth(model, self.tree, settings.evaluation.tree)
        self.stop_tokens = eos_tokens(origin.folder, origin.config.vocab_size, origin.tokenizer)
        self.prompts: list[np.ndarray] = []
        if settings.evaluation.prompts:
            self.prompts = prompts_of(held_out, settings.evaluation.prompts, settings.evaluation.prompt_tokens)
        self.plain: Prompts | None = None  # greedy texts of a frozen target, decoded once

        @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
        def measure(masters, frozen, target, batch):
            whole = params.load(model, masters | frozen)
            key = jax.random.key(0)
            prepared = drawn(objective, whole, objective.prepare(whole, target, batch), key)
            return objective.sums(whole, target, prepared, objective.counts(prepared), key)[1]

        self.measure = measure

    def __call__(self, masters: Arrays) -> tuple[dict[str, Any], float]:
        values = self.loss(masters)
        if not self.prompts:
            return values, -float(values["held_out_loss"])
        settings = self.settings.evaluation
        trained = in_dtype(params.load(self.model, masters | self.frozen), self.settings.dtype)
        target = trained if self.target is None else self.target
        if self.target is None or self.plain is None:
            self.plain = plain_text(target, self.prompts, settings.new_tokens, self.stop_tokens)
        values["distinct_4grams"] = distinct_ngrams(self.plain.new_tokens)
        if self.target is None:
            return values, -float(values["held_out_loss"])
        values |= accepted_length(target, trained, self.plain, self.tree, settings.new_tokens, self.stop_tokens)
        return values, float(values["tokens_a_cycle"])

    def loss(self, masters: Arrays) -> dict[str, Any]:
        """Returns the mean loss and metrics over the first held-out batches."""
        found = []
        for index in range(self.count):
            batch = loader.on_mesh(self.batches[index], self.mesh)
            found.append(jax.device_get(self.measure(masters, self.frozen, self.target, batch)))
        mean = jax.tree.map(lambda *values: np.mean(values, axis=0), *found)
        return {f"held_out_{name}": value for name, value in mean.items()}
