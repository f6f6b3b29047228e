"""Conversations as the chat template writes them, and which of their tokens the assistant says.

Only what the assistant says is learned: its text and the token that ends its turn, not the marks that begin it. Where
the template marks that itself (``{% generation %}``), its marks are taken. Any other template is asked twice, once with
the conversation and once with a word of its own in place of each answer: what lies between the same surroundings is the
answer, whatever the template writes around it or changes in earlier turns. The mark that ends a turn is the special
token that follows, if one does.

A tokenizer without a template gets `DEFAULT_TEMPLATE`, which needs no tokens but the end of text; it is saved with the
checkpoint's tokenizer, so that generation uses the same.
"""

from __future__ import annotations

import re
from typing import Any

DEFAULT_TEMPLATE = """{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}
{{- message['content'] + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

_MARKS_ITSELF = re.compile(r"\{%-?\s*generation\b")

Message = dict[str, str]


class ChatEncoder:
    """Conversations to token ids.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special_ids = set(tokenizer.all_special_ids) | {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._marks_itself = bool(_MARKS_ITSELF.search(tokenizer.chat_template or ""))

    def encode(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Token ids, and for each 1 where the assistant says it, else 0.

        Raises:
            ValueError: the template refuses the conversation, or hides what the assistant says.
        """
        try:
            if self._marks_itself:
                encoded = self._tokenizer.apply_chat_template(
                    messages, return_dict=True, return_assistant_tokens_mask=True
                )
                ids, answered = list(encoded["input_ids"]), [int(mark) for mark in encoded["assistant_masks"]]
            else:
                ids, answered = self._encode_by_surroundings(messages)
        except ValueError:
            raise
        except Exception as error:  # Jinja's own errors, and raise_exception() in templates
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the chat template refuses the conversation: {reason}") from error
        if not any(answered):
            raise ValueError("the chat template leaves out what the assistant says")
        return ids, answered

    def _encode_by_surroundings(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        spans = self._answers(messages, text)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, answered = encoded["input_ids"], []
        for start, stop in encoded["offset_mapping"]:
            answered.append(int(any(start < last and stop > first for first, last in spans)))
        said = list(answered)
        for position in range(1, len(ids)):
            # The special token behind an answer ends it; white space may stand in between.
            if said[position - 1] and not said[position]:
                behind = position
                while behind < len(ids) and self._is_space(ids[behind]):
                    behind += 1
                if behind < len(ids) and ids[behind] in self._special_ids:
                    answered[position : behind + 1] = [1] * (behind + 1 - position)
        return ids, answered

    def _answers(self, messages: list[Message], text: str) -> list[tuple[int, int]]:
        """First and last-plus-one character of each answer in `text`."""
        stand_ins = _names(len(messages))
        replaced = [
            {**message, "content": stand_in} if message["role"] == "assistant" else message
            for message, stand_in in zip(messages, stand_ins, strict=True)
        ]
        skeleton = self._tokenizer.apply_chat_template(replaced, tokenize=False)
        spans, position = [], 0
        for message, stand_in in zip(messages, stand_ins, strict=True):
            if message["role"] != "assistant":
                continue
            before, found, skeleton = skeleton.partition(stand_in)
            content = message["content"]
            if content not in text:
                content = content.strip()
            start = text.find(content, position + len(before))
            if not found or text[position : position + len(before)] != before or start != position + len(before):
                raise ValueError("the chat template changes what the assistant says: where it lies cannot be told")
            position = start + len(content)
            spans.append((start, position))
        return spans

    def _is_space(self, token: int) -> bool:
        return token not in self._special_ids and not self._tokenizer.decode([token]).strip()


def _names(count: int) -> list[str]:
    """Words that no conversation holds, and that a template has no reason to change."""
    return [f"qzx{index}vkw" for index in range(count)]
