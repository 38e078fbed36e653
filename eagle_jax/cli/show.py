"""eagle-jax show: draws one cycle's draft tree, in the terminal and as a picture."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from eagle_jax.cli.options.model_options import add_decoding_arguments, add_model_arguments, positive
from eagle_jax.measure.drawn import Drawn, Node
from eagle_jax.tree import TreeConfig

EXAMPLES = """\
examples:
  eagle-jax show --model llama-8b/ --prompt "Why is the sky blue?"
  eagle-jax show --model llama-8b/ --prompt "Why is the sky blue?" --cycle 5 --tree 4,4,16 --out tree.svg
  eagle-jax show --prompt "def __init__(self" --draft-name eagle1 --out tree.png
  eagle-jax show --prompt "for i in range(" --draft-name lookahead --cycle 12

Tokens with their cumulative draft probability, where the draft has one. Green: accepted; orange: the target's own next
token, unless the text ended before it. Without a model: the embedded pair.
"""
MAX_NEW_TOKENS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    from eagle_jax.cli.options import draft_options

    add_model_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the prompt")
    parser.add_argument(
        "--draft-name",
        type=draft_options.parse_specs,
        metavar="NAME[=DIR]",
        help="the draft to show, by its name in bench --drafts (default: the model's own)",
    )
    parser.add_argument("--cycle", type=positive, default=1, metavar="N", help="which cycle (default: the first)")
    parser.add_argument("--out", metavar="FILE", help="draw the tree there: .png, .svg or .pdf")
    add_decoding_arguments(parser, max_new_tokens=MAX_NEW_TOKENS)


def run(args: argparse.Namespace) -> int:
    """Decodes greedily up to the cycle, and shows its tree."""
    from rich.console import Console

    from eagle_jax.cli import places, progress
    from eagle_jax.cli.options import model_options
    from eagle_jax.decode.plan import plan
    from eagle_jax.decode.prefill import pad
    from eagle_jax.files import prompts
    from eagle_jax.measure import drawn, plot, samples

    if args.out is not None:
        places.check_picture("--out", args.out)
    if args.draft_name is not None and len(args.draft_name) != 1:
        raise ValueError("--draft-name: name one draft")
    if args.lookup is not None and (args.draft_name is not None or args.model is args.target is args.draft is None):
        raise ValueError("--lookup is for the model's own draft; after --draft-name write NAME+lookup")
    notes = Console(stderr=True, highlight=False)
    with progress.status(notes, "loading"):
        embedded = args.model is None and args.target is None
        if embedded:
            args.target, args.raw = str(samples.embedded_pair() / "target"), True
            if args.draft is None:
                args.draft_name = args.draft_name or {"eagle3": None}
        loaded = model_options.load_models(args)
        prompts.check_tokenizer(loaded.tokenizer)
        tokenizer: Any = loaded.tokenizer
    one = _shown(loaded, args, embedded)
    tokens, lengths = pad([prompts.encode(tokenizer, prompts.check_text("--prompt", args.prompt), args.raw)])
    most = min(args.max_new_tokens, args.cycle * (one.draft.depth(one.tree) + 1) + 1)
    trained = loaded.target.config.max_position_embeddings
    options = {
        "max_new_tokens": most,
        "capacity": plan(tokens.shape[1], most, trained=trained, longest=int(lengths[0])).capacity,
        "stop_tokens": model_options.stop_tokens(loaded, args),
    }
    with progress.status(notes, "decoding"):
        before, step = drawn.decode_to(loaded.target, one.draft, one.tree, tokens, lengths, args.cycle, **options)
    text = np.asarray(before.tokens[0, : before.lengths[0]]).tolist()
    gained = int(step.state.lengths[0] - before.lengths[0])
    cycle = drawn.describe(step.tree, step.acceptance, functools.partial(_spell, tokenizer), gained)
    title = f"{one.name}, {one.shape}: cycle {args.cycle}"
    console = Console(highlight=False)
    console.print(f"... {tokenizer.decode(text[-40:-1])}", style="dim", markup=False)
    console.print(terminal_tree(cycle, title))
    notes.print(f"the tree: {one.origin}", style="dim", soft_wrap=True)
    if args.out is not None:
        plot.save(plot.tree(cycle, title), args.out, places.MARK)
        notes.print(f"drawn to {args.out}", markup=False)
    return 0


def _shown(loaded: Any, args: argparse.Namespace, embedded: bool) -> Any:
    """Returns the draft and tree to show, as a `Candidate`; raises ValueError if there is none with these options."""
    from eagle_jax.cli.options import draft_options, model_options, tree_options

    if args.draft_name is not None:
        (one,) = draft_options.candidates(loaded, args.draft_name, args, embedded)
    elif loaded.draft is not None:
        one = draft_options.Candidate(type(loaded.draft).__name__, loaded.draft, TreeConfig(), "")
    else:
        raise ValueError("there is no draft here; name one: --draft-name, or --draft")
    if one.draft is None:
        raise ValueError("plain decoding has no tree to show")
    model_options.check_head_options(one.draft, args)
    # A named draft has a tree of its own, such as eagle1's, unless --tree names another.
    if args.draft_name is None or args.tree is not None or not jax.tree.leaves(one.draft):
        choice = tree_options.choose_tree(one.draft, args)
        return dataclasses.replace(one, tree=choice.tree, origin=choice.origin)
    return dataclasses.replace(one, tree=tree_options.grown(one.tree, args))


def terminal_tree(cycle: Drawn, title: str) -> Any:
    """Returns the rich tree of a cycle."""
    from rich.text import Text
    from rich.tree import Tree

    def label(node: Node) -> Text:
        text = Text(node.text, style="bold green" if node.accepted else "")
        if node.probability is not None:
            text.append(f"  {node.probability:.2g}", style="dim")
        if node.accepted and node.index:
            text.append("  accepted", style="green")
        return text

    whole = Tree(Text(title, style="bold"))
    branches: dict[int, Any] = {}
    for node in cycle.nodes:
        above = whole if node.parent is None else branches[node.parent]
        branches[node.index] = above.add(label(node))
    end = "the text ends here" if cycle.bonus is None else f"{cycle.bonus}  the target's own"
    branches[cycle.last_accepted].add(Text(end, style="yellow"))
    if cycle.omitted:
        whole.add(Text(f"{cycle.omitted} nodes without a guess are not shown", style="dim"))
    return whole


def _spell(tokenizer: Any, token: int) -> str:
    """Formats a token as Python writes a string, without its quotes."""
    return repr(tokenizer.decode([token]))[1:-1] or "''"
