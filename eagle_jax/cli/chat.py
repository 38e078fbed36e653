"""eagle-jax chat: a conversation. The cache keeps its prefix, so each turn runs new tokens only."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax

from eagle_jax.cli import progress, text
from eagle_jax.cli.conversation import Conversation
from eagle_jax.cli.options import model_options
from eagle_jax.cli.options.model_options import Models, add_decoding_arguments, add_model_arguments, positive
from eagle_jax.cli.options.sampling_options import (
    add_sampling_arguments,
    model_asks,
    random_key,
    sampling_config,
    with_logit_bias,
)
from eagle_jax.cli.options.tree_options import choose_tree
from eagle_jax.files.prompts import check_text, check_tokenizer
from eagle_jax.models.target import Target
from eagle_jax.serving import Request, RunningBatch

EXAMPLES = """\
examples:
  eagle-jax chat --model llama-8b/
  eagle-jax chat --model llama-8b/ --system "Answer in one sentence." --temperature 0.7 --top-p 0.9
  printf 'Hello!\\nAnd in French?\\n' | eagle-jax chat --model llama-8b/

/reset forgets the conversation, /exit or Ctrl-D leaves. Ctrl-C stops an answer; what was said so far stays in the
conversation. Without a chat template, or with --raw, the model continues the text of all turns as it is.
"""

HELP = """\
/reset  forget the conversation
/help   this list
/exit   leave; so does Ctrl-D
Ctrl-C  stop an answer"""
DEFAULT_CONTEXT = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message that the conversation begins with")
    parser.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help=f"most tokens of a conversation (default: {DEFAULT_CONTEXT}, or max_position_embeddings if less)",
    )
    parser.add_argument("--baseline", action="store_true", help="plain decoding, without the draft")
    add_decoding_arguments(parser, max_new_tokens=1024)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Talks until the end of the input; returns 1 if a line got no answer, or a failed one."""
    from rich.console import Console

    sampling_config(args)  # before the models are loaded, which may take long
    text.stop_strings(args)
    if args.system is not None:
        check_text("--system", args.system)
    with progress.status(Console(stderr=True, highlight=False), "loading"):
        loaded = model_options.load_models(args)
        check_tokenizer(loaded.tokenizer)
    return talk(args, loaded)


def talk(args: argparse.Namespace, loaded: Models) -> int:
    """Talks with loaded models; returns what `run` does."""
    from rich.console import Console

    sampling, stop = sampling_config(args), text.stop_strings(args)
    text.lenient(sys.stdout)
    console, notes = Console(highlight=False), Console(stderr=True, highlight=False)
    conversation = Conversation(loaded.tokenizer, args.raw, args.system)
    context = _context(args.context, loaded.target)
    draft = model_options.chosen_draft(loaded, args)
    stops = model_options.stop_tokens(loaded, args)
    choice = choose_tree(draft, args)
    batch = RunningBatch(
        loaded.target,
        draft,
        slots=1,
        capacity=context,
        tree=choice.tree,
        buckets=(context,),
        reuse=True,
        sampling=with_logit_bias(sampling, args, loaded.target.config.vocab_size),
        stop_tokens=stops,
    )
    for line in filter(None, (choice.words(draft), model_asks(args))):
        notes.print(line, style="dim", soft_wrap=True)
    with progress.status(notes, "compiling"):
        batch.compile(cycles=1)
    session = Session(batch, conversation, args, text.Ends(stop, stops, args.max_new_tokens), console, notes)
    for line in _lines(notes):
        if line == "/exit":
            break
        if line == "/reset":
            conversation.reset()
            notes.print("The conversation is forgotten.", style="dim")
        elif line == "/help" or (line.startswith("/") and line[1:].isalpha()):
            notes.print(HELP, style="dim")
        elif line.strip():
            session.answer(line)
    return 1 if session.failed else 0


def _context(asked: int | None, target: Target) -> int:
    trained = target.config.max_position_embeddings
    if asked is None:
        return min(trained, DEFAULT_CONTEXT)
    if not 2 <= asked <= trained:
        raise ValueError(f"--context {asked}: this model takes 2 to {trained} tokens (max_position_embeddings)")
    return asked


def _lines(notes: Any) -> Iterator[str]:
    """Yields what the user says, line by line; from a file or a pipe without a prompt."""
    if sys.stdin is None:  # it is closed
        return
    terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is not UTF-8 is refused, and those after it are read
        sys.stdin.reconfigure(errors="surrogateescape")
    if terminal:
        notes.print("/help lists the commands.", style="dim")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (lets `input` edit and recall lines)
    while True:
        try:
            yield input("> " if terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            notes.print("\nCtrl-D or /exit leaves.", style="dim")


@dataclasses.dataclass
class Session:
    """Answers a conversation; its keys and values stay in the cache of a running batch with one slot.

    turn: answers so far. failed: number of unusable lines, and of answers that ended in NaN.
    """

    batch: RunningBatch
    conversation: Conversation
    args: argparse.Namespace
    ends: text.Ends
    console: Any
    notes: Any
    turn: int = 0
    failed: int = 0

    def answer(self, said: str) -> None:
        """Prints the answer and adds the turn to the conversation, or prints why there is none."""
        try:
            said = check_text("this line", said)
            tokens = self.conversation.tokens_with(said)
            most = self.batch.longest_prompt
            if not 1 <= len(tokens) <= most:
                self._leave_out(
                    f"The conversation would have {len(tokens)} tokens; its context takes 1 to {most} and an answer. "
                    "This turn is left out; /reset begins a new conversation."
                )
                return
            key = jax.random.fold_in(random_key(self.args), self.turn)
            request = Request(tokens, key, self.args.max_new_tokens)
            self.batch.check(request)
        except ValueError as error:
            self._leave_out(f"error: {error}. This turn is left out.")
            return
        self.turn += 1
        with _ctrl_c() as stopped:
            slot = self.batch.insert(request)
            result = text.show(self._chunks(stopped), self.conversation.tokenizer, self.console, self.ends)
            reused = self.batch.take(slot).reused
        if result.failed:
            self.failed += 1
            self.notes.print("The model's logits became NaN or infinite, so the answer ends early.", style="red")
        if result.finish == "interrupted":
            self.notes.print("Stopped.", style="dim")
        summary = f"{result.summary}; {reused} of the prompt's {len(tokens)} tokens were in the cache"
        self.notes.print(summary, style="dim", soft_wrap=True)
        self.conversation.add(said, result.text)

    def _leave_out(self, why: str) -> None:
        self.failed += 1
        self.notes.print(why, style="red", markup=False, soft_wrap=True)

    def _chunks(self, stopped: threading.Event) -> Iterator[Any]:
        while not stopped.is_set():
            chunk = self.batch.advance(cycles=1)
            yield chunk
            if chunk.done[0]:
                return


@contextlib.contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Makes Ctrl-C set an event. An exception inside a call would lose the state, whose buffers are donated."""
    stopped = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
