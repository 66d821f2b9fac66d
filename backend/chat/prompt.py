"""From a conversation to token ids: the model's own chat template, or plain turns where it has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from backend.errors import DataError

ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
PLAIN_STOP = "\nUser:"
"""Where a model without a chat template starts to write the other side's next turn."""


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the model.

    Attributes:
        ids: Token ids, special tokens included.
        stop: Text that ends the answer, or empty.
    """

    ids: list[int]
    stop: str = ""


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's folder brought a chat template."""
    return bool(tokenizer.chat_template)


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> Prompt:
    """Encode a conversation so that the model answers next.

    Args:
        tokenizer: The model's tokenizer.
        messages: `{"role": "system" | "user" | "assistant", "content": str}`, oldest first.

    Raises:
        DataError: If a message has no text or an unknown role, or the template refuses the conversation.
    """
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise DataError(f"A message needs a role among {', '.join(ROLES)} and text as content; found {message!r}.")
    if not messages:
        raise DataError("The conversation is empty; write a message first.")
    if not has_chat_template(tokenizer):
        turns = [f"{ROLES[message['role']]}: {message['content']}" for message in messages]
        return Prompt(list(tokenizer("\n".join(turns) + "\nAssistant:").input_ids), PLAIN_STOP)
    try:
        text = tokenizer.apply_chat_template([dict(m) for m in messages], add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program, in a sandbox: it may raise anything
        raise DataError(f"The model's chat template refuses this conversation: {error}.") from error
    # the template writes BOS itself where the model wants it
    return Prompt(list(tokenizer(text, add_special_tokens=False).input_ids))
