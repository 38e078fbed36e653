"""Training data whose answers the target writes itself: a head learns best from the text it will draft.

Of a conversation every answer is replaced, in turn, each with the new ones before it; answers that are calls of tools
stay, as the results that follow belong to them. Of a text, tokens or a prompt the beginning stays and the target goes
on. A line of input becomes at most one line of output, in the same order; its "source" names the input's file and line,
its "finish" tells how each new text ended ("stop" at an end token, or "length"). A conversation that cannot go on (no
room is left, or the target said nothing) ends with the answer before, and "cut_short" tells why.

    OUT.partial         the lines that are done, a window of input lines at a time
    OUT.progress.json   how far that is, and what it was made from

A window is decoded alone, so that a run which was killed comes to the same bytes as one that was not.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import jax

from eagle_jax.api import Chunk
from eagle_jax.jsonl import DataError, Entry, Fault, read_values
from eagle_jax.train import fingerprint
from eagle_jax.train.chat import normal_messages, template_errors
from eagle_jax.train.progress import Progress
from eagle_jax.train.records import as_object, beginning_tokens, check_texts, conversation_of, format_of, given_tokens
from eagle_jax.train.say import Say

CYCLES = 4  # between two looks at the rows
LINES_A_ROW = 8  # of a window: more leave fewer rows idle at its end, fewer lose less when a run is killed
SAY_EVERY = 10.0  # seconds
FAILED = "failed"
UNFINISHED = "\ufffd"  # what a tokenizer decodes part of a character to


class Decoder(Protocol):
    """B rows that decode prompts; a row's text depends on its prompt and key alone."""

    def insert(self, row: int, prompt: Sequence[int], key: jax.Array, max_new_tokens: int) -> Any:
        """Gives a row a prompt, which the next `advance` runs."""

    def advance(self, cycles: int) -> Chunk:
        """The rows' next tokens, as NumPy arrays."""


@dataclasses.dataclass(frozen=True)
class Options:
    """max_length: most tokens of a prompt with what follows it. prompt_tokens: of texts and tokens without a prompt."""

    max_length: int = 2048
    max_new_tokens: int = 512
    prompt_tokens: int = 32
    on_error: Literal["refuse", "skip"] = "refuse"
    limit: int | None = None
    chat_template: str | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """What the texts are made with: a tokenizer, the vocabulary's size, and the ids that end a text."""

    tokenizer: Any
    vocab_size: int
    stop_tokens: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Answer:
    """New tokens, with the one that ended them. finish: "stop", "length" or "failed"."""

    tokens: list[int]
    finish: str


# Yields prompts, is sent their answers, returns the new record; a Fault where there is none.
Work: TypeAlias = Generator[list[int], Answer, dict[str, Any]]


@dataclasses.dataclass
class Job:
    """A line of input in the making: its next prompt and what was decoded of it; at the end a record or an error."""

    index: int
    entry: Entry
    work: Work
    prompt: list[int] = dataclasses.field(default_factory=list)
    turn: int = -1
    new: list[int] = dataclasses.field(default_factory=list)
    record: dict[str, Any] | None = None
    error: DataError | None = None

    @property
    def done(self) -> bool:
        return self.record is not None or self.error is not None

    def go_on(self, answer: Answer | None = None) -> None:
        """To the next prompt, or to the end."""
        try:
            self.prompt = next(self.work) if answer is None else self.work.send(answer)
            self.turn, self.new = self.turn + 1, []
        except StopIteration as end:
            self.record = end.value | {"source": self.entry.where}
        except Fault as fault:
            self.error = DataError(self.entry, fault)


def regenerate(
    files: Sequence[str],
    out: Path,
    decoder: Decoder,
    rows: int,
    source: Source,
    options: Options,
    settings: dict[str, Any],
    say: Say,
    overwrite: bool = False,
) -> int:
    """Writes `out`, or goes on with what an earlier call left of it.

    Args:
      rows: of the decoder.
      settings: what else the texts depend on (the models, the sampling), as JSON has it.
    Returns:
      Lines whose texts end early or are left out because the target's logits were NaN or infinite.
    Raises:
      DataError: at a line that cannot be used, if that is refused; before anything is decoded where that shows it.
      ValueError: if `out` is there, or was begun with other settings or files.
    """
    made_from = settings | dataclasses.asdict(options)
    made_from["files"] = [fingerprint.of_file(path) for path in files]
    made_from["tokenizer"] = fingerprint.of_tokenizer(source.tokenizer)
    made_from["stop_tokens"] = list(source.stop_tokens)
    total = 0
    for job in jobs(files, source, options):
        total += 1
        if job.error is not None and options.on_error == "refuse":
            raise job.error
    with Progress(out, json.loads(json.dumps(made_from)), overwrite) as progress:
        if progress.inputs:
            say(f"going on after {progress.inputs} of {total} lines")
        meter = _Meter(say, total, progress.inputs)
        key = jax.random.key(options.seed)
        waiting = jobs(files, source, options, progress.inputs)
        while window := list(itertools.islice(waiting, rows * LINES_A_ROW)):
            _decode(decoder, rows, window, source, options, key, meter)
            for job in window:
                if job.error is not None:
                    say(f"left out: {job.error}")
                    progress.faults[f"left out, {job.error.kind}"] += 1
                elif job.record is not None and "cut_short" in job.record:
                    progress.faults[f"cut short, {job.record['cut_short']}"] += 1
            progress.add([job.record for job in window if job.record is not None], len(window))
        progress.finish()
    meter.say_now()
    faults = "".join(f"; {count:,} {what}" for what, count in progress.faults.most_common())
    say(f"written: {out}, {progress.records:,} records of {total:,} lines{faults}")
    return sum(count for what, count in progress.faults.items() if what.endswith(FAILED))


def jobs(files: Sequence[str], source: Source, options: Options, first: int = 0) -> Iterator[Job]:
    """The lines of the files from the `first` on, each with its first prompt or its error."""
    entries = itertools.chain.from_iterable(map(read_values, files))
    for index, entry in enumerate(itertools.islice(entries, first, options.limit), start=first):
        job = Job(index, entry, _work(entry.value, source, options))
        job.go_on()
        yield job


def _decode(
    decoder: Decoder,
    rows: int,
    window: Sequence[Job],
    source: Source,
    options: Options,
    key: jax.Array,
    meter: _Meter,
) -> None:
    """Brings the jobs of a window to their ends. A row that ends takes the next prompt."""
    waiting = collections.deque(job for job in window if not job.done)
    running: dict[int, Job] = {}
    meter.lines += len(window) - len(waiting)
    while waiting or running:
        for row in range(rows):
            if row not in running and waiting:
                job = running[row] = waiting.popleft()
                own = jax.random.fold_in(jax.random.fold_in(key, job.index), job.turn)
                room = options.max_length - len(job.prompt)
                decoder.insert(row, job.prompt, own, min(options.max_new_tokens, room))
        chunk = decoder.advance(CYCLES)
        for row, job in list(running.items()):
            count = int(chunk.counts[row])
            job.new += chunk.tokens[row, :count].tolist()
            meter.tokens += count
            if chunk.done[row]:
                del running[row]
                stopped = bool(job.new) and job.new[-1] in source.stop_tokens
                job.go_on(Answer(job.new, "failed" if chunk.failed[row] else "stop" if stopped else "length"))
                meter.lines += job.done
                if not job.done:
                    waiting.appendleft(job)
        meter.say_sometimes()


def _work(value: Any, source: Source, options: Options) -> Work:
    """What is to be done for a line."""
    entry = as_object(value)
    kind = format_of(entry)
    if kind in ("messages", "conversations"):
        return (yield from _conversation(entry, source, options))
    prompt = _checked(_beginning(entry, kind, source.tokenizer, options.prompt_tokens), source, options)
    answer = yield prompt
    if answer.finish == "failed":
        raise Fault(FAILED, "the target's logits are NaN or infinite")
    mask = [0] * len(prompt) + [1] * len(answer.tokens)
    return {"tokens": prompt + answer.tokens, "loss_mask": mask, "finish": answer.finish}


def _beginning(entry: dict[str, Any], kind: str, tokenizer: Any, count: int) -> list[int]:
    """What stays of a text, tokens or a prompt."""
    if kind == "tokens":
        tokens, mask = given_tokens(entry["tokens"], entry.get("loss_mask"))
        learned = list(mask).index(1) if 1 in mask else len(tokens)
        return list(tokens[: learned or count])
    check_texts(entry, kind)
    if kind == "text":
        return beginning_tokens(tokenizer, entry["text"])[:count]
    return beginning_tokens(tokenizer, entry["prompt"])


def _checked(prompt: list[int], source: Source, options: Options) -> list[int]:
    """A prompt that can be decoded."""
    if not prompt:
        raise Fault("empty text", "the prompt has no tokens")
    outside = next((token for token in prompt if not 0 <= token < source.vocab_size), None)
    if outside is not None:
        raise Fault("token id out of range", f"the prompt holds {outside}; ids are 0 to {source.vocab_size - 1}")
    if len(prompt) >= options.max_length:
        raise Fault("too long", f"the prompt has {len(prompt)} tokens, which leave no room in {options.max_length}")
    return prompt


def _conversation(entry: dict[str, Any], source: Source, options: Options) -> Work:
    """A conversation up to the last answer that could be had; a Fault if that is none."""
    messages, tools = conversation_of(entry)
    chat = normal_messages(messages)
    shown = messages if entry.get("messages") is not None else chat  # other turns stay as they were given
    tokenizer = source.tokenizer
    try:
        template = tokenizer.get_chat_template(options.chat_template, tools)
    except ValueError as error:
        raise ValueError(f"conversations need a chat template, give --chat-template: {error}") from error

    def render(before: Sequence[dict[str, Any]], prompt: bool) -> str:
        with template_errors():
            return tokenizer.apply_chat_template(
                list(before), tools=tools, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )

    history: list[dict[str, Any]] = []  # for the template
    written: list[dict[str, Any]] = []
    whole = 0  # of `written`, up to the last new answer
    finish: list[str] = []
    end: dict[str, Any] = {"tools": tools} if tools else {}
    try:
        for message, given in zip(chat, shown, strict=True):
            if message["role"] != "assistant" or message.get("tool_calls"):
                history.append(message)
                written.append(given)
                continue
            before = render(history, prompt=True)
            ids = tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"]  # the template wrote them
            answer = yield _checked(ids, source, options)
            text = _text(answer, source)
            new = {"role": "assistant", "content": _content(text, lambda new: render([*history, new], False), before)}
            history.append(new)
            written.append(new)
            whole, finish = len(written), [*finish, answer.finish]
    except Fault as fault:
        if not finish:
            raise
        written = written[:whole]
        end["cut_short"] = fault.kind
    if not finish:
        raise Fault("wrong roles", "every answer calls a tool: there is none to write")
    return {"messages": written, "finish": finish} | end


def _text(answer: Answer, source: Source) -> str:
    """An answer as text, without the token that ended it."""
    if answer.finish == "failed":
        raise Fault(FAILED, "the target's logits are NaN or infinite")
    tokens = answer.tokens[:-1] if answer.finish == "stop" else answer.tokens
    text = source.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = text.rstrip(UNFINISHED) if answer.finish == "length" else text
    if not text.strip():
        raise Fault("empty answer", "the target says nothing")
    return text


def _content(text: str, render: Callable[[dict[str, Any]], str], before: str) -> str:
    """The content that has the template write `text` after `before`: some put a space before every answer."""
    for content in (text, text.strip()):
        if render({"role": "assistant", "content": content}).startswith(before + text.rstrip()):
            return content
    return text


class _Meter:
    """Tells how fast it goes, and how long it will take. lines: done so far. tokens: new ones of this call."""

    def __init__(self, say: Say, total: int, lines: int):
        self.say, self.total, self.first, self.lines, self.tokens = say, total, lines, lines, 0
        self.began = self.last = time.monotonic()

    def say_sometimes(self) -> None:
        if time.monotonic() - self.last >= SAY_EVERY:
            self.say_now()

    def say_now(self) -> None:
        self.last = time.monotonic()
        seconds = max(self.last - self.began, 1e-9)
        line = f"{self.lines:,} of {self.total:,} lines, {self.tokens:,} new tokens, {self.tokens / seconds:,.1f} tok/s"
        if self.first < self.lines < self.total:
            left = round(seconds * (self.total - self.lines) / (self.lines - self.first))
            line += f", ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        self.say(line)
