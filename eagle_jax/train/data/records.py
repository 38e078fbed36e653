"""Reads training data: files of texts, token ids or conversations, as tokens with a loss mask.

A file is JSON Lines or one JSON array (see `eagle_jax.files.jsonl`). A record is an object of one of these forms; its
other keys are ignored:

  {"text": "..."}                               all of it is learned
  {"prompt": "...", "completion": "..."}        the completion is learned
  {"tokens": [1, 2], "loss_mask": [0, 1]}       without a loss_mask, all of it is learned
  {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}        OpenAI; tools are optional
  {"conversations": [{"from": "human", "value": "..."}, ...], "system": "..."}   ShareGPT; a system text is optional

The assistant's answers of a conversation are learned unless their "weight" is 0: see `eagle_jax.train.data.chat`. Files
of `eagle-jax train regenerate` contain the messages, the decoded tokens with their loss_mask, and "vocabulary", the
fingerprint of the tokenizer. The tokens are learned exactly as decoded, then. Where the chat template changes earlier
answers, tokens and loss_mask are lists of documents.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

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
from eagle_jax.train import fingerprint
from eagle_jax.train.data.chat import conversation_documents

OnError: TypeAlias = Literal["refuse", "skip"]
TooLong: TypeAlias = Literal["refuse", "skip", "truncate", "split"]

MESSAGES_KEPT = 3  # messages a report keeps per kind of fault


@dataclasses.dataclass(frozen=True)
class Record:
    """A document. tokens: [T] int32. loss_mask: [T] uint8, 1 for the tokens to learn, at least one."""

    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclasses.dataclass
class ReadReport:
    """Counts of `read_records` so far.

    files: opened. lines: lines that are not blank, and entries of JSON arrays. entries: the latter that are valid.
    records, tokens, learned: yielded; learned counts the mask's ones.
    truncated, split: over-long lines that were cut. left_out: parts of split ones without a token to learn.
    unseen: documents dropped because the loss predicts none of their tokens to learn.
    unrolled: conversations with one document per answer.
    faults: {kind: lines} skipped or refused. messages: {kind: the first few}. unused: {path: its faults}.
    """

    files: int = 0
    lines: int = 0
    entries: int = 0
    records: int = 0
    tokens: int = 0
    learned: int = 0
    truncated: int = 0
    split: int = 0
    left_out: int = 0
    unseen: int = 0
    unrolled: int = 0
    faults: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    messages: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    unused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add_fault(self, error: DataError) -> None:
        """Counts a line that was skipped or refused."""
        self.faults[error.kind] += 1
        self.unused[error.path] += 1
        kept = self.messages.setdefault(error.kind, [])
        if len(kept) < MESSAGES_KEPT:
            kept.append(str(error))

    def add_record(self, record: Record) -> None:
        """Counts a record that is yielded."""
        self.records += 1
        self.tokens += len(record.tokens)
        self.learned += int(record.loss_mask.sum())

    def counted(self, number: int) -> str:
        """Formats a number of lines: "3 lines", or "3 entries" if some come from a JSON array."""
        return _count(number, "entry" if self.entries else "line")

    def reasons(self) -> list[str]:
        """Returns a sentence per kind of fault: its count and first message; the most common first."""
        return [f"{count:,} {kind}, first {self.messages[kind][0]}" for kind, count in self.faults.most_common()]

    def summary(self) -> str:
        """Formats the counts for a log, then a line per file and kind of fault with its first message.

        If there is no record at all, all kept messages are shown.
        """
        line = f"{_count(self.records, 'record')} of {self.counted(self.lines)} in {_count(self.files, 'file')}: "
        line += f"{_count(self.tokens, 'token')}, {self.learned:,} to learn"
        if self.truncated:
            line += f"; {self.counted(self.truncated)} truncated"
        if self.split:
            line += f"; {self.counted(self.split)} split ({_count(self.left_out, 'part')} without anything to learn)"
        if self.unrolled:
            line += (
                f"; {_count(self.unrolled, 'conversation')} split by answers, as the chat template changes earlier ones"
            )
        if self.unseen:
            line += (
                f"; {_count(self.unseen, 'document')} left out, as no loss sees a token to learn in them (too short)"
            )
        if self.faults:
            single = ", or single answers of conversations," if self.unrolled else ""
            line += f"; {self.counted(self.faults.total())}{single} not used"
        lines = [line]
        if self.files > 1:
            lines += [f"  {path}: {self.counted(count)} not used" for path, count in self.unused.items()]
        for (kind, _), reason in zip(self.faults.most_common(), self.reasons(), strict=True):
            lines.append(f"  {reason}")
            lines += [f"    {message}" for message in self.messages[kind][1:] if not self.records]
        return "\n".join(lines)


def read_records(
    files: Sequence[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    vocab_size: int,
    max_length: int,
    on_error: OnError = "refuse",
    too_long: TooLong | None = None,
    chat_template: str | None = None,
    add_end: bool = True,
    predicted: slice = slice(None),
    report: ReadReport | None = None,
) -> Iterator[Record]:
    """Yields the records of files in order, lazily.

    Args:
      files: JSON Lines or JSON arrays; see `eagle_jax.files.jsonl.read_values`.
      tokenizer: of transformers; None suffices for token ids.
      vocab_size: the exclusive bound of ids.
      max_length: the most tokens of a record.
      on_error: for unusable lines. "refuse" raises, "skip" counts them in the report.
      too_long: for lines above max_length; None: as on_error. "truncate" keeps the first max_length tokens. "split"
        yields parts of max_length, and drops parts without a token to learn.
      chat_template: Jinja that replaces the tokenizer's template.
      add_end: append the tokenizer's end-of-text token, if it has one, to texts and completions.
      predicted: the positions of a document that the loss predicts. Documents without a token to learn there are
        dropped and counted.
      report: updated as records are yielded; complete after the last.
    Raises:
      DataError: at the first unusable line, if on_error is "refuse".
      ValueError: immediately for a wrong setting; at the first line that needs a missing tokenizer or chat template.
    """
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error must be one of {', '.join(get_args(OnError))}, got {on_error!r}")
    if too_long is not None and too_long not in get_args(TooLong):
        raise ValueError(f"too_long must be None or one of {', '.join(get_args(TooLong))}, got {too_long!r}")
    if vocab_size < 1 or max_length < 1:
        raise ValueError(f"vocab_size and max_length must be positive, got {vocab_size} and {max_length}")
    paths = [os.fspath(path) for path in ([files] if isinstance(files, (str, os.PathLike)) else files)]
    encode = functools.partial(_encode, tokenizer=tokenizer, chat_template=chat_template, add_end=add_end)
    fit = functools.partial(_fit, vocab_size=vocab_size, max_length=max_length, cut=too_long, predicted=predicted)
    return _records(paths, encode, fit, on_error, too_long or on_error, ReadReport() if report is None else report)


def _records(
    paths: Sequence[str],
    encode: Callable[[dict[str, Any]], list[Encoded | Fault]],
    fit: Callable[[Encoded, ReadReport], list[Record]],
    on_error: str,
    too_long: str,
    report: ReadReport,
) -> Iterator[Record]:
    def count(entry: Entry, fault: Fault) -> None:
        error = DataError(entry, fault)
        report.add_fault(error)
        if (too_long if fault.kind == "too long" else on_error) == "refuse":
            raise error from fault

    for path in paths:
        report.files += 1
        for entry in read_values(path):
            report.lines += 1
            report.entries += entry.number is not None and not isinstance(entry.value, Fault)
            try:
                documents = encode(as_object(entry.value))
            except Fault as fault:
                count(entry, fault)
                continue
            report.unrolled += len(documents) > 1
            for document in documents:
                try:
                    if isinstance(document, Fault):
                        raise document
                    records = fit(document, report)
                except Fault as fault:
                    count(entry, fault)
                    continue
                for record in records:
                    report.add_record(record)
                    yield record


def _encode(entry: dict[str, Any], tokenizer: Any, chat_template: str | None, add_end: bool) -> list[Encoded | Fault]:
    """Returns the documents of a record: tokens and masks, or a Fault for an answer that cannot be learned."""
    if entry.get("vocabulary") is not None and entry.get("tokens") is not None:
        return list(decoded_tokens(entry, tokenizer))
    kind = form_of(entry)
    if kind == "tokens":
        return [given_tokens(entry["tokens"], entry.get("loss_mask"))]
    if tokenizer is None:
        raise ValueError(f"a record of {kind} needs a tokenizer, and there is none: give one, or token ids as data")
    if kind in CONVERSATIONS:
        messages, tools = conversation_of(entry)
        return list(conversation_documents(tokenizer, messages, chat_template=chat_template, tools=tools))
    check_texts(entry, FORMS[kind])
    if kind == "text":
        tokens = _with_end(text_tokens(tokenizer, entry["text"]), tokenizer, add_end)
        return [Encoded(tokens, np.ones(len(tokens), np.uint8))]
    return [_prompt_and_completion(tokenizer, entry["prompt"], entry["completion"], add_end)]


def decoded_tokens(entry: dict[str, Any], tokenizer: Any) -> list[Encoded]:
    """Returns the documents that `eagle-jax train regenerate` stored as tokens, if its tokenizer was this one."""
    theirs, ours = entry["vocabulary"], None if tokenizer is None else fingerprint.of_vocabulary(tokenizer)
    if ours not in (None, theirs):
        raise Fault(
            "other tokenizer",
            f"its tokens are those of another tokenizer (vocabulary {theirs}, this one's is {ours}); let this target "
            'regenerate it, or take "tokens" out of it where it has messages',
        )
    tokens, mask = entry["tokens"], entry.get("loss_mask")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], list):
        return [given_tokens(tokens, mask)]
    masks = mask if isinstance(mask, list) else [None] * len(tokens)
    if len(masks) != len(tokens):
        raise Fault("bad loss mask", f'"loss_mask" has {len(masks)} lists for {len(tokens)} of tokens')
    return list(map(given_tokens, tokens, masks))


def _prompt_and_completion(tokenizer: Any, prompt: str, completion: str, add_end: bool) -> Encoded:
    """Tokenises prompt and completion together if that keeps the prompt's tokens as a prefix; else separately."""
    before = beginning_tokens(tokenizer, prompt)
    tokens = text_tokens(tokenizer, prompt + completion)
    if tokens[: len(before)] != before:
        tokens = before + text_tokens(tokenizer, completion, add_special_tokens=False)
    tokens = _with_end(tokens, tokenizer, add_end)
    mask = np.ones(len(tokens), np.uint8)
    mask[: len(before)] = 0
    return Encoded(tokens, mask)


def beginning_tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokenises a prefix: without a final end-of-text token."""
    tokens = text_tokens(tokenizer, text)
    return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens  # some tokenizers append it to every text


def _with_end(tokens: list[int], tokenizer: Any, add_end: bool) -> list[int]:
    end = tokenizer.eos_token_id
    return tokens if not add_end or end is None or tokens[-1:] == [end] else [*tokens, end]


def _fit(
    encoded: Encoded, report: ReadReport, *, vocab_size: int, max_length: int, cut: str | None, predicted: slice
) -> list[Record]:
    """Checks a document, and cuts it to max_length; returns several records if it is split, none if it is dropped."""
    tokens, mask = encoded
    ids = np.asarray(tokens)  # before int32: ids may overflow it
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(outside):
        first = outside[0]
        raise Fault("token id out of range", f"token {first + 1} is {tokens[first]}; ids are 0 to {vocab_size - 1}")
    record = Record(np.asarray(tokens, np.int32), np.asarray(mask, np.uint8))
    if not record.loss_mask.any():
        raise Fault("nothing to learn", f"none of its {len(record.tokens)} tokens is to be learned")
    parts = [record]
    if len(tokens) > max_length:
        if cut not in ("truncate", "split"):
            raise Fault("too long", f"{len(tokens)} tokens, and at most {max_length} are allowed (max_length)")
        starts = range(0, len(tokens) if cut == "split" else 1, max_length)
        ends = [slice(start, start + max_length) for start in starts]
        parts = [Record(record.tokens[part], record.loss_mask[part]) for part in ends]
    kept = [part for part in parts if part.loss_mask.any()]
    if not kept:
        raise Fault("nothing to learn", f"none of its first {max_length} tokens is to be learned; the rest is cut off")
    if len(tokens) > max_length:
        report.truncated += cut == "truncate"
        report.split += cut == "split"
        report.left_out += len(parts) - len(kept)
    seen = [part for part in kept if part.loss_mask[predicted].any()]
    report.unseen += len(kept) - len(seen)
    return seen


def _count(number: int, noun: str) -> str:
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"
