"""All prompts of a file: `eagle-jax generate --prompts`. Rows are refilled as they end (continuous batching)."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from eagle_jax.cli import models, progress, prompts, text
from eagle_jax.cli.results import Results, read_finished
from eagle_jax.cli.rows import Rows
from eagle_jax.cli.sampling import random_key, with_logit_bias
from eagle_jax.models.llama import Llama
from eagle_jax.sampling import SamplingConfig

CYCLES = 4  # between two looks at the rows: fewer leave no row idle, more spend less time between host and device


def run(args: argparse.Namespace, sampling: SamplingConfig) -> int:
    """Writes a line a text to --out; returns 1 if the model's numbers broke down in one of them."""
    from rich.console import Console

    settings = _settings(args)
    finished = read_finished(args.out, settings)  # before the models are loaded, which may take long
    notes = Console(stderr=True, highlight=False, markup=False)  # a file may be called [red]
    with progress.status(notes, "loading"):
        loaded = models.load_models(args)
        tokenizer = loaded.tokenizer
    draft = models.chosen_draft(loaded, args)
    found = prompts.read_prompts(args.prompts, lambda prompt: prompts.encode(tokenizer, prompt, args.raw))
    _check(found, loaded.target, args.buckets)
    longest = max(len(prompt.tokens) for prompt in found)
    pairs = ((index, sample) for index in range(len(found)) for sample in range(args.num_samples))
    jobs = [pair for pair in pairs if pair not in finished]
    if not jobs:
        notes.print(f"All {len(finished)} texts are in {args.out} already.", soft_wrap=True)
        return 0
    ends = text.Ends(args.stop, models.stop_tokens(loaded, args), args.max_new_tokens)
    rows = Rows(
        loaded.target,
        draft,
        min(args.batch, len(jobs)),
        min(loaded.target.config.max_position_embeddings, longest + args.max_new_tokens),
        tree=models.chosen_tree(draft, args),
        buckets=args.buckets,
        sampling=with_logit_bias(sampling, args, loaded.target.config.vocab_size),
        stop_tokens=ends.tokens,
        log_probs=args.log_probs,
    )
    with progress.status(notes, "compiling"):
        rows.compile(CYCLES)

    def start(index: int, sample: int) -> _Text:
        key = jax.random.fold_in(random_key(args), index)
        if args.num_samples > 1:
            key = jax.random.fold_in(key, sample)
        return _Text(index, sample, key, text.Detokenizer(tokenizer, ends.strings))

    texts = _decode(rows, found, (start(*job) for job in jobs), ends)
    with Results(args.out, settings) as results:
        return _write(texts, results, found, args, notes, len(jobs) + len(finished), len(finished))


@dataclasses.dataclass
class _Text:
    """One text in the making. `finish` is set at its end."""

    index: int
    sample: int
    key: jax.Array
    detokenizer: text.Detokenizer
    log_probs: list[float] = dataclasses.field(default_factory=list)
    cycles: int = 0
    finish: text.Finish | None = None


def _decode(
    rows: Rows,
    found: Sequence[prompts.Prompt],
    waiting: Iterator[_Text],
    ends: text.Ends,
) -> Iterator[list[_Text]]:
    """Yields the texts that each chunk ended (maybe none), and has the next ones take their rows."""
    free = list(range(rows.state.done.shape[0]))
    running: dict[int, _Text] = {}
    while True:
        for row, one in zip(free, waiting, strict=False):
            rows.insert(row, found[one.index].tokens, one.key, ends.max_new_tokens)
            running[row] = one
        if not running:
            return
        chunk = rows.advance(CYCLES)
        for row, one in running.items():
            count = chunk.counts[row]
            ids = chunk.tokens[row, :count].tolist()
            one.detokenizer.collect(ids)
            if chunk.log_probs is not None:
                one.log_probs += chunk.log_probs[row, :count].tolist()
            if chunk.done[row]:
                one.detokenizer.finish()
            if chunk.done[row] or one.detokenizer.stopped:
                one.finish = ends.finish(one.detokenizer.ids, one.detokenizer.stopped, bool(chunk.failed[row]))
        free = [row for row, one in running.items() if one.finish is not None]
        cycles = rows.cycles
        for row in free:
            running[row].cycles = int(cycles[row])
            if not chunk.done[row]:
                rows.free(row)
        yield [running.pop(row) for row in free]


def _write(
    texts: Iterator[list[_Text]],
    results: Results,
    found: Sequence[prompts.Prompt],
    args: argparse.Namespace,
    notes: Any,
    total: int,
    before: int,
) -> int:
    """Writes the texts as they end, under a progress bar; returns the exit code."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), "ETA"
    tokens = failed = count = 0
    rate = ""
    began = time.perf_counter()
    with Progress(*columns, TimeRemainingColumn(), console=notes, transient=True) as bar:
        task = bar.add_task("", total=total, completed=before, rate="")
        for ended in texts:
            for one in ended:
                results.write(_line(one, found[one.index], args))
                tokens += len(one.detokenizer.ids)
                failed += one.finish == "failed"
            count += len(ended)
            rate = f"{tokens / (time.perf_counter() - began):.1f} tok/s"
            bar.update(task, advance=len(ended), rate=rate)
    notes.print(f"{count} texts, {tokens} new tokens, {rate}, in {args.out}", style="dim", soft_wrap=True)
    if failed:
        notes.print(f"error: in {failed} texts the model's logits became NaN or infinite", soft_wrap=True)
    return 1 if failed else 0


def _line(one: _Text, prompt: prompts.Prompt, args: argparse.Namespace) -> dict[str, Any]:
    """A finished text, as the file has it."""
    kept = len(one.detokenizer.ids)
    line = {
        "index": one.index,
        "sample": one.sample,
        "prompt": prompt.text,
        "text": one.detokenizer.text if one.detokenizer.has_text else None,
        "tokens": one.detokenizer.ids,
        "finish": one.finish,
        "cycles": one.cycles,
        "log_probs": [round(value, 6) for value in one.log_probs[:kept]],
    }
    left_out = {"sample": args.num_samples == 1, "log_probs": not args.log_probs}
    return {name: value for name, value in line.items() if not left_out.get(name)}


def _check(found: Sequence[prompts.Prompt], target: Llama, buckets: Sequence[int]) -> None:
    """Refuses a prompt that cannot be decoded, before any is."""
    limit, vocab = target.config.max_position_embeddings, target.config.vocab_size
    for prompt in found:
        length = len(prompt.tokens)
        if length == 0:
            raise ValueError(f"{prompt.where}: the prompt is empty: it needs at least one token")
        if length >= limit:
            raise ValueError(
                f"{prompt.where}: the prompt has {length} tokens, this model takes at most {limit - 1} and one new "
                f"token (max_position_embeddings is {limit})"
            )
        if length > max(buckets):
            raise ValueError(
                f"{prompt.where}: the prompt has {length} tokens, the widest of --buckets holds {max(buckets)}"
            )
        for token in prompt.tokens:
            if not 0 <= token < vocab:
                raise ValueError(f"{prompt.where}: token {token} is outside the vocabulary, 0 to {vocab - 1}")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """All that a text depends on, as JSON has it. Rows a batch and widths of prompts are not among it."""
    names = (
        *("model", "target", "draft", "dtype", "baseline", "tree", "draft_window", "raw", "max_new_tokens"),
        *("ignore_eos", "stop_token", "stop", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
        *("coupled", "seed", "num_samples", "log_probs"),
    )
    settings = {name: getattr(args, name) for name in names}
    settings["tree"] = [None if args.tree is None else repr(args.tree), args.stop_below, args.score_temperature]
    settings["logit_bias"] = [f"{id}={value:g}" for id, value in args.logit_bias]
    settings["prompts"] = hashlib.sha256(Path(args.prompts).read_bytes()).hexdigest()[:16]
    return json.loads(json.dumps(settings))
