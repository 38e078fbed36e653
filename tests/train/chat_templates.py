"""Chat templates of the kinds that models have, and a tokenizer for them."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (  # as Qwen 2: every turn ends with the mark and a newline, and there is always a system message
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (  # contents are trimmed, and the text begins with the tokenizer's first token
    "{{ bos_token }}{% for m in messages %}<|start_header|>{{ m.role }}<|end_header|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header|>assistant<|end_header|>\n\n{% endif %}"
)
MARKED = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}{{ '\n' }}"
    "{%- if m.role == 'assistant' -%}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{%- else -%}{{ m.content }}<|im_end|>{%- endif -%}{{ '\n' }}{%- endfor -%}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPPING = (  # as Qwen 3: earlier answers lose their reasoning
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REASONING = (  # as DeepSeek's R1 distilled: reasoning begins in the generation prompt, and no answer in the text has it
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
    "{% elif m.role == 'assistant' and m.content is not none %}<|im_end|>{{ m.content.split('</think>')[-1] }}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}"
)
MISTRAL = (  # no header of the assistant, the system's text in the first user turn, and roles in turn
    "{{ bos_token }}{% set s = namespace(text='') %}"
    "{% if messages[0].role == 'system' %}{% set s.text = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ (s.text if loop.first else '') + m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
PLAIN = (  # no special tokens: a line ends an answer
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SPACED = PLAIN.replace("{{ m.role }}:", "{{ m.role }}: ").replace("assistant:", "assistant: ")
SPACED_MARKED = (
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
)
SPECIAL = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|start_header|>", "<|end_header|>", "<|eot|>"]
SPECIAL += ["[INST]", "[/INST]"]
TEXTS = [
    "Hello world, how are you? I am fine.\n\nThe answer is 42.\n",
    "user: assistant: system: Hello there <think>",
] * 20


def byte_level(template: str | None = None, *, trim_offsets: bool = False, first: bool = True) -> Any:
    """A small byte-level BPE tokenizer, which puts <|bos|> first as Llama's does. trim_offsets: as RoBERTa's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\w+|\s+(?!\S)|\s+|[^\s\w]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets, add_prefix_space=False)]
    if first:
        steps.append(processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]))
    tokenizer.post_processor = processors.Sequence(steps)
    return _fast(tokenizer, template)


def word_pieces(template: str | None = None) -> Any:
    """A small tokenizer that writes a space as the beginning of a word, and one before all, as Llama 2's does."""
    words = ["▁Hello", "▁world", "Hello", "world"]
    merges = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(set("".join(words) + "assistantuser:"))]
    pieces += [first + second for first, second in merges]
    vocab = {piece: index for index, piece in enumerate([*SPECIAL, *dict.fromkeys(pieces)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(tokenizer, template)


def _fast(tokenizer: Tokenizer, template: str | None) -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>")
    fast.chat_template = template
    return fast


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant")
    turns = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]
