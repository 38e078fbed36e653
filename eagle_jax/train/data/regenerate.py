"""Writes training data whose answers are the target's own: a head learns best from the text it will draft.

Of a conversation every answer is replaced, in turn, each with the new ones before it. Answers that are calls of tools
stay, as the results that follow belong to them, and so do answers of weight 0. Without any answer, the last user's turn
gets one; a prompt alone is such a turn if there is a chat template. Of a text, tokens, or a prompt with a completion
the beginning stays and the target goes on.

A line of input becomes at most one line of output, in the same order. Its keys beside those of the input's form:

    tokens, loss_mask   what was decoded: prompt and new tokens, and 1 for the new ones. Lists of several documents,
                        where the chat template changes earlier answers, so that no text holds all as they were decoded
    vocabulary          of which tokenizer these are, if there is one; training refuses them with another one
    source              the input's file and line
    finish              how each new text ended: "stop" at an end token, or "length"
    cut_short           why a conversation ends before its last answer: no room was left, or the target said nothing

    OUT.partial         the lines that are done, a window of input lines at a time
    OUT.progress.json   how far that is, and what it was made from

Windows are decoded one at a time, so that a run which was killed and resumed writes the same bytes as any other.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax

from eagle_jax.files import checksums
from eagle_jax.files.jsonl import DataError, Entry, Fault, read_values
from eagle_jax.files.records import (
    CONVERSATIONS,
    FORMS,
    Encoded,
    as_object,
    check_texts,
    conversation_of,
    form_of,
    given_tokens,
    text_tokens,
)
from eagle_jax.files.resumable import StagedLines
from eagle_jax.serving import Answer, Request, RunningBatch, Task, run
from eagle_jax.train import fingerprint
from eagle_jax.train.data.messages import is_learned, normal_messages
from eagle_jax.train.data.records import ReadReport, beginning_tokens, decoded_tokens
from eagle_jax.train.data.rendering import Rendering, chat_template_of
from eagle_jax.train.report import Say

LINES_A_SLOT = 8  # of a window: more leave fewer slots idle at its end, fewer lose less when a run is killed
SAY_EVERY = 10.0  # seconds
FAILED = "failed"
UNFINISHED = "\ufffd"  # what a tokenizer decodes part of a character to
NO_ANSWER = {"role": "assistant", "content": ""}  # where one is to be written


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
class PromptSource:
    """What the texts are made with: a tokenizer, the vocabulary's size, and the ids that end a text.

    tokenizer: None takes lines of token ids only.
    """

    tokenizer: Any
    vocab_size: int
    stop_tokens: Sequence[int]


# Yields prompts, is sent their answers, returns the new record; a Fault where there is none.
Work: TypeAlias = Generator[list[int], Answer, dict[str, Any]]


@dataclasses.dataclass
class Job:
    """A line of input in the making: its next prompt; at the end a record or an error. turn: answers so far."""

    index: int
    entry: Entry
    work: Work
    prompt: list[int] = dataclasses.field(default_factory=list)
    turn: int = -1
    record: dict[str, Any] | None = None
    error: DataError | None = None

    @property
    def done(self) -> bool:
        return self.record is not None or self.error is not None

    def go_on(self, answer: Answer | None = None) -> None:
        """To the next prompt, or to the end."""
        try:
            self.prompt = next(self.work) if answer is None else self.work.send(answer)
            self.turn += 1
        except StopIteration as end:
            self.record = end.value | {"source": self.entry.where}
        except Fault as fault:
            self.error = DataError(self.entry, fault)


def regenerate(
    files: Sequence[str],
    out: Path,
    batch: RunningBatch,
    source: PromptSource,
    options: Options,
    settings: dict[str, Any],
    say: Say,
    overwrite: bool = False,
    total: int | None = None,
    lines_a_slot: int = LINES_A_SLOT,
) -> int:
    """Writes `out`, or goes on with what an earlier call left of it. Ctrl-C keeps the lines that are done.

    Args:
      batch: with a capacity of at least the options' max_length, and the source's stop_tokens.
      settings: what else the texts depend on (the models, the sampling), as JSON has it.
      total: what `check_lines` returned, if it was called already.
      lines_a_slot: of a window, after which what is done is written.
    Returns:
      Lines whose texts end early or are left out because the target's logits were NaN or infinite.
    Raises:
      DataError: at a line that cannot be used, if that is refused; before anything is decoded where that shows it.
      ValueError: if `out` is there, or was begun with other settings or files, or no line can be used.
    """
    made_from = settings | dataclasses.asdict(options)
    made_from["files"] = [checksums.of_file(path) for path in files]
    made_from["tokenizer"] = None if source.tokenizer is None else fingerprint.of_tokenizer(source.tokenizer)
    made_from["stop_tokens"] = list(source.stop_tokens)
    total = check_lines(files, source, options) if total is None else total
    with StagedLines(out, json.loads(json.dumps(made_from)), overwrite, say) as progress:
        if progress.inputs:
            say(f"going on after {progress.inputs} of {total} lines")
        meter = _Meter(say, total, progress.inputs)
        key = jax.random.key(options.seed)
        waiting = jobs(files, source, options, progress.inputs)
        while window := list(itertools.islice(waiting, batch.slots * lines_a_slot)):
            try:
                _decode(batch, window, options, key, meter)
            except KeyboardInterrupt:
                _keep(progress, list(itertools.takewhile(lambda job: job.done, window)), say)
                again = "the same command" + (" without --overwrite" if overwrite else "")
                say(f"stopped: {progress.inputs} of {total} lines are kept; {again} goes on from there")
                raise
            _keep(progress, window, say)
        progress.finish()
    meter.say_now()
    faults = "".join(f"; {count:,} {what}" for what, count in progress.faults.most_common())
    say(f"written: {out}, {progress.records:,} records of {total:,} lines{faults}")
    return sum(count for what, count in progress.faults.items() if what.endswith(FAILED))


def check_lines(files: Sequence[str], source: PromptSource, options: Options) -> int:
    """Returns how many lines there are to work on.

    Raises:
      DataError: at the first line that cannot be used, if that is refused.
      ValueError: if no line can be used; with the reasons.
    """
    total, report = 0, ReadReport()
    for job in jobs(files, source, options):
        total += 1
        if job.error is not None:
            if options.on_error == "refuse":
                raise job.error
            report.add_fault(job.error)
    if report.faults.total() == total:
        why = f"none of {total:,} lines can be used: {'; '.join(report.reasons())}"
        what = why if total else "there is no line to work on"
        raise ValueError(f"{', '.join(files)}: {what}")
    return total


def _keep(progress: StagedLines, done: Sequence[Job], say: Say) -> None:
    """Writes the records of lines that are done, and says what was left out of them."""
    for job in done:
        if job.error is not None:
            say(f"left out: {job.error}")
            progress.faults[f"left out, {job.error.kind}"] += 1
        elif job.record is not None and "cut_short" in job.record:
            progress.faults[f"cut short, {job.record['cut_short']}"] += 1
    progress.add([job.record for job in done if job.record is not None], len(done))


def jobs(files: Sequence[str], source: PromptSource, options: Options, first: int = 0) -> Iterator[Job]:
    """The lines of the files from the `first` on, each with its first prompt or its error."""
    entries = itertools.chain.from_iterable(map(read_values, files))
    for index, entry in enumerate(itertools.islice(entries, first, options.limit), start=first):
        job = Job(index, entry, _work(entry.value, source, options))
        job.go_on()
        yield job


def _decode(batch: RunningBatch, window: Sequence[Job], options: Options, key: jax.Array, meter: _Meter) -> None:
    """Brings the jobs of a window to their ends."""

    def answers(job: Job) -> Task[None]:
        while not job.done:
            room = options.max_length - len(job.prompt)
            answer = yield Request(
                job.prompt,
                jax.random.fold_in(jax.random.fold_in(key, job.index), job.turn),
                max_new_tokens=min(options.max_new_tokens, room),
                on_tokens=meter.count,
            )
            job.go_on(answer)
        meter.lines += 1

    collections.deque(run(batch, map(answers, window)), maxlen=0)


def _work(value: Any, source: PromptSource, options: Options) -> Work:
    """What is to be done for a line."""
    entry = as_object(value)
    kind = _form(entry)
    if kind != "tokens" and source.tokenizer is None:
        raise Fault("no tokenizer", f"a line of {kind} needs a tokenizer, and this target has none: give token ids")
    if kind == "prompt" and (options.chat_template or getattr(source.tokenizer, "chat_template", None)):
        check_texts(entry, ("prompt",))
        entry, kind = {"messages": [{"role": "user", "content": entry["prompt"]}]}, "messages"
    if kind in CONVERSATIONS:
        record = yield from _conversation(entry, source, options)
    else:
        if entry.get("vocabulary") is not None:
            decoded_tokens(entry, source.tokenizer)  # refuses those of another tokenizer
        prompt = _checked(_beginning(entry, kind, source.tokenizer, options.prompt_tokens), source, options)
        answer = yield prompt
        if answer.finish == "failed":
            raise Fault(FAILED, "the target's logits are NaN or infinite")
        mask = [0] * len(prompt) + [1] * len(answer.tokens)
        record = {"tokens": prompt + answer.tokens, "loss_mask": mask, "finish": answer.finish}
    return record if source.tokenizer is None else record | {"vocabulary": fingerprint.of_vocabulary(source.tokenizer)}


def _form(entry: dict[str, Any]) -> str:
    """The one of the FORMS that a line is, or "prompt"; a conversation, if it has decoded tokens beside it."""
    held = {key for keys in FORMS.values() for key in keys if entry.get(key) is not None}
    if held & {*CONVERSATIONS} and entry.get("vocabulary") is not None:
        entry = {key: value for key, value in entry.items() if key != "tokens"}
    return "prompt" if held == {"prompt"} else form_of(entry)


def _beginning(entry: dict[str, Any], kind: str, tokenizer: Any, count: int) -> list[int]:
    """What stays of a text, tokens or a prompt."""
    if kind == "tokens":
        tokens, mask = given_tokens(entry["tokens"], entry.get("loss_mask"))
        learned = list(mask).index(1) if 1 in mask else len(tokens)
        return list(tokens[: learned or count])
    check_texts(entry, FORMS.get(kind, ("prompt",)))
    if kind == "text":
        return beginning_tokens(tokenizer, entry["text"])[:count]
    return beginning_tokens(tokenizer, entry["prompt"])


def _checked(prompt: list[int], source: PromptSource, options: Options) -> list[int]:
    """A prompt that can be decoded."""
    if not prompt:
        raise Fault("empty text", "the prompt has no tokens")
    outside = next((token for token in prompt if not 0 <= token < source.vocab_size), None)
    if outside is not None:
        raise Fault("token id out of range", f"the prompt holds {outside}; ids are 0 to {source.vocab_size - 1}")
    if len(prompt) >= options.max_length:
        raise Fault("too long", f"the prompt has {len(prompt)} tokens, which leave no room in {options.max_length}")
    return prompt


def _conversation(entry: dict[str, Any], source: PromptSource, options: Options) -> Work:
    """A conversation up to the last answer that could be had; a Fault if that is none."""
    messages, tools = conversation_of(entry)
    chat = normal_messages(messages, answered=False)
    learned = [is_learned(given, message) for given, message in zip(messages, chat, strict=True)]
    shown = messages if entry.get("messages") is not None else chat  # other turns stay as they were given
    template = chat_template_of(source.tokenizer, options.chat_template, tools, "--chat-template")
    rendering = Rendering(source.tokenizer, template, tools)
    chat = rendering.with_calls(chat)
    if not any(message["role"] == "assistant" for message in chat):
        chat, shown, learned = [*chat, NO_ANSWER], [*shown, NO_ANSWER], [*learned, True]

    history: list[dict[str, Any]] = []  # for the template
    written: list[dict[str, Any]] = []
    whole = 0  # of `written`, up to the last new answer
    finish: list[str] = []
    documents: list[Encoded] = []
    end: dict[str, Any] = {"tools": tools} if tools else {}
    try:
        for message, given, new_answer in zip(chat, shown, learned, strict=True):
            if not new_answer or message.get("tool_calls"):
                history.append(message)
                written.append(given)
                continue
            before = rendering.text(history, prompt=True)
            ids = text_tokens(source.tokenizer, before, add_special_tokens=False)  # the specials are in it
            answer = yield _checked(ids, source, options)
            text = _text(answer, source)
            new = {"role": "assistant", "content": _content(text, rendering, history, before)}
            history.append(new)
            written.append(new)
            _add_document(documents, ids, answer.tokens)
            whole, finish = len(written), [*finish, answer.finish]
    except Fault as fault:
        if not finish:
            raise
        written = written[:whole]
        end["cut_short"] = fault.kind
    if not finish:
        raise Fault("wrong roles", "every answer calls a tool or has weight 0: there is none to write")
    tokens, masks = zip(*documents, strict=True)
    one = len(documents) == 1
    decoded = {"tokens": tokens[0] if one else list(tokens), "loss_mask": masks[0] if one else list(masks)}
    return {"messages": written, "finish": finish} | end | decoded


def _add_document(documents: list[Encoded], prompt: list[int], answer: list[int]) -> None:
    """Adds what was decoded: to the last document if the prompt goes on with that, else as another one."""
    mask: list[int] = []
    if documents and prompt[: len(documents[-1].tokens)] == documents[-1].tokens:
        mask += documents.pop().mask
    mask += [0] * (len(prompt) - len(mask)) + [1] * len(answer)
    documents.append(Encoded(prompt + answer, mask))


def _text(answer: Answer, source: PromptSource) -> str:
    """An answer as text, without the token that ended it."""
    if answer.finish == "failed":
        raise Fault(FAILED, "the target's logits are NaN or infinite")
    tokens = answer.tokens[:-1] if answer.finish == "stop" else answer.tokens
    text = source.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = text.rstrip(UNFINISHED) if answer.finish == "length" else text
    if not text.strip():
        raise Fault("empty answer", "the target says nothing")
    return text


def _content(text: str, rendering: Rendering, history: list[dict[str, Any]], before: str) -> str:
    """The content that has the template write `text` after `before`: some put a space before every answer."""
    for content in (text, text.strip()):
        new = {"role": "assistant", "content": content}
        if rendering.text([*history, new]).startswith(before + text.rstrip()):
            return content
    return text


class _Meter:
    """Tells how fast it goes, and how long it will take. lines: done so far. tokens: new ones of this call."""

    def __init__(self, say: Say, total: int, lines: int):
        self.say, self.total, self.first, self.lines, self.tokens = say, total, lines, lines, 0
        self.began = self.last = time.monotonic()

    def count(self, tokens: Sequence[int]) -> None:
        """Counts new tokens."""
        self.tokens += len(tokens)
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
