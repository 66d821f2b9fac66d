"""What the chat asks of a model, wherever it runs: in a process of its own, or behind a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

State = dict[str, Any]
Messages = Sequence[Mapping[str, str]]


class ChatModel(Protocol):
    """See `backend.chat.client.ModelProcess`, the first of its kind, for what each part does."""

    info: State

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""

    def start(self) -> State:
        """Make it ready; what it says of itself.

        Raises:
            EngineError: If it cannot be.
        """

    def generate(
        self,
        messages: Messages,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[State]:
        """Answer a conversation, state by state.

        Raises:
            EngineError: If it breaks off.
        """

    def stop(self) -> None:
        """End the answer that is being made."""

    def memory(self) -> State:
        """Peaks of its memory in bytes; empty if it cannot tell."""

    def close(self) -> None:
        """Let it go."""
