"""Holds a conversation with a model, for `chat` and for prompts of several turns."""

from __future__ import annotations

from typing import Any

from eagle_jax.files.prompts import Chat, encode, has_template


class Conversation:
    """The conversation so far: messages for the chat template, or plain text without one."""

    def __init__(self, tokenizer: Any, raw: bool, system: str | None = None):
        self.tokenizer, self.raw = tokenizer, raw
        self.template = has_template(tokenizer, raw)
        if system is not None and not self.template:
            raise ValueError("--system needs a chat template, which this model lacks or --raw leaves out")
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.messages = list(self.system)
        self.text = ""

    def tokens_with(self, said: str) -> list[int]:
        """Returns the token ids of the conversation with a further message, up to its answer."""
        chat = Chat([*self.messages, {"role": "user", "content": said}])
        return encode(self.tokenizer, chat if self.template else self.text + said, self.raw)

    def add(self, said: str, answer: str) -> None:
        """Adds a turn: the user's message and the answer."""
        self.messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        self.text += said + answer
