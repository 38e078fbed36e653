"""Regenerates the answers of training data with the target: a head learns best from the text that it will draft.

All answers of a conversation are replaced in turn, each after the new ones before it. Answers with tool calls stay,
because the tool results after them would not match, and so do answers of weight 0. A conversation that ends in a user's
turn gets an answer; a prompt alone is such a turn if there is a chat template. Texts, tokens, and prompts with a
completion keep their prefix, which the target continues.

A line of input becomes at most one line of output, in the same order. It adds these keys:

    tokens, loss_mask   the decoded tokens, prompts included, and 1 for the new ones. Lists of several documents where
                        the chat template changes earlier answers, because no single text contains all of them then
    vocabulary          the tokenizer's fingerprint, if there is one; training refuses another tokenizer
    source              file and line of the input
    finish              the end of each new text: "stop" at an end token, or "length"
    cut_short           why a conversation ends before its last answer: it is full, or the target wrote nothing

    OUT.partial         finished lines, a window of input lines at a time
    OUT.progress.json   the number of finished lines, and checksums of the inputs

Windows are decoded one after another, so that a killed and resumed run writes the same bytes.
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

LINES_A_SLOT = 8  # input lines of a window per slot: more keep slots busier, fewer lose less when a run is killed
SAY_EVERY = 10.0  # seconds
FAILED = "failed"
UNFINISHED = "\ufffd"  # how tokenizers decode an incomplete character
NO_ANSWER = {"role": "assistant", "content": ""}  # the place of an answer to write


@dataclasses.dataclass(frozen=True)
class Options:
    """max_length: the most tokens of a prompt and its answer. prompt_tokens: the prefix kept of texts and token ids."""

    max_length: int = 2048
    max_new_tokens: int = 512
    prompt_tokens: int = 32
    on_error: Literal["refuse", "skip"] = "refuse"
    limit: int | None = None
    chat_template: str | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class PromptSource:
    """The tokenizer, the size of the vocabulary, and the ids that end a text.

    tokenizer: None allows lines of token ids only.
    """

    tokenizer: Any
    vocab_size: int
    stop_tokens: Sequence[int]


# A generator that yields prompts, is sent their answers, and returns the new record or raises a Fault.
Work: TypeAlias = Generator[list[int], Answer, dict[str, Any]]


@dataclasses.dataclass
class Job:
    """The state of one input line: its next prompt, or at the end a record or an error. turn: answers so far."""

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
        """Advances to the next prompt, or to the end."""
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
    """Writes `out`, or resumes an earlier call. Ctrl-C keeps the finished lines.

    Args:
      batch: has a capacity of at least the options' max_length, and the source's stop_tokens.
      settings: everything else that the texts depend on (models, sampling), as JSON values.
      total: the result of `check_lines`, if the caller has it.
      lines_a_slot: input lines of a window per slot; each window is written when it is done.
    Returns:
      The number of lines that are cut or dropped because the target's logits were NaN or infinite.
    Raises:
      DataError: at an unusable line, if these are refused; before decoding where reading shows it.
      ValueError: if `out` exists, was begun with other settings or files, or no line is usable.
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
    """Returns the number of usable lines.

    Raises:
      DataError: at the first unusable line, if these are refused.
      ValueError: if no line is usable; with the reasons.
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
    """Writes the records of finished lines, and reports the dropped ones."""
    for job in done:
        if job.error is not None:
            say(f"left out: {job.error}")
            progress.faults[f"left out, {job.error.kind}"] += 1
        elif job.record is not None and "cut_short" in job.record:
            progress.faults[f"cut short, {job.record['cut_short']}"] += 1
    progress.add([job.record for job in done if job.record is not None], len(done))


def jobs(files: Sequence[str], source: PromptSource, options: Options, first: int = 0) -> Iterator[Job]:
    """Yields the lines of the files from number `first` on, each with its first prompt or its error."""
    entries = itertools.chain.from_iterable(map(read_values, files))
    for index, entry in enumerate(itertools.islice(entries, first, options.limit), start=first):
        job = Job(index, entry, _work(entry.value, source, options))
        job.go_on()
        yield job


def _decode(batch: RunningBatch, window: Sequence[Job], options: Options, key: jax.Array, meter: _Meter) -> None:
    """Decodes all answers of a window."""

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
    """Returns the generator of prompts for a line."""
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
            decoded_tokens(entry, source.tokenizer)  # raises for another tokenizer
        prompt = _checked(_beginning(entry, kind, source.tokenizer, options.prompt_tokens), source, options)
        answer = yield prompt
        if answer.finish == "failed":
            raise Fault(FAILED, "the target's logits are NaN or infinite")
        mask = [0] * len(prompt) + [1] * len(answer.tokens)
        record = {"tokens": prompt + answer.tokens, "loss_mask": mask, "finish": answer.finish}
    return record if source.tokenizer is None else record | {"vocabulary": fingerprint.of_vocabulary(source.tokenizer)}


def _form(entry: dict[str, Any]) -> str:
    """Returns which of the FORMS a line has, or "prompt". Messages come before decoded tokens of the same line."""
    held = {key for keys in FORMS.values() for key in keys if entry.get(key) is not None}
    if held & {*CONVERSATIONS} and entry.get("vocabulary") is not None:
        entry = {key: value for key, value in entry.items() if key != "tokens"}
    return "prompt" if held == {"prompt"} else form_of(entry)


def _beginning(entry: dict[str, Any], kind: str, tokenizer: Any, count: int) -> list[int]:
    """Returns the tokens of the prefix that a text, token ids or a prompt keeps."""
    if kind == "tokens":
        tokens, mask = given_tokens(entry["tokens"], entry.get("loss_mask"))
        learned = list(mask).index(1) if 1 in mask else len(tokens)
        return list(tokens[: learned or count])
    check_texts(entry, FORMS.get(kind, ("prompt",)))
    if kind == "text":
        return beginning_tokens(tokenizer, entry["text"])[:count]
    return beginning_tokens(tokenizer, entry["prompt"])


def _checked(prompt: list[int], source: PromptSource, options: Options) -> list[int]:
    """Returns the prompt; raises a Fault if it cannot be decoded."""
    if not prompt:
        raise Fault("empty text", "the prompt has no tokens")
    outside = next((token for token in prompt if not 0 <= token < source.vocab_size), None)
    if outside is not None:
        raise Fault("token id out of range", f"the prompt holds {outside}; ids are 0 to {source.vocab_size - 1}")
    if len(prompt) >= options.max_length:
        raise Fault("too long", f"the prompt has {len(prompt)} tokens, which leave no room in {options.max_length}")
    return prompt


def _conversation(entry: dict[str, Any], source: PromptSource, options: Options) -> Work:
    """Regenerates a conversation up to the last possible answer; raises a Fault if none is possible."""
    messages, tools = conversation_of(entry)
    chat = normal_messages(messages, answered=False)
    learned = [is_learned(given, message) for given, message in zip(messages, chat, strict=True)]
    shown = messages if entry.get("messages") is not None else chat  # other turns are written as they were read
    template = chat_template_of(source.tokenizer, options.chat_template, tools, "--chat-template")
    rendering = Rendering(source.tokenizer, template, tools)
    chat = rendering.with_calls(chat)
    if not any(message["role"] == "assistant" for message in chat):
        chat, shown, learned = [*chat, NO_ANSWER], [*shown, NO_ANSWER], [*learned, True]

    history: list[dict[str, Any]] = []  # normalised turns so far, for the template
    written: list[dict[str, Any]] = []
    whole = 0  # length of `written` after the last new answer
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
            ids = text_tokens(source.tokenizer, before, add_special_tokens=False)  # the template wrote the specials
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
    """Extends the last document if it is a prefix of the prompt; otherwise adds a document."""
    mask: list[int] = []
    if documents and prompt[: len(documents[-1].tokens)] == documents[-1].tokens:
        mask += documents.pop().mask
    mask += [0] * (len(prompt) - len(mask)) + [1] * len(answer)
    documents.append(Encoded(prompt + answer, mask))


def _text(answer: Answer, source: PromptSource) -> str:
    """Detokenises an answer without its stop token."""
    if answer.finish == "failed":
        raise Fault(FAILED, "the target's logits are NaN or infinite")
    tokens = answer.tokens[:-1] if answer.finish == "stop" else answer.tokens
    text = source.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = text.rstrip(UNFINISHED) if answer.finish == "length" else text
    if not text.strip():
        raise Fault("empty answer", "the target says nothing")
    return text


def _content(text: str, rendering: Rendering, history: list[dict[str, Any]], before: str) -> str:
    """Returns the content that the template renders as `text` after `before`: some add a space before answers."""
    for content in (text, text.strip()):
        new = {"role": "assistant", "content": content}
        if rendering.text([*history, new]).startswith(before + text.rstrip()):
            return content
    return text


class _Meter:
    """Logs speed and remaining time. lines: done so far. tokens: new ones of this call."""

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
