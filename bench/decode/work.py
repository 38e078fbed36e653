"""Counts the bytes and FLOPs of each part of decoding from shapes alone: lower bounds for every implementation.

    python -m bench.decode.work        GB of a plain step, and of cycles of heads with their trees

Letters: B batch, T tokens a row of a pass, S context (rows of the cache that are filled), W queries a drafting step,
D tree depth, N nodes. Of a model: L layers, d width, f MLP width, n query heads, k key-value heads, h head dim,
V output vocabulary, e bytes a number. A head with its own embedding costs the same as one with its target's.

A pass of B x T tokens over a stack of layers, with the weights

    layer    = n h i + 2 k h i + d n h + 3 d f + norms     i: the width that attention reads, d, or in the first layer
                                                           of an EAGLE-3 head 2 d
    output   = V d                                         where logits are computed

    bytes    = e (L layer + output)      every weight is read once, however many tokens there are
             + e B T d                   of the embedding the rows of the tokens alone
             + e B S 2 k h L             keys and values of the context, read once a row of the batch
             + e B T 2 k h L             keys and values of the new tokens, written
    FLOPs    = 2 B T (L matrices + output)        a multiplication and an addition a weight and token
             + 4 B T (S + T) n h L                scores, and weighted values, under a mask

Activations and logits count nothing: they can stay on the chip. Nor do rows of a cache beyond its length, although a
pass that reads a cache whole reads those too.

    plain    a pass with T = 1
    verify   a pass with T = N
    step     a pass of the head with T = W, and its output; it reads the earlier steps' keys and values, too
    propose  the head's output once, for the children of the root, and D - 1 steps
    extend   a pass of the head with T = D + 1 behind fc (d of the head x taps d of the target), without an output
    commit   D + 1 rows of keys and values of every layer, read and written
    cycle    propose + verify + commit + extend

Heads that draft all depths in one pass have one step, whatever the depth:

    DFlash   step = a pass of all its layers with T = D + 1, and the target's output for D tokens; propose = step;
             extend = fc, and k and v of every layer, for D + 1 tokens
    DSpark   the same with T = D, and its Markov head of rank r once a depth: r of the embedding and r V of the output,
             for the root and then N - 1 nodes each; with a threshold also the confidence head
    P-EAGLE  step = its output for D tokens; propose = step; extend = a pass of the head behind fc, with T = D + 1 and
             a mask row for every depth after the first, whose keys and values are not written
"""

from __future__ import annotations

import dataclasses

from bench.shapes import HEADS, SHAPES, abstract_pair
from eagle_jax.drafts.dflash import DFlashConfig
from eagle_jax.drafts.dspark import DSparkConfig
from eagle_jax.drafts.eagle.config import DraftConfig, tap_layers
from eagle_jax.drafts.eagle.p_eagle import PEagleConfig
from eagle_jax.drafts.registry import KINDS
from eagle_jax.models.config import LlamaConfig
from eagle_jax.tree import TreePolicy
from eagle_jax.tree.named import describe_tree


@dataclasses.dataclass(frozen=True)
class Work:
    """What a part moves, in bytes, and what it computes, in FLOPs."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, factor: float) -> Work:
        return Work(self.bytes * factor, self.flops * factor)

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Returns the least time on a device with these ceilings, with perfect overlap of moving and computing."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


@dataclasses.dataclass(frozen=True)
class Cycle:
    """The parts of a speculative cycle, in the order in which they run, and of one drafting step of `propose`."""

    propose: Work
    verify: Work
    commit: Work
    extend: Work
    step: Work

    @property
    def parts(self) -> dict[str, Work]:
        """The parts that a cycle runs one after the other."""
        return {"propose": self.propose, "verify": self.verify, "commit": self.commit, "extend": self.extend}

    @property
    def total(self) -> Work:
        return self.propose + self.verify + self.commit + self.extend


def plain_work(target: LlamaConfig, batch: int, context: int, itemsize: int = 2) -> Work:
    """Counts the work of one token a sequence by the target alone.

    Args:
      context: S, rows of the cache that are filled.
      itemsize: e, 2 for bfloat16.
    """
    return verify_work(target, 1, batch, context, itemsize)


def verify_work(target: LlamaConfig, nodes: int, batch: int, context: int, itemsize: int = 2) -> Work:
    """Counts the work of the target's pass over a tree of N nodes a sequence."""
    return _pass(target, target.hidden_size, batch, nodes, context, itemsize) + _output(
        target.vocab_size, target.hidden_size, batch * nodes, itemsize
    )


def cycle_work(
    target: LlamaConfig, head: LlamaConfig, tree: TreePolicy, batch: int, context: int, itemsize: int = 2
) -> Cycle:
    """Counts the work of one cycle of an EAGLE-3, DFlash, DSpark or P-EAGLE head; arguments as in `plain_work`."""
    sizes = target, tree, batch, context, itemsize
    if isinstance(head, PEagleConfig):
        step, extend = _p_eagle_work(head, *sizes)
        propose = step
    elif isinstance(head, DFlashConfig):
        step, extend = _block_work(head, *sizes)
        propose = step
    else:
        assert isinstance(head, DraftConfig)
        step, extend = _eagle3_work(head, *sizes)
        propose = _output(head.draft_vocab_size, head.hidden_size, batch, itemsize) + step * (tree.depth - 1)
    rows = 2 * target.num_kv_heads * target.head_dim * target.num_layers
    return Cycle(
        propose=propose,
        verify=verify_work(target, tree.num_nodes, batch, context, itemsize),
        commit=Work(2 * itemsize * batch * (tree.depth + 1) * rows, 0),
        extend=extend,
        step=step,
    )


def _eagle3_work(
    head: DraftConfig, target: LlamaConfig, tree: TreePolicy, batch: int, context: int, itemsize: int
) -> tuple[Work, Work]:
    """Counts a step and the extend of an EAGLE-3 head."""
    d, gained = head.hidden_size, tree.depth + 1
    # The first step finds no rows of earlier ones, the last D - 2 times W: on average half of that.
    scratch = max(tree.depth - 2, 0) * tree.width // 2
    step = _pass(head, 2 * d, batch, tree.width, context + scratch, itemsize) + _output(
        head.draft_vocab_size, d, batch * tree.width, itemsize
    )
    features = len(tap_layers(head, target.num_layers)) * head.target_hidden_size
    extend = _output(d, features, batch * gained, itemsize) + _pass(head, 2 * d, batch, gained, context, itemsize)
    return step, extend


def _block_work(
    head: DFlashConfig, target: LlamaConfig, tree: TreePolicy, batch: int, context: int, itemsize: int
) -> tuple[Work, Work]:
    """Counts the step and the extend of a DFlash head, or of a DSpark head."""
    d, gained, vocab = head.hidden_size, tree.depth + 1, head.draft_vocab_size or head.vocab_size
    tokens = tree.depth + head.block_size - head.deepest
    step = _pass(head, d, batch, tokens, context, itemsize) + _output(vocab, d, batch * tree.depth, itemsize)
    if isinstance(head, DSparkConfig) and head.markov_rank:
        step += _markov_work(head, 1, batch, itemsize)
        step += _markov_work(head, tree.num_nodes - 1, batch, itemsize) * (tree.depth - 1)
    kv = 2 * head.num_kv_heads * head.head_dim * head.num_layers
    extend = _output(d, len(head.taps) * d, batch * gained, itemsize) + _output(kv, d, batch * gained, itemsize)
    return step, extend + Work(itemsize * batch * gained * kv, 0)


def _markov_work(head: DSparkConfig, nodes: int, batch: int, itemsize: int) -> Work:
    """Counts the work of a DSpark head's Markov and confidence heads on the nodes of one depth."""
    d, r, tokens = head.hidden_size, head.markov_rank, batch * nodes
    vocab = head.draft_vocab_size or head.vocab_size
    inner = {"vanilla": 0, "gated": r * (d + r), "rnn": 3 * r * (d + 2 * r)}[head.markov_type]
    if head.confidence_threshold > 0 and head.confidence:
        inner += d + r * head.confidence_with_markov
    return _output(vocab, r, tokens, itemsize) + Work(itemsize * (inner + tokens * r), 2 * tokens * inner)


def _p_eagle_work(
    head: PEagleConfig, target: LlamaConfig, tree: TreePolicy, batch: int, context: int, itemsize: int
) -> tuple[Work, Work]:
    """Counts the step and the extend of a P-EAGLE head."""
    d, gained, masks = head.hidden_size, tree.depth + 1, head.num_depths - 1
    features = len(tap_layers(head, target.num_layers)) * head.target_hidden_size
    unwritten = Work(itemsize * batch * masks * 2 * head.num_kv_heads * head.head_dim * head.num_layers, 0)
    extend = _output(d, features, batch * (gained + masks), itemsize)
    extend += _pass(head, 2 * d, batch, gained + masks, context, itemsize) + unwritten * -1
    return _output(head.draft_vocab_size, d, batch * tree.depth, itemsize), extend


def _pass(config: LlamaConfig, reads: int, batch: int, tokens: int, context: int, itemsize: int) -> Work:
    """Counts the work of all layers on B x T embedded tokens; `reads`: the width that the first attention reads."""
    d, heads, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layers = config.num_layers
    matrices = layers * (d * (2 * heads + 2 * kv) + 3 * d * config.intermediate_size) + (reads - d) * (heads + 2 * kv)
    norms = layers * (2 * d + 2 * config.head_dim * config.qk_norm + 2 * d * config.output_norms) + reads - d
    moved = matrices + norms + batch * tokens * d + batch * (context + tokens) * 2 * kv * layers
    computed = 2 * batch * tokens * (matrices + layers * 2 * (context + tokens) * heads)
    return Work(itemsize * moved, computed)


def _output(outputs: int, inputs: int, tokens: int, itemsize: int) -> Work:
    """Counts the work of one matrix [outputs, inputs] on some tokens."""
    return Work(itemsize * outputs * inputs, 2 * tokens * outputs * inputs)


def main() -> None:
    """Prints the GB that each part moves, bfloat16, one sequence of 1,024 tokens."""
    context = 1024
    print("| model | cycle | propose | verify | commit | extend | sum | of a plain step |\n|" + "---|" * 8)
    for name in ("8b", "qwen3-8b"):
        shape = SHAPES[name]
        plain = plain_work(shape.target, 1, context)
        cycles = {}
        for kind, head in HEADS.items():
            _, draft = abstract_pair(shape, head=kind)
            title = f"{KINDS[kind].draft.__name__}, {describe_tree(head.tree)}"
            cycles[title] = cycle_work(shape.target, draft.config, head.tree, 1, context)
        for title, cycle in cycles.items():
            parts = " | ".join(f"{part.bytes / 1e9:.3f}" for part in (*cycle.parts.values(), cycle.total))
            print(f"| {name} | {title} | {parts} | {cycle.total.bytes / plain.bytes:.2f} |")


if __name__ == "__main__":
    main()
