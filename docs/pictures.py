"""Draws the pictures of the pages as SVG files: `python -m docs.pictures DIR`, as `make docs` does.

Texts, probabilities and draws are those of the embedded pair, and shapes those that JAX infers.
Letters: B batch, N nodes, D tree depth, V vocabulary, W columns of the token buffer, K key-value heads, S cache
positions, H head dim, F hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import eagle_jax
from bench.decode.work import cycle_work, plain_work
from bench.shapes import SHAPES, llama_shape, random_pair
from eagle_jax import Tree, TreeConfig
from eagle_jax.decode.accept import accept
from eagle_jax.decode.commit import commit, newly_committed, update
from eagle_jax.decode.cycle import propose, verify
from eagle_jax.decode.state import context_of
from eagle_jax.drafts.eagle.config import tap_layers
from eagle_jax.measure import plot
from eagle_jax.measure.drawn import describe
from eagle_jax.measure.samples import embedded_pair
from eagle_jax.tree import Acceptance, accept_greedy, accept_sampling

TREE = TreeConfig(depth=4, top_k=3, num_nodes=12)
GREEDY_PROMPT = "    def __len__(self):"
SAMPLED_PROMPT = "raise ValueError("
DRAWS = 5000
DRAFT, TARGET, REST = "tab:blue", "tab:orange", "0.85"
ACCEPTED, REJECTED = plot.ACCEPTED, plot.REJECTED


class Cycle(NamedTuple):
    """A greedy cycle: the text that it starts from, its tree, the target's logits [1, N, V], and what was accepted."""

    text: str
    tree: Tree
    logits: jax.Array
    acceptance: Acceptance


class Pair:
    """The embedded pair, and the first cycle after a prompt."""

    def __init__(self) -> None:
        folder = embedded_pair()
        self.models = eagle_jax.from_pretrained(folder / "target", folder / "head_eagle1", dtype="float32")
        self.tokenizer = eagle_jax.tokenizer(folder / "target")

    def first_cycle(self, prompt: str) -> Cycle:
        tokens, lengths = eagle_jax.pad([self.tokenizer(prompt)["input_ids"]])
        state, tree, logits = _first_cycle(*self.models, tokens, lengths)
        text = self.tokenizer.decode(np.asarray(state.tokens[0, : int(state.lengths[0])]))
        return Cycle(text, tree, logits, accept_greedy(tree, logits))

    def spell(self, token: int) -> str:
        """A token as Python writes a string, spaces as open boxes."""
        return repr(self.tokenizer.decode([int(token)]))[1:-1].replace(" ", "␣")


@jax.jit
def _first_cycle(target, draft, tokens, lengths):
    state = eagle_jax.prefill(target, draft, tokens, lengths, tree=TREE, max_new_tokens=16)
    nodes = propose(target, draft, context_of(state, target.config.vocab_size, TREE.depth), TREE).tree
    return state, nodes, verify(target, draft, state, nodes)[1]


def eagle() -> Figure:
    """What an EAGLE-3 head reads and gives, with the layers of Llama-3.1-8B."""
    shape = SHAPES["8b"]
    layers = shape.target.num_layers
    taps = tap_layers(shape.head, layers)
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = _canvas(figure, (-0.1, 12.6), (-0.7, 3.2))
    _block(axes, (0, 2.5), 3.4, f"target: {layers} layers", TARGET)
    _block(axes, (0, 0.5), 3.4, "embedding of the next token", TARGET)
    _arrow(axes, (3.4, 2.5), (4.3, 1.8))
    axes.text(3.5, 2.75, f"hidden states before layers {', '.join(map(str, taps))}", va="bottom", fontsize=9)
    _arrow(axes, (3.4, 0.5), (4.3, 1.3))
    _block(axes, (4.3, 1.5), 3, f"head: {shape.head.num_layers} layer", DRAFT)
    _arrow(axes, (7.3, 1.5), (8.3, 1.5))
    _block(axes, (8.3, 1.5), 4.2, "distribution of the token after that", DRAFT)
    axes.plot([7.7, 7.7, 4.6, 4.6], [1.5, -0.4, -0.4, 0.75], color="0.3", linewidth=1)
    _arrow(axes, (4.6, 0.6), (4.6, 1.15))
    axes.text(
        7.8, -0.4, "a level deeper: the head's own hidden state, and a token that it guessed", va="center", fontsize=9
    )
    return figure


def draft_tree(pair: Pair, cycle: Cycle) -> Figure:
    """The tree of a cycle, as `eagle-jax show` draws it."""
    drawn = describe(cycle.tree, cycle.acceptance, pair.spell, int(cycle.acceptance.length[0]) + 1)
    return plot.tree(drawn, f"after {cycle.text!r}")


def passes(pair: Pair, cycle: Cycle) -> Figure:
    """Plain decoding and a cycle, pass by pass, on the same new tokens."""
    path = [int(node) for node in cycle.acceptance.path[0] if node >= 0]
    tokens = [int(cycle.tree.tokens[0, node]) for node in path] + [int(cycle.acceptance.bonus[0])]
    words = [pair.spell(token) for token in tokens]
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes = _canvas(figure, (-1.6, 2.6 * len(words) - 2.6), (-0.5, 2.5))
    axes.text(-1.5, 2, "plain", va="center", weight="bold")
    for index, (before, after) in enumerate(itertools.pairwise(words)):
        _block(axes, (2.6 * index, 2), 2.2, f"target\n{before} → {after}", TARGET)
        if index:
            _arrow(axes, (2.6 * index - 0.45, 2), (2.6 * index + 0.05, 2))
    axes.text(-1.5, 0, "a cycle", va="center", weight="bold")
    _block(axes, (0, 0), 2.2, f"draft: {TREE.depth} levels\n{TREE.num_nodes - 1} guesses", DRAFT)
    _arrow(axes, (2.15, 0), (2.65, 0))
    _block(axes, (2.6, 0), 2.2, f"target: one pass\nover {TREE.num_nodes} nodes", TARGET)
    _arrow(axes, (4.75, 0), (5.25, 0))
    axes.text(5.3, 0, f"{len(words) - 1} tokens: {'  '.join(words[1:])}", va="center", color=ACCEPTED)
    return figure


def ancestors(pair: Pair, cycle: Cycle) -> Figure:
    """Which nodes every node attends to."""
    mask = np.asarray(cycle.tree.ancestors()[0])
    words = [pair.spell(token) for token in cycle.tree.tokens[0]]
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(mask, cmap="Greens", vmax=1.6)
    axes.set_xticks(range(len(words)), words, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(words)), words, fontsize=8, parse_math=False)
    axes.set_ylabel("a node ...")
    axes.set_xlabel("... attends to these, and to all of the text before")
    return figure


def rule(pair: Pair, cycle: Cycle) -> Figure:
    """The sampling rule after the root: the target's distribution, and what is left of it after each rejection."""
    probs, star, shown = _root(cycle)
    children = np.asarray(star.tokens[0, 1:])
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, len(children) + 1, sharey=True)
    left = np.asarray(probs[0, 0])
    for tried, axes in enumerate(panels):
        if tried:
            # Siblings with the token of an earlier one are not tried; the same shape compiles once.
            tokens = [int(star.tokens[0, 0]), *children[:tried], *[children[0]] * (len(children) - tried)]
            some = dataclasses.replace(star, tokens=jnp.array([tokens]))
            left = np.asarray(_reject(some, probs)[0])
        colours = [REST] * (len(shown) + 1)
        title = "none accepted:\nthe bonus is drawn from this"
        if tried < len(children):
            colours[shown.index(children[tried])] = ACCEPTED
            title = f"try {pair.spell(children[tried])}\naccept with {left[children[tried]]:.2f}"
        axes.bar(range(len(colours)), [*left[shown], 1 - left[shown].sum()], color=colours, edgecolor="0.4")
        _name_bars(axes, pair, shown)
        axes.set_title(title, fontsize=10, parse_math=False)
    panels[0].set_ylabel("what is left of p")
    return figure


@jax.jit
def _reject(tree, probs):
    return accept_sampling(tree, probs, jnp.ones((1, tree.num_nodes - 1)))[1]


def lossless(pair: Pair, cycle: Cycle) -> Figure:
    """The first new token of many draws by the sampling rule, beside the target's distribution."""
    probs, star, shown = _root(cycle)
    accepted, tokens = map(np.asarray, _draw(star, probs, jax.random.split(jax.random.key(0), DRAWS)))
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    bottom = np.zeros(len(shown) + 1)
    for colour, mask, label in ((ACCEPTED, accepted, "accepted"), (TARGET, ~accepted, "bonus, after rejections")):
        share = np.bincount(tokens[mask], minlength=probs.shape[-1]) / DRAWS
        heights = np.array([*share[shown], share.sum() - share[shown].sum()])
        label = f"{label}: {share.sum():.0%} of draws"
        axes.bar(range(len(heights)), heights, bottom=bottom, color=colour, label=label)
        bottom += heights
    p = np.asarray(probs[0, 0])
    axes.plot(range(len(bottom)), [*p[shown], 1 - p[shown].sum()], "k_", markersize=30, label="the target's p")
    _name_bars(axes, pair, shown)
    axes.set_ylabel(f"share of {DRAWS} draws")
    axes.legend()
    return figure


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, None, 0))
def _draw(tree, probs, key):
    """Whether a child of the root is accepted, and the first new token."""
    acceptance, left = accept_sampling(tree, probs, jax.random.uniform(key, (1, tree.num_nodes - 1)))
    bonus = jax.random.categorical(jax.random.fold_in(key, 1), jnp.log(left[0]))
    accepted = acceptance.length[0] > 0
    return accepted, jnp.where(accepted, tree.tokens[0, jnp.maximum(acceptance.path[0, 1], 0)], bonus)


def _root(cycle: Cycle) -> tuple[jax.Array, Tree, list[int]]:
    """The target's distributions at the root and its children, these nodes as a tree, and the tokens to show."""
    children = np.flatnonzero(np.asarray(cycle.tree.parents[0]) == 0)
    star = jax.tree.map(lambda field: field[:, np.array([0, *children])], cycle.tree)
    probs = jax.nn.softmax(cycle.logits[:, : star.num_nodes], axis=-1)
    likely = np.argsort(-np.asarray(probs[0, 0]), kind="stable")
    kept = {*likely[:7].tolist(), *np.asarray(star.tokens[0, 1:]).tolist()}
    return probs, star, [token for token in likely.tolist() if token in kept]


def _name_bars(axes: Any, pair: Pair, tokens: list[int]) -> None:
    axes.set_xticks(range(len(tokens) + 1), [*map(pair.spell, tokens), "others"], rotation=60, parse_math=False)


def speed() -> Figure:
    """The speed-up by tokens a cycle, for some costs of a cycle."""
    tree = TreeConfig(depth=8, top_k=10, num_nodes=60)
    llama = SHAPES["8b"]
    cost = cycle_work(llama.target, llama.head, tree, 1, 0).total.bytes / plain_work(llama.target, 1, 0).bytes
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    tokens = np.array([1, tree.depth + 1])
    for factor, label in ((1, "1"), (cost, f"{cost:.1f}: the bytes of Llama-3.1-8B, 60 nodes"), (2.5, "2.5"), (5, "5")):
        axes.plot(tokens, tokens / factor, label=label)
    axes.axhline(1, color="0.4", linestyle="dotted")
    axes.set_xlabel("tokens a cycle: accepted draft tokens, and the target's own")
    axes.set_ylabel("speed-up")
    axes.set_ylim(0, tree.depth + 1)
    axes.legend(title="cost of a cycle, in plain steps")
    return figure


def shapes() -> dict[str, str]:
    """The shapes that JAX infers for one cycle of a toy pair, in letters, by the names in `architecture`."""
    letters = {3: "B", 11: "N", 5: "D + 1", 97: "V", 29: "W", 2: "K", 128: "S", 8: "H", 24: "F", 72: "3 F"}
    sizes = dict(vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=7)
    shape = llama_shape(sizes | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8), draft_vocab_size=97)
    tree = TreeConfig(depth=4, top_k=3, num_nodes=11)

    def run(key):
        target, draft = random_pair(shape, key)
        tokens = jnp.zeros((3, 9), jnp.int32)
        state = eagle_jax.prefill(target, draft, tokens, tokens[:, 0] + 5, tree=tree, max_new_tokens=20)
        context = context_of(state, target.config.vocab_size, tree.depth)
        proposal = propose(target, draft, context, tree)
        output, logits = verify(target, draft, state, proposal.tree)
        chosen = accept(context, proposal, logits, depth=tree.depth)
        after = commit(state, chosen, output)
        gained = after.lengths - state.lengths
        new = newly_committed(state, proposal.tree, output, logits, chosen.path, chosen.tokens, gained)
        after = update(target, draft, after, new)
        return {
            "state.tokens": state.tokens,
            "state.lengths": state.lengths,
            "state.cache.k": state.cache.k[0],
            "state.cache.length": state.cache.length,
            "context.root": context.root,
            "tree.tokens": proposal.tree.tokens,
            "output.hidden": output.hidden,
            "output.taps": output.taps,
            "output.new_kv": output.new_kv[0][0],
            "logits": logits,
            "chosen.path": chosen.path,
            "chosen.tokens": chosen.tokens,
            "acceptance.length": chosen.acceptance.length,
            "committed.tokens": new.tokens,
            "committed.hidden": new.output.hidden,
            "committed.taps": new.output.taps,
            "committed.count": new.count,
        }

    inferred = jax.eval_shape(run, jax.random.key(0))
    return {name: f"[{', '.join(letters[size] for size in x.shape)}]" for name, x in inferred.items()}


def architecture() -> Figure:
    """One cycle: five verbs, where they live, and the data between them with its shapes."""
    s = shapes()
    verbs = [
        ("propose", "drafts/, tree/", DRAFT, f"Tree  tokens, parents, depths, scores {s['tree.tokens']}"),
        (
            "verify",
            "models/, ops/",
            TARGET,
            f"TargetOutput  hidden {s['output.hidden']}, taps {s['output.taps']},\n"
            f"new_kv {s['output.new_kv']} a layer;  logits {s['logits']}",
        ),
        (
            "accept",
            "tree/accept.py, decode/accept.py",
            ACCEPTED,
            f"Chosen  path {s['chosen.path']}, tokens {s['chosen.tokens']}, length {s['acceptance.length']}",
        ),
        (
            "commit",
            "decode/commit.py, models/cache.py",
            "tab:purple",
            f"Committed  tokens {s['committed.tokens']}, hidden {s['committed.hidden']},\n"
            f"taps {s['committed.taps']}, count {s['committed.count']}",
        ),
        ("update", "drafts/", DRAFT, ""),
    ]
    figure = Figure(figsize=(8.5, 7.4), layout="constrained")
    axes = _canvas(figure, (0, 10), (-7.1, 1.1))
    state = (
        f"DecodeState  tokens {s['state.tokens']}, lengths, done, keys {s['state.lengths']}, sampling\n"
        f"cache: k, v {s['state.cache.k']} a layer, length {s['state.cache.length']};  memory: the draft's"
    )
    _block(axes, (0, 0.6), 9.9, state, "black")
    data = f"Context  the text so far, root {s['context.root']}, memory, sampling, keys, noise"
    for index, (verb, place, colour, result) in enumerate(verbs):
        y = -0.9 - 1.4 * index
        _arrow(axes, (2, y + 1.05), (2, y + 0.35))
        axes.text(2.2, y + 0.7, data, va="center", fontsize=9)
        _block(axes, (0, y), 4, f"{verb}\n{place}", colour)
        data = result
    for index, x, label in ((3, 8.6, "accepted keys and values, tokens, lengths"), (4, 9.6, "the draft's memory")):
        y = -0.9 - 1.4 * index
        axes.plot([4, x], [y, y], color="0.3", linewidth=1)
        axes.text(4.1, y + 0.06, label, va="bottom", fontsize=9)
        _arrow(axes, (x, y), (x, 0.25))
    return figure


def _block(axes: Any, left: tuple[float, float], width: float, label: str, colour: str) -> None:
    """A box from its left edge's middle, of a width that does not depend on its label."""
    x, y = left
    axes.add_patch(Rectangle((x, y - 0.35), width, 0.7, facecolor="white", edgecolor=colour, linewidth=1.5))
    axes.text(x + width / 2, y, label, ha="center", va="center", fontsize=9)


def _canvas(figure: Figure, x: tuple[float, float], y: tuple[float, float]) -> Any:
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    return axes


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "0.3"})


def main(folder: Path) -> None:
    """Writes every picture into a folder."""
    matplotlib.rcParams.update({"svg.hashsalt": "eagle_jax", "font.family": "DejaVu Sans"})
    folder.mkdir(parents=True, exist_ok=True)
    pair = Pair()
    greedy, sampled = pair.first_cycle(GREEDY_PROMPT), pair.first_cycle(SAMPLED_PROMPT)
    pictures = {
        "passes": functools.partial(passes, pair, greedy),
        "eagle": eagle,
        "tree": functools.partial(draft_tree, pair, greedy),
        "ancestors": functools.partial(ancestors, pair, greedy),
        "rule": functools.partial(rule, pair, sampled),
        "lossless": functools.partial(lossless, pair, sampled),
        "speed": speed,
        "cycle": architecture,
    }
    for name, draw in pictures.items():
        plot.save(draw(), str(folder / f"{name}.svg"), "eagle_jax")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
