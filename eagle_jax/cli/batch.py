"""Answers all prompts of a file: `eagle-jax generate --prompts`, by a running batch that refills its free slots."""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from eagle_jax.cli import answers, progress, text
from eagle_jax.cli.options import model_options
from eagle_jax.cli.options.sampling_options import model_asks, random_key, with_logit_bias
from eagle_jax.cli.options.tree_options import choose_tree_for_many, has_own_shape
from eagle_jax.cli.results import is_last, read_finished
from eagle_jax.decode.plan import plan
from eagle_jax.files import checksums, prompts
from eagle_jax.files.lock import locked_file
from eagle_jax.files.resumable import HeadedLines
from eagle_jax.models.target import Target
from eagle_jax.sampling import SamplingConfig
from eagle_jax.serving import RunningBatch, Task
from eagle_jax.serving import run as run_tasks
from eagle_jax.train import fingerprint
from eagle_jax.tree import TreePolicy

FAULTS_SHOWN = 5  # messages printed about unusable prompts; --out has all of them


def run(args: argparse.Namespace, sampling: SamplingConfig) -> int:
    """Writes a line a text to --out; returns 1 if one of them failed."""
    from rich.console import Console

    settings = _settings(args)
    read_finished(args.out, settings, whole=False)  # before the models are loaded, which may take long
    notes = Console(stderr=True, highlight=False, markup=False)  # a file may be called [red]
    with locked_file(Path(args.out), notes.print):
        return _run(args, sampling, settings, notes)


def _run(args: argparse.Namespace, sampling: SamplingConfig, settings: dict[str, Any], notes: Any) -> int:
    with progress.status(notes, "loading"):
        loaded = model_options.load_models(args)
        tokenizer = loaded.tokenizer
    draft = model_options.chosen_draft(loaded, args)
    choice = choose_tree_for_many(draft, args, sampling)
    stops = model_options.stop_tokens(loaded, args)
    check = functools.partial(model_options.check_prompt, target=loaded.target)
    found = prompts.read_prompts(
        args.prompts, lambda prompt: prompts.encode(tokenizer, prompt, args.raw), check, keep_faults=True
    )
    _check_buckets(found, max(args.buckets))
    bad = [prompt.fault for prompt in found if prompt.fault is not None]
    for fault in bad[:FAULTS_SHOWN]:
        notes.print(f"error: {fault}", soft_wrap=True)
    settings |= _settings_of_models(loaded.target, draft, choice.tree, stops, found)
    finished = read_finished(args.out, settings)
    longest = max(prompt.longest(args.max_new_tokens) for prompt in found)
    pairs = ((index, sample) for index in range(len(found)) for sample in range(args.num_samples))
    jobs = [pair for pair in pairs if pair not in finished]
    if not jobs:
        notes.print(f"All {len(finished)} texts are in {args.out} already.", soft_wrap=True)
        return _exit_code(sum(finished.values()), args, notes)
    ends = text.Ends(args.stop, stops, args.max_new_tokens)
    running = RunningBatch(
        loaded.target,
        draft,
        slots=min(args.batch, len(jobs)),
        capacity=plan(longest, args.max_new_tokens, trained=loaded.target.config.max_position_embeddings).capacity,
        tree=choice.tree,
        buckets=args.buckets,
        sampling=with_logit_bias(sampling, args, loaded.target.config.vocab_size),
        stop_tokens=ends.tokens,
        log_probs=args.log_probs,
    )
    for line in filter(None, (choice.words(draft), model_asks(args))):
        notes.print(line, style="dim", soft_wrap=True)
    with progress.status(notes, "compiling"):
        running.compile()

    def start(job: tuple[int, int]) -> Task[answers.Job]:
        index, sample = job
        key = jax.random.fold_in(random_key(args), index)
        if args.num_samples > 1:
            key = jax.random.fold_in(key, sample)
        return answers.answer_turns(answers.Job(index, sample, found[index], key), rules)

    rules = answers.Rules(tokenizer, args.raw, ends, running.longest_prompt, check)
    ended = run_tasks(running, map(start, jobs))
    with HeadedLines(Path(args.out), settings, is_last) as results:
        failed = _write(ended, results, args, notes, len(jobs) + len(finished), len(finished))
    return _exit_code(failed + sum(finished.values()), args, notes)


def _exit_code(failed: int, args: argparse.Namespace, notes: Any) -> int:
    """Returns 1 if texts of --out failed, in this run or an earlier one, and says so."""
    if failed:
        notes.print(f"error: {failed} of the texts failed; {args.out} says why", soft_wrap=True)
    return 1 if failed else 0


def _write(
    ended: Iterator[answers.Job],
    results: HeadedLines,
    args: argparse.Namespace,
    notes: Any,
    total: int,
    before: int,
) -> int:
    """Writes finished texts and shows the progress; returns how many failed."""
    tokens = failed = count = 0
    rate = ""
    began = time.perf_counter()
    with progress.bar(notes, "texts", total, before) as advance:
        for job in ended:
            results.append(*(_line(job, turn, args) for turn in range(len(job.texts))))
            tokens += sum(len(text.tokens) for text in job.texts)
            failed += sum(text.finish == "failed" for text in job.texts)
            count += len(job.texts)
            rate = f"{tokens / (time.perf_counter() - began):.1f} tok/s"
            advance(1, rate)
    notes.print(f"{count} texts, {tokens} new tokens, {rate}, in {args.out}", style="dim", soft_wrap=True)
    return failed


def _line(job: answers.Job, turn: int, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the output line of one turn's answer."""
    one, turns = job.texts[turn], job.prompt.turns
    line = {
        "index": job.index,
        "sample": job.sample,
        "turn": turn,
        "turns": turns,
        **job.prompt.own,
        "prompt": one.said,
        "text": one.text,
        "tokens": one.tokens,
        "finish": one.finish,
        "error": one.error,
        "cycles": one.cycles,
        "log_probs": [round(value, 6) for value in one.log_probs],
    }
    left_out = {
        "sample": args.num_samples == 1,
        "turn": turns == 1,
        "turns": turns == 1,
        "error": one.error is None,
        "log_probs": not args.log_probs,
    }
    return {name: value for name, value in line.items() if not left_out.get(name)}


def _check_buckets(found: Sequence[prompts.Prompt], widest: int) -> None:
    """Raises ValueError for a prompt that is too long for the widest of --buckets."""
    for prompt in found:
        if len(prompt.tokens) > widest:
            raise ValueError(
                f"{prompt.where}: the prompt has {len(prompt.tokens)} tokens, the widest of --buckets holds {widest}"
            )


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that a text depends on, as JSON values: all but --batch, --buckets and paths of models."""
    names = (
        *("draft_window", "raw", "max_new_tokens", "ignore_eos", "stop_token", "stop"),
        *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "coupled", "seed", "num_samples"),
        "log_probs",
    )
    settings = {name: getattr(args, name) for name in names}
    settings["logit_bias"] = [f"{id}={value:g}" for id, value in args.logit_bias]
    settings["prompts"] = checksums.of_file(args.prompts)
    if args.lookup is not None:  # files begun before the option go on
        settings["lookup"] = args.lookup
    return json.loads(json.dumps(settings))


def _settings_of_models(
    target: Target, draft: Any, tree: TreePolicy, stops: Sequence[int], found: Sequence[prompts.Prompt]
) -> dict[str, Any]:
    """Returns what else a text depends on: fingerprints of weights, tree and token ids, which no path changes."""
    settings = {
        "target_weights": fingerprint.of_model(target),
        "draft_weights": model_options.draft_identity(draft),
        "tree": None if draft is None or has_own_shape(draft) else fingerprint.of_config(tree),
        "stop_tokens": list(stops),
        "prompt_tokens": checksums.of_text(json.dumps([prompt.tokens for prompt in found])),
    }
    return json.loads(json.dumps(settings))
