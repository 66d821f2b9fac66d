"""An asynchronous stream for a thread that is not asynchronous, which any other thread may end at any time.

A blocking read of a socket cannot be interrupted; a task of an event loop can, while it connects as well as while it
waits for the next byte. So each stream has a loop and a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Stream(Generic[Item]):
    """The items of an asynchronous iterator; starts at once.

    Args:
        source: What to read.

    Attributes:
        cancelled: Whether it was ended by `cancel`.
    """

    def __init__(self, source: AsyncIterator[Item]) -> None:
        self.cancelled = False
        self._items: queue.Queue[tuple[Item] | BaseException | None] = queue.Queue()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._pump(source))
        threading.Thread(target=self._run, name="served-stream", daemon=True).start()

    def __iter__(self) -> Iterator[Item]:
        """Items as they come; ends early after `cancel`, and raises what the source raises."""
        while (item := self._items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]

    def cancel(self) -> None:
        """End it, and with it the request that it reads."""
        self.cancelled = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended by itself
            self._loop.call_soon_threadsafe(self._task.cancel)

    async def _pump(self, source: AsyncIterator[Item]) -> None:
        async for item in source:
            self._items.put((item,))

    def _run(self) -> None:
        end: BaseException | None = None
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        except Exception as error:  # handed to whoever reads
            end = error
        finally:
            with contextlib.suppress(Exception):
                self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
            self._items.put(end)
