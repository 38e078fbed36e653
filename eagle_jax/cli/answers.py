"""Answers the prompts of a file, turn by turn, as tasks of a running batch (`eagle-jax generate --prompts`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from eagle_jax.cli.conversation import Conversation
from eagle_jax.cli.text import Detokenizer, Ends, Finish
from eagle_jax.files.prompts import Prompt
from eagle_jax.serving import Request, Task

LATER_TURNS = np.uint32(2**31)  # turn t > 0 uses fold_in(first turn's key, this + t): above the index of any token


@dataclasses.dataclass(frozen=True)
class Rules:
    """Holds what all texts share.

    tokenizer: None if prompts are token ids. raw: see `encode`. longest_prompt: in tokens. check: called with the token
    ids of a later turn; raises ValueError.
    """

    tokenizer: Any
    raw: bool
    ends: Ends
    longest_prompt: int
    check: Callable[[Sequence[int]], None] = lambda tokens: None


@dataclasses.dataclass(frozen=True)
class Text:
    """Holds the answer to one turn.

    said: what the user says in this turn; None for token ids. text: None without a tokenizer, or without a token.
    error: why it failed.
    """

    said: str | None
    finish: Finish
    tokens: Sequence[int] = ()
    text: str | None = None
    error: str | None = None
    cycles: int = 0
    log_probs: Sequence[float] = ()


@dataclasses.dataclass
class Job:
    """Holds one sample of a prompt: the answers to its turns, in order.

    Args:
      index: of the prompt in its file. sample: its number among the prompt's samples.
      key: of the first turn.
    """

    index: int
    sample: int
    prompt: Prompt
    key: jax.Array
    texts: list[Text] = dataclasses.field(default_factory=list)


def answer_turns(job: Job, rules: Rules) -> Task[Job]:
    """Answers the turns of a job in order. After a turn that fails, all later ones fail."""
    conversation = Conversation(rules.tokenizer, rules.raw)
    for turn, said in enumerate((job.prompt.text, *job.prompt.later_turns)):
        key = job.key if turn == 0 else jax.random.fold_in(job.key, LATER_TURNS + np.uint32(turn))
        try:
            tokens = _prompt(job, conversation, said, rules)
        except ValueError as error:
            job.texts.append(Text(said, "failed", error=str(error)))
        else:
            job.texts.append((yield from _answer(said, tokens, key, rules)))
    return job


def _prompt(job: Job, conversation: Conversation, said: str | None, rules: Rules) -> Sequence[int]:
    """Returns the token ids of the conversation before a turn's answer; raises ValueError if they are unusable."""
    if not job.texts:
        if job.prompt.fault is not None:
            raise ValueError(job.prompt.fault)
        return job.prompt.tokens
    last = job.texts[-1]
    try:
        if last.finish == "failed":
            raise ValueError("the answer before it failed")
        assert said is not None and last.said is not None
        conversation.add(last.said, last.text or "")
        tokens = conversation.tokens_with(said)
        if not 1 <= len(tokens) <= rules.longest_prompt:
            room = f"there is room for 1 to {rules.longest_prompt} and an answer"
            raise ValueError(f"the conversation has {len(tokens)} tokens, and {room}")
        rules.check(tokens)
    except ValueError as error:
        raise ValueError(f"{job.prompt.where}, turn {len(job.texts) + 1}: {error}") from error
    return tokens


def _answer(said: str | None, prompt: Sequence[int], key: jax.Array, rules: Rules) -> Task[Text]:
    """Requests one answer from the running batch; ends it at a stop string as well."""
    detokenizer = Detokenizer(rules.tokenizer, rules.ends.strings)

    def collect(tokens: Sequence[int]) -> bool:
        detokenizer.collect(tokens)
        return detokenizer.stopped

    answer = yield Request(prompt, key, rules.ends.max_new_tokens, on_tokens=collect)
    detokenizer.finish()
    ids = detokenizer.ids
    failed = answer.finish == "failed"
    finish = rules.ends.finish(ids, detokenizer.stopped, failed)
    return Text(
        said=said,
        finish=finish,
        tokens=ids,
        text=detokenizer.text if detokenizer.has_text and ids else None,
        error="the model's logits became NaN or infinite" if finish == "failed" else None,
        cycles=answer.cycles,
        log_probs=(answer.log_probs or [])[: len(ids)],
    )
