"""Tokenises conversations with a loss mask over the assistant's answers.

A chat template may mark the answers by {% generation %} and {% endgeneration %}. Without marks the conversation is
rendered up to each answer's start and end. Where both are prefixes of the whole, in text and in tokens, the answer is
the span between them. Some templates change earlier turns, for example drop their reasoning, which breaks the prefixes.
Then each answer becomes a document, after the turns before it. An answer that is incomplete in the rendered text is
refused rather than guessed.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, Literal, TypeAlias

import numpy as np

from eagle_jax.files.jsonl import Fault
from eagle_jax.files.records import Encoded, text_tokens
from eagle_jax.train.data.messages import (
    REASONING,
    REASONING_KEYS,
    find_content,
    is_learned,
    missing_part,
    normal_messages,
    without_opening,
)
from eagle_jax.train.data.rendering import KEEP_TOKENS, Rendering, Span, chat_template_of, probe, unsure

Kind: TypeAlias = Literal[
    "damaged file",
    "not UTF-8",
    "invalid JSON",
    "unknown format",
    "empty text",
    "bad tokens",
    "bad loss mask",
    "bad message",
    "empty conversation",
    "empty answer",
    "wrong roles",
    "template refuses",
    "mask unsure",
    "answer changed",
    "other tokenizer",
    "tokenizer refuses",
    "token id out of range",
    "nothing to learn",
    "too long",
    "failed",
]


def conversation_tokens(
    tokenizer: Any, messages: Any, *, chat_template: str | None = None, tools: list[Any] | None = None
) -> Encoded:
    """Returns tokens and loss mask of a conversation: the last of `conversation_documents`.

    Where the template changes earlier answers, only the last answer is learned. A Fault in its place is raised.
    """
    documents = conversation_documents(tokenizer, messages, chat_template=chat_template, tools=tools)
    learned = []
    for document in documents:
        if isinstance(document, Fault):
            raise document
        learned.append(document)
    return learned[-1]


def conversation_documents(
    tokenizer: Any, messages: Any, *, chat_template: str | None = None, tools: list[Any] | None = None
) -> list[Encoded | Fault]:
    """Returns tokens and loss masks of a conversation, rendered by the chat template.

    Content, reasoning and tool calls of an answer must all stand in the learned text; otherwise the conversation is
    refused. The end-of-turn token is learned, too, because a model must write it; template white space after it is not.
    Marks of a template count exactly as they are. Other turns and answers of weight 0 are context only.

    Args:
      tokenizer: of transformers.
      messages: OpenAI's [{"role", "content"}, ...] or ShareGPT's [{"from", "value"}, ...]. An optional system message,
        then user and assistant in turn; tool messages may stand between two of the assistant's. A content is a string
        or a list of text parts. Other keys ("tool_calls", "reasoning_content") are passed to the template.
      chat_template: Jinja that replaces the tokenizer's template.
      tools: JSON schemas, for the template.
    Returns:
      tokens [T] int32 and mask [T] uint8: one pair for all answers. If the template changes earlier answers: one pair
      per answer with the turns before it, or a Fault for an answer that cannot be learned.
    Raises:
      Fault: if no answer can be learned, or the assistant's tokens cannot be told for certain.
      ValueError: if there is no chat template, or it is not valid Jinja.
    """
    chat = normal_messages(messages)
    pairs = zip(messages, chat, strict=True)
    learned = [index for index, (given, message) in enumerate(pairs) if is_learned(given, message)]
    if not learned:
        raise Fault("nothing to learn", "every answer has weight 0")
    rendering = Rendering(tokenizer, chat_template_of(tokenizer, chat_template, tools), tools)
    chat = rendering.with_calls(chat)
    together, alone = (_marked, _marked_alone) if rendering.marked else (_rendered_again, _alone)
    try:
        return [_encoded(rendering, *together(rendering, chat, learned))]
    except Fault as fault:
        if fault.kind not in ("mask unsure", "answer changed"):
            raise
    documents: list[Encoded | Fault] = []
    for index in learned:
        try:
            documents.append(_encoded(rendering, *alone(rendering, chat[: index + 1])))
        except Fault as fault:
            documents.append(fault)
    faults = [document for document in documents if isinstance(document, Fault)]
    if len(faults) == len(documents):
        raise faults[0]
    return documents


def _encoded(rendering: Rendering, text: str, spans: list[Span]) -> Encoded:
    """Tokenises a text; converts spans of characters to a loss mask."""
    tokens, found = _token_spans(rendering.tokenizer, text, spans, straddling=rendering.marked)
    mask = np.zeros(len(tokens), np.uint8)
    for span in found:
        start, end = span if rendering.marked else _without_tail(rendering.tokenizer, tokens, span)
        mask[start:end] = 1
    return Encoded(np.asarray(tokens, np.int32), mask)


def _check_whole(message: dict[str, Any], name: str, text: str, before: str = "") -> None:
    """Refuses an answer that is incomplete in the learned text."""
    missing = missing_part(message, text, before)
    if missing is not None:
        whole = f"give one that writes all of it, or {KEEP_TOKENS}"
        raise Fault("answer changed", f"{name}: the chat template leaves out or changes {missing}; {whole}")


def _rendered_again(rendering: Rendering, chat: list[dict[str, Any]], learned: list[int]) -> tuple[str, list[Span]]:
    """Returns the text, and the span of each answer, found by rendering prefixes of the conversation."""
    text = rendering.text(chat)
    spans = []
    for index in learned:
        name = f"message {index + 1}"
        try:
            before = rendering.text(chat[:index], prompt=True)
            after = text if index + 1 == len(chat) else rendering.text(chat[: index + 1])
        except Fault as error:
            unsure(f"the chat template refuses the conversation before {name}, or up to it ({error})")
        if not after.startswith(before):
            unsure(f"the chat template does not write {name} right after the generation prompt")
        if not text.startswith(after):
            unsure(f"the chat template changes the text up to {name} when more messages follow")
        content, answer = (chat[index]["content"] or "").strip(), after[len(before) :].strip()
        # Without the generation prompt, a header such as "assistant:" would count as part of the answer.
        if not (content and answer.startswith(content)) and before == rendering.text(chat[:index]):
            unsure(
                f"the chat template has no generation prompt, and {name} begins with something else than its content"
            )
        _check_whole(chat[index], name, answer, before)
        spans.append((len(before), len(after)))
    return text, spans


def _alone(rendering: Rendering, chat: list[dict[str, Any]]) -> tuple[str, list[Span]]:
    """Returns the text up to the last message, an answer, and the answer's span.

    The text is the template's if it holds the whole answer, otherwise the one that the model wrote. They differ for
    reasoning models: templates drop the reasoning of answers, or open it in the generation prompt.
    """
    try:
        return _rendered_again(rendering, chat, [len(chat) - 1])
    except Fault as fault:
        if chat[-1].get("tool_calls") or any(chat[-1].get(key) for key in REASONING_KEYS):
            raise
        written = _as_written(rendering, chat)
        if written is None:
            raise fault
        return written


def _as_written(rendering: Rendering, chat: list[dict[str, Any]]) -> tuple[str, list[Span]] | None:
    """Returns generation prompt + content + end-of-turn mark of the last message; None if these are ambiguous.

    the template on a probe   <|user|>q<|assistant|>PROBE<|end|>          head, probe, tail
    the generation prompt     <|user|>q<|assistant|><think>               head, opening
    the template on "so</think>4", and the result:
                              <|user|>q<|assistant|>4<|end|>              head, kept, tail
                              <|user|>q<|assistant|><think>so</think>4<|end|>
    """
    try:
        before, after = rendering.text(chat[:-1], prompt=True), rendering.text(chat)
        probed = rendering.text([*chat[:-1], {"role": "assistant", "content": probe(0)}])
    except Fault:
        return None
    head, found, tail = probed.partition(probe(0))
    if not found or not before.startswith(head) or not (after.startswith(head) and after.endswith(tail)):
        return None
    closing = tuple(REASONING.values())
    opening, kept = before[len(head) :].strip(), after[len(head) : len(after) - len(tail)]
    content, spoken = chat[-1]["content"].strip(), without_opening(chat[-1]["content"], before)
    if opening in REASONING and REASONING[opening] not in spoken:
        unsure(f"the generation prompt begins reasoning, {opening}, which message {len(chat)} does not end")
    left_out = content[: len(content) - len(kept.strip())].rstrip()
    only_reasoning = content.endswith(kept.strip()) and (left_out.endswith(closing) or (opening and not left_out))
    if not only_reasoning or (opening and opening not in REASONING and not opening.endswith(closing)):
        return None
    text = before + spoken.rstrip() + kept[len(kept.rstrip()) :] + tail
    return text, [(len(before), len(text))]


def _marked(rendering: Rendering, chat: list[dict[str, Any]], learned: list[int]) -> tuple[str, list[Span]]:
    """Returns the text, and the spans between the template's marks."""
    rendering.check_marks(chat)
    text, spans = rendering.marks(chat)
    answers = sum(message["role"] == "assistant" for message in chat)
    if len(spans) < answers:
        unsure(f"the chat template marks {len(spans)} pieces of text for {answers} answers")
    if len(learned) < answers:
        spans = [span for index in learned for span in _inside(rendering, chat[:index], chat[: index + 1], text, spans)]
    said, place = "\n".join(text[start:end] for start, end in spans), 0
    for index in learned:
        _check_whole(chat[index], f"message {index + 1}", said[place:], text[: spans[0][0]])
        found = find_content(chat[index]["content"] or "", said[place:], text[: spans[0][0]])
        place += found[1] if found else 0
    return text, spans


def _marked_alone(rendering: Rendering, chat: list[dict[str, Any]]) -> tuple[str, list[Span]]:
    """Returns the text up to the last message, an answer, and the marked spans of that answer."""
    rendering.check_marks(chat)
    text, spans = rendering.marks(chat)
    spans = _inside(rendering, chat[:-1], chat, text, spans)
    said = "\n".join(text[start:end] for start, end in spans)
    _check_whole(chat[-1], f"message {len(chat)}", said, text[: spans[0][0]])
    return text, spans


def _inside(
    rendering: Rendering, before: list[dict[str, Any]], through: list[dict[str, Any]], text: str, spans: list[Span]
) -> list[Span]:
    """Returns the spans that belong to the last message of `through`, which follows `before`."""
    start, end = rendering.text(before), rendering.text(through)
    if not (text.startswith(end) and end.startswith(start)):
        unsure(f"the chat template changes the text up to message {len(through)} when more messages follow")
    found = [span for span in spans if len(start) <= span[0] and span[1] <= len(end)]
    if not found:
        unsure(f"the chat template marks nothing of message {len(through)}")
    return found


def _token_spans(tokenizer: Any, text: str, spans: list[Span], straddling: bool) -> tuple[list[int], list[Span]]:
    """Tokenises a text, and converts spans of characters to spans of tokens.

    Fast path: if tokenising the pieces between span edges gives the same tokens, the edges are token boundaries. Many
    tokenizers prepend something to any text, which breaks this. Then the prefix up to each edge is tokenised, which
    is quadratic in the number of turns.

    Args:
      straddling: include a token that crosses the edge of a span; otherwise such a span is refused.
    """
    encode = functools.partial(text_tokens, tokenizer, add_special_tokens=False)  # the template wrote the specials
    tokens = encode(text)
    edges = sorted({0, len(text), *(place for span in spans for place in span)})
    pieces = encode([text[start:end] for start, end in itertools.pairwise(edges)])
    if list(itertools.chain.from_iterable(pieces)) == tokens:
        exact = dict(zip(edges, itertools.accumulate(map(len, pieces), initial=0), strict=True))
    else:
        starts = encode([text[:place] for place in edges])
        exact = {place: len(ids) for place, ids in zip(edges, starts, strict=True) if tokens[: len(ids)] == ids}
    offsets = []
    if straddling and tokenizer.is_fast and len(exact) < len(edges):
        encoding = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        offsets = encoding["offset_mapping"]
    found = []
    for start, end in spans:
        first, last = exact.get(start), exact.get(end)
        if offsets and (first is None or last is None):
            inside = [index for index, (begin, stop) in enumerate(offsets) if begin < end and start < stop]
            first = min(inside, default=None) if first is None else first
            last = max(inside, default=-1) + 1 if last is None else last
        if first is None or last is None or first >= last:
            unsure(f"no token begins or ends where the text {_short(text[start:end])} does")
        found.append((first, last))
    return tokens, found


def _without_tail(tokenizer: Any, tokens: list[int], span: Span) -> Span:
    """Cuts the white space after a span's last special token: only templates write it, never the model."""
    start, end = span
    special = _special_tokens(tokenizer)
    last = next((index for index in reversed(range(start, end)) if tokens[index] in special), None)
    if last is None or tokenizer.decode(tokens[last + 1 : end]).strip():
        return span
    return start, last + 1


@functools.lru_cache(maxsize=4)
def _special_tokens(tokenizer: Any) -> frozenset[int]:
    return frozenset(token for token, text in tokenizer.added_tokens_decoder.items() if text.special)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:20]} ... {text[-15:]}")
