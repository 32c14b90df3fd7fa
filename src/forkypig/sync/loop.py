"""An event loop in a thread: what the blocking face stands on."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import CancelledError
from typing import Any, TypeVar

_T = TypeVar("_T")


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="forkypig", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Runs `work` to its end. When we are interrupted (Ctrl-C), ends it before going on."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            if not future.done():
                future.cancel()
                with contextlib.suppress(CancelledError):
                    future.exception(timeout=5.0)  # the verbs give way at once when they are cancelled
            raise

    def iterate(self, items: AsyncIterator[_T]) -> Iterator[_T]:
        """The items of an asynchronous iterator."""
        done = object()

        async def following() -> _T | object:
            return await anext(items, done)

        try:
            while (item := self.run(following())) is not done:
                yield item  # type: ignore[misc]
        finally:
            if (close := getattr(items, "aclose", None)) is not None:
                self.run(close())

    def close(self) -> None:
        """Ends the thread."""
        if self._loop.is_closed():
            return
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
